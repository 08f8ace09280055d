/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What can be told of a packet by reading it.
 *
 * Mostly a packet was at the hook before on this CPU, and is known again by comparing some words.
 * That much is inline here, because every record passes it; reading is in mace_packet.c.
 */
#ifndef _MACE_PACKET_H
#define _MACE_PACKET_H

#include <linux/if_vlan.h>
#include <linux/percpu.h>
#include <linux/skbuff.h>

#include "mace_compat.h"
#include "uapi/mace.h"

#define MACE_VXLAN_PORTS_MAX 4

extern unsigned short mace_vxlan_ports[MACE_VXLAN_PORTS_MAX];
extern unsigned int mace_vxlan_port_count;

/*
 * Zeroes of a length that the compiler knows. It makes a "rep stos" of a memset() of more than 32
 * bytes, whose start costs more than these few stores.
 */
static __always_inline void mace_clear(void *memory, size_t bytes)
{
	u64 *words = memory;
	size_t i;

#pragma GCC unroll 8
	for (i = 0; i < bytes / sizeof(*words); i++)
		WRITE_ONCE(words[i], 0);
}

/* IPv6, TCP with timestamps and 16 bytes of payload are 88. */
#define MACE_KNOWN_BYTES 96
/* A UDP datagram of 4 bytes. */
#define MACE_KNOWN_BYTES_MIN 32
/* No protocol: nothing is known. */
#define MACE_KNOWN_NOTHING 0x10000

/**
 * struct mace_word - eight bytes of a packet
 *
 * @bytes: as they were
 * @mask: which of them are compared
 */
struct mace_word {
	u64 bytes;
	u64 mask;
};

/**
 * struct mace_known - a packet that was read on a CPU
 *
 * If all bytes that matter are the same, so is what they say: a comparison instead of reading
 * headers and hashing. Those that NAT and routing rewrite do not matter; but ports and
 * identifiers, which a record tells, are read anew.
 *
 * @record: what the bytes tell, and skb_id, @skb's; all other fields are a probe's
 * @skb: the buffer that it was in at the last hook, or NULL
 * @protocol: of the network layer, in network byte order; or MACE_KNOWN_NOTHING
 * @bytes: that are compared, from the network layer's header on, at least MACE_KNOWN_BYTES_MIN
 * @ports: offset of l4_src and l4_dst, or 0
 * @shape: of packets that have the same masks
 * @flags: what the bytes tell of mace_record.flags
 * @last: the last eight of them, which may overlap the word before
 * @words: the others, one after the other
 */
struct mace_known {
	struct mace_record record;
	const struct sk_buff *skb;
	u32 protocol;
	u32 bytes;
	u32 ports;
	u32 shape;
	u8 flags;
	struct mace_word last;
	struct mace_word words[MACE_KNOWN_BYTES / sizeof(u64)];
};

/**
 * struct mace_known_cpu - what a CPU knows
 *
 * @latest: which of @packets was seen last
 * @packets: two, because a request and its reply are handled in turn
 * @nothing: of a buffer that is no packet
 */
struct mace_known_cpu {
	struct mace_known *latest;
	struct mace_known packets[2];
	struct mace_known nothing;
};

DECLARE_PER_CPU(struct mace_known_cpu, mace_known);

static __always_inline u64 mace_differs(const struct mace_word *word, const void *bytes)
{
	return (get_unaligned((const u64 *)bytes) ^ word->bytes) & word->mask;
}

/* Whether @known's bytes begin at @at, where at least as many can be read. */
static __always_inline bool mace_is_same(const struct mace_known *known, const unsigned char *at)
{
	const struct mace_word *words = known->words;
	u32 i, bytes = known->bytes;
	u64 differs;

	/* The length and IPv4's identification: mostly enough to tell another packet. */
	if (mace_differs(words, at))
		return false;
	differs = mace_differs(&known->last, at + bytes - 8);
	differs |= mace_differs(words + 1, at + 8) | mace_differs(words + 2, at + 16);
	/* An echo or a datagram over IPv4 has 44. */
	if (bytes > 32)
		differs |= mace_differs(words + 3, at + 24);
	if (bytes > 40)
		differs |= mace_differs(words + 4, at + 32);
	for (i = 5; unlikely(bytes > (i + 1) * 8); i++)
		differs |= mace_differs(words + i, at + i * 8);
	return !differs;
}

static __always_inline void mace_read_ports(struct mace_known *known, const struct sk_buff *skb,
					    int offset)
{
	const u8 *ports = skb->data + offset + known->ports;

	if (likely(known->ports)) {
		known->record.l4_src = get_unaligned_be16(ports);
		known->record.l4_dst = get_unaligned_be16(ports + 2);
	}
}

struct mace_known *mace_packet_read_other(const struct sk_buff *skb, int l3_offset);
struct mace_known *mace_packet_read_buffer(const struct sk_buff *skb);
void mace_packet_init(void);

/**
 * mace_packet_read_device() - read a packet that is at a device
 * @skb: the packet
 * @l3_offset: where the network layer begins, from skb->data
 *
 * Context: interrupts off. Return: what is known of it, until the next call on this CPU. The
 * record's l3_len, vlan and flags are set, and all that the packet's bytes tell; other fields are
 * what they were.
 */
static __always_inline struct mace_known *mace_packet_read_device(const struct sk_buff *skb,
								  int l3_offset)
{
	struct mace_known *known = this_cpu_read(mace_known.latest);

	/* As an unsigned number, a negative offset is beyond any buffer's end. */
	if (unlikely(skb_vlan_tag_present(skb) || (__force u16)skb->protocol != known->protocol ||
		     (u64)(u32)l3_offset + known->bytes > skb_headlen(skb) ||
		     !mace_is_same(known, skb->data + l3_offset)))
		return mace_packet_read_other(skb, l3_offset);
	mace_read_ports(known, skb, l3_offset);
	known->record.l3_len = skb->len - l3_offset;
	known->record.vlan = 0;
	known->record.flags = known->flags;
	return known;
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
static __always_inline struct mace_known *mace_packet_read_any(const struct sk_buff *skb)
{
	struct mace_known *known = this_cpu_read(mace_known.latest);
	int offset = skb_network_offset(skb);

	if (unlikely((__force u16)skb->protocol != known->protocol || !skb->head ||
		     !skb->network_header || offset + (int)known->bytes > (int)skb_headlen(skb) ||
		     !mace_is_same(known, skb_network_header(skb))))
		return mace_packet_read_buffer(skb);
	mace_read_ports(known, skb, offset);
	known->record.l3_len = 0;
	known->record.vlan = 0;
	known->record.flags = known->flags;
	return known;
}

#endif
