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
/* NAPI polls 64 packets: with four times as many entries one in 38 shares its with two. */
#define MACE_DATA_BITS 8
/* No protocol: nothing was read. */
#define MACE_PROTOCOL_NONE 0x10000

/**
 * struct mace_packet - a packet that was read, by the bytes that were read of it
 *
 * Whatever @record and @flags say was decided by @protocol, by the bytes of @reads and by
 * MACE_PAYLOAD_BYTES of payload. Where these are the same, all of it is the same: a comparison in
 * place of reading and hashing. Addresses, checksums and TTL were not read, so NAT and routing
 * make no difference; ports and identifiers are read each time.
 *
 * @record: what the bytes say, and skb_id, that of @skb, and cpu; flags, vlan, ports and l3_len are
 *	those of the last hook, all other fields are a probe's and 0 here
 * @skb: the buffer that it was in last
 * @content: the payload at @payload
 * @content_mask: which bits of it are payload
 * @protocol: of the network layer, in network byte order; or MACE_PROTOCOL_NONE
 * @in_place: bytes from the network layer's header on, in which all reads are
 * @reads: how many there are: MACE_READS_MIN or more, and an even number
 * @payload: offset of @content, or 0
 * @payload_bytes: how long it is
 * @ports: offset of l4_src and l4_dst, or 0
 * @ports_there: what was there last, whose numbers are in @record
 * @flags: what the bytes decide of mace_record.flags
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
	u16 reads;
	u16 payload;
	u16 ports;
	u32 ports_there;
	u8 flags;
	u8 payload_bytes;
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
 */
struct mace_packets {
	struct mace_data data[1 << MACE_DATA_BITS];
	struct mace_identified identified[1 << MACE_IDENTIFIED_BITS];
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
static __always_inline struct mace_record *mace_record_of(struct mace_packet *packet,
							  const struct sk_buff *skb)
{
	if (unlikely(packet->skb != skb))
		mace_identify(packet, skb);
	this_cpu_write(mace_last_packet, packet);
	packet->record.flags = packet->flags;
	packet->record.vlan = 0;
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
	const u8 *start;

	/* A page of high memory may not be mapped. */
	if (IS_ENABLED(CONFIG_HIGHMEM) || beyond < 0 || !skb_shinfo(skb)->nr_frags ||
	    beyond + len > (int)skb_frag_size(frag))
		return NULL;
	/* NULL in a page that is no memory of the kernel's. */
	start = skb_frag_address(frag);
	if (unlikely(!start))
		return NULL;
	start += beyond;
	return likely(offset_in_page(start) <= PAGE_SIZE - MACE_PAYLOAD_BYTES) ? start : NULL;
}

const void *mace_peek_elsewhere(const struct sk_buff *skb, int offset, int len);

/* Whether the packet whose network layer begins at @offset from skb->data is @packet. */
static __always_inline bool mace_is_same(const struct mace_packet *packet,
					 const struct sk_buff *skb, int offset, __be16 protocol)
{
	int i, in_place = (int)skb_headlen(skb) - offset;
	const u8 *at = skb->data + offset;
	const u8 *payload = at + packet->payload;
	u64 differs;

	if ((__force u16)protocol != packet->protocol || packet->in_place > in_place)
		return false;
	/* IPv4's length and identification: mostly enough to tell another packet. */
	if (mace_differs_at(packet, 0, at))
		return false;
	differs = mace_differs(packet, 1, at) | mace_differs(packet, 2, at) |
		  mace_differs(packet, 3, at);
	for (i = MACE_READS_MIN; i < packet->reads; i += 2)
		differs |= mace_differs(packet, i, at) | mace_differs(packet, i + 1, at);
	if (packet->payload) {
		if (packet->payload + packet->payload_bytes > in_place) {
			payload = mace_in_first_page(skb, packet->payload - in_place,
						     packet->payload_bytes);
			if (unlikely(!payload))
				payload = mace_peek_elsewhere(skb, offset + packet->payload,
							      packet->payload_bytes);
			if (unlikely(!payload))
				return false;
		}
		/* What lies behind the linear part is the buffer's skb_shared_info. */
		differs |= (get_unaligned((const u64 *)payload) ^ packet->content[0]) &
			   packet->content_mask[0];
		differs |= (get_unaligned((const u64 *)(payload + 8)) ^ packet->content[1]) &
			   packet->content_mask[1];
	}
	return !differs;
}

static __always_inline void mace_set_ports(struct mace_packet *packet, const u8 *ports)
{
	packet->ports_there = get_unaligned((const u32 *)ports);
	packet->record.l4_src = get_unaligned_be16(ports);
	packet->record.l4_dst = get_unaligned_be16(ports + 2);
}

static __always_inline void mace_read_ports(struct mace_packet *packet, const struct sk_buff *skb,
					    int offset)
{
	const u8 *ports = skb->data + offset + packet->ports;

	/* Without ports these are the version and what is beside it, which is compared. */
	if (unlikely(get_unaligned((const u32 *)ports) != packet->ports_there) && packet->ports)
		mace_set_ports(packet, ports);
}

struct mace_record *mace_packet_read_other(const struct sk_buff *skb, u64 head_hash, int l3_offset);
struct mace_record *mace_packet_read_buffer(const struct sk_buff *skb);
int mace_packet_prepare(unsigned int cpu);
void mace_packet_init(void);
void mace_packet_exit(void);

/**
 * mace_packet_read_device() - read a packet that is at a device
 * @skb: the packet
 * @head_hash: its mace_head_hash()
 * @l3_offset: where the network layer begins, from skb->data
 *
 * Context: interrupts off. Return: its record, until the next call on this CPU. skb_id, l3_len,
 * vlan and flags are set, and all that the packet's bytes tell; other fields are 0.
 */
static __always_inline struct mace_record *mace_packet_read_device(const struct sk_buff *skb,
								   u64 head_hash, int l3_offset)
{
	struct mace_packet *packet = mace_data_of(head_hash)->latest;

	/* A negative offset is beyond any buffer's end, as an unsigned number. */
	if (unlikely(skb_vlan_tag_present(skb) || (unsigned int)l3_offset > skb->len ||
		     !mace_is_same(packet, skb, l3_offset, skb->protocol)))
		return mace_packet_read_other(skb, head_hash, l3_offset);
	mace_read_ports(packet, skb, l3_offset);
	packet->record.l3_len = skb->len - l3_offset;
	return mace_record_of(packet, skb);
}

/**
 * mace_packet_read_any() - read a kernel buffer that may be a packet
 * @skb: a buffer that is delivered or freed: headers may have been pulled, and it may never have
 *	been a packet
 *
 * skb->dev is not looked at: it may dangle, and in a UDP socket's queue it is no device
 * (skb->dev_scratch).
 *
 * Context: interrupts off. Return: as mace_packet_read_device(), with l3_len and vlan 0; with no
 * ip_version if it is not an IP packet, and then with nothing else.
 */
static __always_inline struct mace_record *mace_packet_read_any(const struct sk_buff *skb)
{
	struct mace_packet *packet = mace_data_of(mace_head_hash(skb))->latest;
	int offset = skb_network_offset(skb);

	if (unlikely(!skb->head || !skb->network_header || !packet->record.ip_version ||
		     !mace_is_same(packet, skb, offset, skb->protocol)))
		return mace_packet_read_buffer(skb);
	mace_read_ports(packet, skb, offset);
	packet->record.l3_len = 0;
	return mace_record_of(packet, skb);
}

#endif
