/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What can be told of a packet by reading it.
 *
 * Mostly a packet was at a hook before on this CPU, and what was read of it then is compared. That
 * much is inline here, because every record passes it; reading is in mace_packet.c.
 */
#ifndef _MACE_PACKET_H
#define _MACE_PACKET_H

#include <linux/hash.h>
#include <linux/if_vlan.h>
#include <linux/mm.h>
#include <linux/percpu.h>
#include <linux/skbuff.h>

#include "mace_compat.h"
#include "uapi/mace.h"
#include "uapi/mace_key.h"

#define MACE_TUNNEL_PORTS_MAX 4

extern unsigned short mace_vxlan_ports[MACE_TUNNEL_PORTS_MAX];
extern unsigned int mace_vxlan_port_count;
extern unsigned short mace_geneve_ports[MACE_TUNNEL_PORTS_MAX];
extern unsigned int mace_geneve_port_count;

/* Bytes of payload that a packet_key is made of. */
#define MACE_PAYLOAD_BYTES 16
/* IPv4, UDP, VXLAN, Ethernet with a VLAN tag, IPv4 and TCP are 9. */
#define MACE_READS_MAX 12
/* As many are always compared, and then two at a time: TCP over IPv4 has four. */
#define MACE_READS_MIN 4
/* NAPI polls 64 packets: with eight times as many entries one in nine shares its with another. */
#define MACE_DATA_BITS 9
/* No protocol: nothing was read. */
#define MACE_PROTOCOL_NONE 0x10000

/**
 * struct mace_packet - a packet that was read, by the bytes that were read of it
 *
 * Whatever @record says was decided by @protocol, by the bytes of @reads and by
 * MACE_PAYLOAD_BYTES of payload. Where these are the same, all of it is the same: a comparison in
 * place of reading and hashing. Addresses, checksums and TTL were not read, so NAT and routing
 * make no difference; ports and identifiers are read each time.
 *
 * @record: what the bytes say, and skb_id, that of @skb, and cpu; ports are those of the last hook,
 *	all other fields are a probe's and 0 here
 * @skb: the buffer that it was in last
 * @content: the payload at @payload
 * @content_mask: which bits of it are payload; 0 without any
 * @protocol: of the network layer, in network byte order; or MACE_PROTOCOL_NONE
 * @in_place: bytes from the network layer's header on, in which all reads are
 * @whole: the same, with the payload
 * @reads: how many there are: MACE_READS_MIN or more, and an even number
 * @payload: offset of @content; 0 without any
 * @payload_bytes: how long it is
 * @ports: offset of l4_src and l4_dst, or 0
 * @ports_there: what was there last, whose numbers are in @record
 * @offset: of each read: the place of eight bytes, from the network layer's header on; the first's
 *	is 0
 * @value: what was there
 * @mask: which of them were looked at; 0 if that makes @reads what they are
 */
struct mace_packet {
	struct mace_record record;
	const struct sk_buff *skb;
	u64 content[MACE_PAYLOAD_BYTES / sizeof(u64)];
	u64 content_mask[MACE_PAYLOAD_BYTES / sizeof(u64)];
	u32 protocol;
	u16 in_place;
	u16 whole;
	u16 reads;
	u16 payload;
	u16 ports;
	u8 payload_bytes;
	u32 ports_there;
	u16 offset[MACE_READS_MAX];
	u64 value[MACE_READS_MAX];
	u64 mask[MACE_READS_MAX];
};

/**
 * struct mace_data - what was read in the data of a kernel buffer, which clones share
 *
 * @latest: which of @packets was there at the last hook
 * @packets: two, because a packet goes into tunnels and comes out again
 */
struct mace_data {
	struct mace_packet *latest;
	struct mace_packet packets[2];
};

/* Buffers that were identified on a CPU: mostly one of them is there at the next hook. */
#define MACE_IDENTIFIED_BITS 9

struct mace_identified {
	const struct sk_buff *skb;
	u64 skb_id;
};

/**
 * struct mace_packets - what a CPU remembers of packets
 *
 * @data: by the hash of the data's address
 * @identified: by the hash of the buffer's address
 * @tagged: the record of a packet with a VLAN tag, which is not remembered
 */
struct mace_packets {
	struct mace_data data[1 << MACE_DATA_BITS];
	struct mace_identified identified[1 << MACE_IDENTIFIED_BITS];
	struct mace_record tagged;
};

DECLARE_PER_CPU(struct mace_packets *, mace_packets);
/* The packet of the last hook, whose data may be elsewhere at this one (pskb_expand_head()). */
DECLARE_PER_CPU(struct mace_packet *, mace_last_packet);

/* Of the address of @skb's data; tables are indexed by its uppermost bits, as by hash_ptr(). */
static __always_inline u64 mace_head_hash(const struct sk_buff *skb)
{
	return (unsigned long)skb->head * GOLDEN_RATIO_64;
}

/* The entry of a buffer's data by its mace_head_hash(), which may have been another's until now. */
static __always_inline struct mace_data *mace_data_of(u64 head_hash)
{
	return &this_cpu_read(mace_packets)->data[head_hash >> (64 - MACE_DATA_BITS)];
}

void mace_identify(struct mace_packet *packet, const struct sk_buff *skb);

/* The record of @packet, which is in @skb. */
static __always_inline const struct mace_record *mace_record_of(struct mace_packet *packet,
								const struct sk_buff *skb)
{
	if (unlikely(packet->skb != skb))
		mace_identify(packet, skb);
	this_cpu_write(mace_last_packet, packet);
	return &packet->record;
}

static __always_inline u64 mace_differs_at(const struct mace_packet *packet, int read, const u8 *at)
{
	return (get_unaligned((const u64 *)at) ^ packet->value[read]) & packet->mask[read];
}

static __always_inline u64 mace_differs(const struct mace_packet *packet, int read, const u8 *at)
{
	return mace_differs_at(packet, read, at + packet->offset[read]);
}

/*
 * Where @len bytes are that lie in the first page whole, @beyond its first byte; or NULL. From
 * there on MACE_PAYLOAD_BYTES may be loaded: what is behind is in the same page, to be ignored.
 */
static __always_inline const u8 *mace_in_first_page(const struct sk_buff *skb, int beyond, int len)
{
	const skb_frag_t *frag = &skb_shinfo(skb)->frags[0];
	const struct page *page;
	unsigned long start;

	/* A page of high memory may not be mapped. */
	if (IS_ENABLED(CONFIG_HIGHMEM) || beyond < 0 || !skb_shinfo(skb)->nr_frags ||
	    beyond + len > (int)skb_frag_size(frag))
		return NULL;
	/* NULL where the memory is not the kernel's. */
	page = skb_frag_page(frag);
	if (unlikely(!page))
		return NULL;
	start = (unsigned long)page_address(page) + skb_frag_off(frag) + beyond;
	return likely(offset_in_page(start) <= PAGE_SIZE - MACE_PAYLOAD_BYTES) ? (const u8 *)start :
										 NULL;
}

const void *mace_peek_elsewhere(const struct sk_buff *skb, int offset, int len);

/* Where the payload of @packet would be, which is not in place whole; or NULL. */
static __always_inline const u8 *mace_payload_elsewhere(const struct mace_packet *packet,
							const struct sk_buff *skb, const u8 *at,
							int in_place)
{
	const u8 *payload;

	payload = mace_in_first_page(skb, packet->payload - in_place, packet->payload_bytes);
	if (likely(payload))
		return payload;
	return mace_peek_elsewhere(skb, (int)(at - skb->data) + packet->payload,
				   packet->payload_bytes);
}

/*
 * Whether the packet whose network layer begins @at, in the linear part, is @packet. @in_place:
 * what of that part is from there on.
 */
static __always_inline bool mace_is_same(const struct mace_packet *packet,
					 const struct sk_buff *skb, const u8 *at, int in_place,
					 __be16 protocol)
{
	const u8 *payload;
	u64 differs;
	int i;

	if ((__force u16)protocol != packet->protocol)
		return false;
	/* IPv4's length and identification: mostly enough to tell another packet. */
	if (likely(packet->whole <= in_place)) {
		if (mace_differs_at(packet, 0, at))
			return false;
		payload = at + packet->payload;
	} else {
		if (packet->in_place > in_place || mace_differs_at(packet, 0, at))
			return false;
		payload = mace_payload_elsewhere(packet, skb, at, in_place);
		if (unlikely(!payload))
			return false;
	}
	differs = mace_differs(packet, 1, at) | mace_differs(packet, 2, at) |
		  mace_differs(packet, 3, at);
	for (i = MACE_READS_MIN; i < packet->reads; i += 2)
		differs |= mace_differs(packet, i, at) | mace_differs(packet, i + 1, at);
	/* What lies behind the linear part is the buffer's skb_shared_info. */
	differs |= (get_unaligned((const u64 *)payload) ^ packet->content[0]) &
		   packet->content_mask[0];
	differs |= (get_unaligned((const u64 *)(payload + 8)) ^ packet->content[1]) &
		   packet->content_mask[1];
	return !differs;
}

static __always_inline void mace_set_ports(struct mace_packet *packet, const u8 *ports)
{
	packet->ports_there = get_unaligned((const u32 *)ports);
	packet->record.l4_src = get_unaligned_be16(ports);
	packet->record.l4_dst = get_unaligned_be16(ports + 2);
}

/* @at: the network layer's header */
static __always_inline void mace_read_ports(struct mace_packet *packet, const u8 *at)
{
	const u8 *ports = at + packet->ports;

	/* Without ports these are the version and what is beside it, which is compared. */
	if (unlikely(get_unaligned((const u32 *)ports) != packet->ports_there) && packet->ports)
		mace_set_ports(packet, ports);
}

/**
 * struct mace_read - what was read of a buffer
 *
 * @record: what its packet's bytes tell, skb_id, vlan and cpu; other fields are 0
 * @l3_len: as in the record; 0 of a buffer that is at no device
 */
struct mace_read {
	const struct mace_record *record;
	u32 l3_len;
};

struct mace_read mace_packet_read_other(const struct sk_buff *skb, const u8 *at);
const struct mace_record *mace_packet_read_buffer(const struct sk_buff *skb);
int mace_packet_prepare(unsigned int cpu);
void mace_packet_init(void);
void mace_packet_exit(void);

/**
 * mace_packet_read_device() - read a packet that is at a device
 * @skb: the packet
 * @at: where the network layer begins
 *
 * Context: interrupts off. Return: its record, until the next call on this CPU, and its length.
 */
static __always_inline struct mace_read mace_packet_read_device(const struct sk_buff *skb,
								const u8 *at)
{
	struct mace_packet *packet = mace_data_of(mace_head_hash(skb))->latest;
	unsigned int offset = at - skb->data;
	unsigned int l3_len = skb->len - offset;

	/* A negative offset is beyond any buffer's end, as an unsigned number. */
	if (unlikely(skb_vlan_tag_present(skb) || offset > skb->len ||
		     !mace_is_same(packet, skb, at, (int)(l3_len - skb->data_len), skb->protocol)))
		return mace_packet_read_other(skb, at);
	mace_read_ports(packet, at);
	return (struct mace_read){ mace_record_of(packet, skb), l3_len };
}

/**
 * mace_packet_read_any() - read a kernel buffer that may be a packet
 * @skb: a buffer that is delivered or freed: headers may have been pulled, and it may never have
 *	been a packet
 *
 * skb->dev is not looked at: it may dangle, and in a UDP socket's queue it is no device
 * (skb->dev_scratch).
 *
 * Context: interrupts off. Return: as mace_packet_read_device(), without a length; with no
 * ip_version if it is not an IP packet, and then with nothing else.
 */
static __always_inline const struct mace_record *mace_packet_read_any(const struct sk_buff *skb)
{
	struct mace_packet *packet = mace_data_of(mace_head_hash(skb))->latest;
	const u8 *at = skb->head + skb->network_header;
	int in_place = (int)(skb_headlen(skb) + (skb->data - at));

	if (unlikely(!skb->head || !skb->network_header || !packet->record.ip_version ||
		     !mace_is_same(packet, skb, at, in_place, skb->protocol)))
		return mace_packet_read_buffer(skb);
	mace_read_ports(packet, at);
	return mace_record_of(packet, skb);
}

#endif
