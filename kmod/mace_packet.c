// SPDX-License-Identifier: GPL-2.0-only
/*
 * Reading packets: the fields of a record, and its packet_key.
 *
 * The key is a hash of what stays the same while a packet crosses a host: not addresses, ports,
 * ICMP identifiers, checksums or TTL, which NAT and routing rewrite. It is made of
 *
 *	IP		version, length, IPv4 identification, protocol after extension headers,
 *			fragment offset
 *	TCP		sequence number, the one acknowledged, flags, the first 16 bytes of payload
 *	UDP		length, the first 16 bytes of payload
 *	ICMP, ICMPv6	type, code, sequence number, the first 16 bytes of payload of an echo. Of
 *			an error the first 8 of the packet it quotes: NAT rewrites the rest
 *	SCTP		verification tag, the first 16 bytes of chunks
 *	other		the first 16 bytes
 *	not IP		EtherType, the first 24 bytes
 *
 * and of a packet that carries another one (VXLAN, Geneve, GRE, IP in IP), of the packet inside, so
 * that it survives encapsulation. One layer is taken off: a tunnel in a tunnel is payload. The hash
 * (uapi/mace_key.h) has no secret: two hosts give one packet the same key. What the packet_key
 * cannot survive, because it makes other packets of it: segmentation, receive coalescing,
 * fragmentation and reassembly, and NAT helpers that rewrite payload.
 *
 * A packet that was read is remembered, by the bytes that were read of it: the headers' words that
 * were looked at, each with its mask, and the payload. Reading goes through mace_take_bits() and
 * mace_take_payload() alone, which note what they return, so that the result is a function of what
 * was noted. If at a later hook every one of those bytes is the same, so is the record: whichever
 * buffer, namespace or session the packet is in then. A stale answer cannot be had, because bytes
 * are compared and not their places; what was decided by something else (bytes that are missing,
 * or the length of the buffer) is not remembered. A packet's entry is found by where its
 * data is, so that the packets of a burst do not take each other's place.
 *
 * Everything here runs in probes: no sleeping, no allocation, and no byte beyond bounds counts. Of
 * short payload more bytes are loaded than there are, where memory is known to follow.
 */
#include <linux/icmp.h>
#include <linux/if_ether.h>
#include <linux/if_vlan.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/mm.h>
#include <linux/random.h>
#include <linux/siphash.h>
#include <linux/slab.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <net/ip.h>
#include <net/ipv6.h>

#include "mace_compat.h"
#include "mace_packet.h"

/* Enough for any that hosts send; a hostile chain is cut here. */
#define MACE_EXTENSION_HEADERS_MAX 6
/* UDP's header and an echo's; more is often in a page. */
#define MACE_PLAIN_BYTES 8

unsigned short mace_vxlan_ports[MACE_TUNNEL_PORTS_MAX] = { 4789, 8472 };
unsigned int mace_vxlan_port_count = 2;
unsigned short mace_geneve_ports[MACE_TUNNEL_PORTS_MAX] = { 6081 };
unsigned int mace_geneve_port_count = 1;

/* Bit n: a port of those is n modulo 64, so that most datagrams need no further look. */
static u64 mace_tunnel_port_bits __read_mostly;

/* Drawn at each load: a skb_id does not give away the buffer's address. */
static siphash_key_t mace_skb_key __read_mostly;

DEFINE_PER_CPU(struct mace_packets *, mace_packets);
DEFINE_PER_CPU(struct mace_packet *, mace_last_packet);
static DEFINE_PER_CPU(u64[MACE_PAYLOAD_BYTES / sizeof(u64)], mace_peeked);

/* --- bytes ------------------------------------------------------------------------ */

/**
 * struct mace_reader - a packet that is being read
 *
 * Offsets are from the network layer's header.
 *
 * @skb: the buffer
 * @packet: where it is noted what was read
 * @at: the network layer's header, if it is in place
 * @offset: the same, from skb->data; may be negative
 * @in_place: bytes that are in the buffer's linear part
 * @bytes: all that there are
 * @noted: whether all that decided anything is noted
 * @noted_bytes: how many from @at on that is
 * @reads: of @packet
 * @payload: of @packet
 * @payload_bytes: likewise
 * @content: likewise
 * @content_mask: likewise
 */
struct mace_reader {
	const struct sk_buff *skb;
	struct mace_packet *packet;
	const u8 *at;
	int offset;
	int in_place;
	int bytes;
	bool noted;
	int noted_bytes;
	unsigned int reads;
	int payload;
	int payload_bytes;
	u64 content[2];
	u64 content_mask[2];
};

/**
 * mace_peek_elsewhere() - bytes that are neither all in the linear part nor all in the first page
 * @skb: the buffer
 * @offset: of the first, from skb->data
 * @len: how many, at most MACE_PAYLOAD_BYTES
 *
 * Context: interrupts off. Return: a copy until the next call on this CPU, of MACE_PAYLOAD_BYTES,
 * with zeros behind @len; NULL if there are no such bytes.
 */
noinline const void *mace_peek_elsewhere(const struct sk_buff *skb, int offset, int len)
{
	u64 *copy = (u64 *)this_cpu_ptr(mace_peeked);

	copy[0] = 0;
	copy[1] = 0;
	return skb_copy_bits(skb, offset, copy, len) ? NULL : copy;
}

/* The bits of the eight bytes from @at on that are before @len. */
static __always_inline u64 mace_mask_before(int at, int len)
{
	if (len >= at + 8)
		return ~0ULL;
	return len > at ? (__force u64)cpu_to_be64(~0ULL << (64 - 8 * (len - at))) : 0;
}

/* Whether there are @len bytes at @offset. */
static __always_inline bool mace_has(struct mace_reader *reader, int offset, int len)
{
	if (likely(offset + len <= reader->in_place) || offset + len <= reader->bytes)
		return true;
	reader->noted = false;
	return false;
}

/* Bytes that nothing is noted of: not in place, or too many. */
static noinline u64 mace_take_unnoted(const struct sk_buff *skb, int offset)
{
	__be64 bytes = 0;

	/* mace_has() them, unless this kernel cannot read them. */
	return skb_copy_bits(skb, offset, &bytes, sizeof(bytes)) ? 0 : be64_to_cpu(bytes);
}

/* Of the number that the eight bytes at @offset are, the bits of @mask. mace_has() them. */
static __always_inline u64 mace_take_bits(struct mace_reader *reader, int offset, u64 mask)
{
	struct mace_packet *packet = reader->packet;
	__be64 value;

	if (unlikely(offset + 8 > reader->in_place || reader->reads >= MACE_READS_MAX)) {
		reader->noted = false;
		return mace_take_unnoted(reader->skb, reader->offset + offset) & mask;
	}
	value = get_unaligned((const __be64 *)(reader->at + offset));
	packet->offset[reader->reads] = offset;
	packet->value[reader->reads] = (__force u64)value;
	packet->mask[reader->reads] = (__force u64)cpu_to_be64(mask);
	reader->reads++;
	reader->noted_bytes = max(reader->noted_bytes, offset + 8);
	return be64_to_cpu(value) & mask;
}

/* The number that @len bytes at @offset are. mace_has() them, and before them what eight need. */
static __always_inline u64 mace_take(struct mace_reader *reader, int offset, int len)
{
	return mace_take_bits(reader, offset + len - 8, ~0ULL >> (64 - 8 * len));
}

/* --- headers ---------------------------------------------------------------------- */

/**
 * struct mace_headers - what the headers of a packet say
 *
 * @first: see struct mace_words
 * @second: likewise
 * @end: offset of the first byte behind the packet: what follows is the link layer's padding
 * @payload: offset of the payload that is part of the key, or 0
 * @payload_bytes: how many of it, at most; MACE_PAYLOAD_BYTES or less
 * @ports: offset of l4_src and l4_dst, or 0
 * @inner: offset of a packet that this one carries, or 0
 * @inner_protocol: its EtherType; ETH_P_TEB: an Ethernet frame
 * @flags: MACE_FLAG_*
 */
struct mace_headers {
	u64 first;
	u64 second;
	int end;
	int payload;
	int payload_bytes;
	int ports;
	int inner;
	u16 inner_protocol;
	u8 flags;
};

static __always_inline void mace_has_payload(struct mace_headers *headers, int offset, int bytes)
{
	headers->payload = offset;
	headers->payload_bytes = min(bytes, headers->end - offset);
}

static __always_inline void mace_read_tcp(struct mace_reader *reader, int offset,
					  struct mace_headers *headers)
{
	u64 bits;

	if (!mace_has(reader, offset, sizeof(struct tcphdr)))
		return;
	headers->flags |= MACE_FLAG_FLOW;
	headers->ports = offset;
	headers->second = mace_take(reader, offset + offsetof(struct tcphdr, seq), 8);
	bits = mace_take(reader, offset + 12, 2);
	headers->first |= (bits & 0xff) << 40;
	mace_has_payload(headers, offset + (bits >> 12) * 4, MACE_PAYLOAD_BYTES);
}

static __always_inline bool mace_is_among(const unsigned short *ports, unsigned int count, u16 port)
{
	unsigned int i;

	for (i = 0; i < count; i++)
		if (ports[i] == port)
			return true;
	return false;
}

static __always_inline void mace_carries(struct mace_headers *headers, int offset, u16 protocol)
{
	if (protocol != ETH_P_IP && protocol != ETH_P_IPV6 && protocol != ETH_P_TEB)
		return;
	headers->inner = offset;
	headers->inner_protocol = protocol;
}

static __always_inline void mace_read_tunnel_in_udp(struct mace_reader *reader, int offset,
						    u16 port, struct mace_headers *headers)
{
	u32 head;

	if (mace_is_among(mace_vxlan_ports, mace_vxlan_port_count, port)) {
		if (!mace_has(reader, offset, 8))
			return;
		/* One read has the flags, and what the last one had of UDP's header. */
		if (likely(reader->noted))
			reader->reads--;
		head = mace_take_bits(reader, offset - 7, 0x00ffffffff0000ffULL);
		/* RFC 7348, section 5: of the flags only "I", a valid VNI, and that one is set. */
		if ((head & 0xff) == 0x08)
			mace_carries(headers, offset + 8, ETH_P_TEB);
	} else if (mace_is_among(mace_geneve_ports, mace_geneve_port_count, port)) {
		if (!mace_has(reader, offset, 8))
			return;
		/* RFC 8926, section 3.4: version 0, no control message ("O"); length of options. */
		head = mace_take(reader, offset, 4);
		if (!(head & 0xc0800000))
			mace_carries(headers, offset + 8 + (head >> 24) * 4, head & 0xffff);
	}
}

/* Return: whether the port may be a tunnel's. */
static __always_inline bool mace_read_udp(struct mace_reader *reader, int offset,
					  struct mace_headers *headers)
{
	u32 head;

	if (!mace_has(reader, offset, sizeof(struct udphdr)))
		return false;
	headers->flags |= MACE_FLAG_FLOW;
	headers->ports = offset;
	/* The destination says whether to look for a tunnel. */
	head = mace_take(reader, offset + offsetof(struct udphdr, dest), 4);
	headers->second = (u64)(head & 0xffff) << 32;
	offset += sizeof(struct udphdr);
	mace_has_payload(headers, offset, MACE_PAYLOAD_BYTES);
	if (likely(!(mace_tunnel_port_bits >> (head >> 16) % 64 & 1)))
		return false;
	mace_read_tunnel_in_udp(reader, offset, head >> 16, headers);
	return true;
}

static __always_inline void mace_read_icmp(struct mace_reader *reader, int offset, int version,
					   struct mace_headers *headers)
{
	bool echo;
	u64 head;
	u8 type;

	if (!mace_has(reader, offset, sizeof(struct icmphdr)))
		return;
	/* Neither checksum nor identifier. */
	head = mace_take_bits(reader, offset, 0xffff00000000ffffULL);
	type = head >> 56;
	echo = version == 4 ? type == ICMP_ECHO || type == ICMP_ECHOREPLY :
			      type == 128 || type == 129; /* RFC 4443, section 4 */
	headers->first |= head >> 48 << 32;
	if (echo) {
		headers->flags |= MACE_FLAG_FLOW;
		headers->ports = offset + offsetof(struct icmphdr, un.echo.id);
		headers->second = head & 0xffff;
	}
	mace_has_payload(headers, offset + sizeof(struct icmphdr), echo ? MACE_PAYLOAD_BYTES : 8);
}

/* RFC 9260, section 3.1 */
static __always_inline void mace_read_sctp(struct mace_reader *reader, int offset,
					   struct mace_headers *headers)
{
	if (!mace_has(reader, offset, 12))
		return;
	headers->flags |= MACE_FLAG_FLOW;
	headers->ports = offset;
	headers->second = mace_take(reader, offset + 4, 4) << 32;
	mace_has_payload(headers, offset + 12, MACE_PAYLOAD_BYTES);
}

/* RFC 2784, section 2, and RFC 2890, section 2 */
static __always_inline void mace_read_gre(struct mace_reader *reader, int offset,
					  struct mace_headers *headers)
{
	u32 head;

	mace_has_payload(headers, offset, MACE_PAYLOAD_BYTES);
	if (!mace_has(reader, offset, 4))
		return;
	head = mace_take(reader, offset, 4);
	/* Neither routing, which is of the past, nor another version, as that of PPTP. */
	if (head & 0x40070000)
		return;
	offset += 4;
	offset += head & 0x80000000 ? 4 : 0; /* checksum */
	offset += head & 0x20000000 ? 4 : 0; /* key */
	offset += head & 0x10000000 ? 4 : 0; /* sequence number */
	mace_carries(headers, offset, head & 0xffff);
}

/* What an IP packet carries at @offset; @fragment_offset in bytes. */
static __always_inline void mace_read_upper(struct mace_reader *reader, int offset, int version,
					    u16 fragment_offset, struct mace_headers *headers)
{
	if (fragment_offset) {
		mace_has_payload(headers, offset, MACE_PAYLOAD_BYTES);
		return;
	}
	switch (headers->first >> 48 & 0xff) {
	case IPPROTO_TCP:
		mace_read_tcp(reader, offset, headers);
		break;
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
		mace_read_udp(reader, offset, headers);
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		mace_read_icmp(reader, offset, version, headers);
		break;
	case IPPROTO_SCTP:
		mace_read_sctp(reader, offset, headers);
		break;
	case IPPROTO_GRE:
		mace_read_gre(reader, offset, headers);
		break;
	case IPPROTO_IPIP:
		mace_has_payload(headers, offset, MACE_PAYLOAD_BYTES);
		mace_carries(headers, offset, ETH_P_IP);
		break;
	case IPPROTO_IPV6:
		mace_has_payload(headers, offset, MACE_PAYLOAD_BYTES);
		mace_carries(headers, offset, ETH_P_IPV6);
		break;
	default:
		mace_has_payload(headers, offset, MACE_PAYLOAD_BYTES);
	}
}

static __always_inline void mace_read_fragment(u16 fragment_offset, struct mace_headers *headers)
{
	headers->flags |= MACE_FLAG_FRAGMENT;
	headers->second = (u64)1 << 63 | fragment_offset;
	headers->inner = 0;
}

/* @length of the packet by its header at @offset, or 0: a TCP segment too long for it (BIG TCP). */
static __always_inline int mace_end(struct mace_reader *reader, int offset, int length)
{
	if (likely(length))
		return offset + length;
	/* As long as its buffer, which nothing notes. */
	reader->noted = false;
	return reader->bytes;
}

/* Without options, and what most protocols have for a header is in place. */
static __always_inline bool mace_is_plain_ipv4(const struct mace_reader *reader)
{
	return reader->in_place >= (int)sizeof(struct iphdr) + MACE_PLAIN_BYTES &&
	       reader->at[0] == 0x45 && get_unaligned((const u16 *)(reader->at + 2));
}

/* The same of IPv6; extension headers are protocols that are not plain. */
static __always_inline bool mace_is_plain_ipv6(const struct mace_reader *reader)
{
	return reader->in_place >= (int)sizeof(struct ipv6hdr) + MACE_PLAIN_BYTES &&
	       reader->at[0] >> 4 == 6 && get_unaligned((const u16 *)(reader->at + 4));
}

/* @plain, where the compiler knows it: mace_is_plain_ipv4(), and the header is all that is read. */
static __always_inline bool mace_read_ipv4(struct mace_reader *reader, int offset, bool plain,
					   struct mace_headers *headers)
{
	u16 fragment, length;
	int ihl;
	u64 head;

	if (!mace_has(reader, offset, sizeof(struct iphdr)))
		return false;
	/* All but the type of service, which routers mark. */
	head = mace_take_bits(reader, offset, 0xff00ffffffffffffULL);
	ihl = plain ? 5 : head >> 56 & 0xf;
	if (!plain && (head >> 60 != 4 || ihl < 5))
		return false;
	length = head >> 32;
	fragment = head;
	/* Length and identification are side by side, there and here. */
	headers->first = 4ULL << 56 | mace_take(reader, offset + 9, 1) << 48 |
			 (head >> 16 & 0xffffffff);
	headers->flags = MACE_FLAG_KEY;
	headers->end = plain || length ? offset + length : mace_end(reader, offset, 0);
	if (plain)
		return true;
	mace_read_upper(reader, offset + ihl * 4, 4, (fragment & IP_OFFSET) * 8, headers);
	if (fragment & (IP_MF | IP_OFFSET))
		mace_read_fragment((fragment & IP_OFFSET) * 8, headers);
	return true;
}

static bool mace_is_extension(u8 proto)
{
	return proto == NEXTHDR_HOP || proto == NEXTHDR_ROUTING || proto == NEXTHDR_FRAGMENT ||
	       proto == NEXTHDR_AUTH || proto == NEXTHDR_DEST;
}

/* @plain: as of mace_read_ipv4(). */
static __always_inline bool mace_read_ipv6(struct mace_reader *reader, int offset, bool plain,
					   struct mace_headers *headers)
{
	u16 length, fragment_offset = 0, id = 0;
	bool fragment = false;
	u64 head;
	u8 proto;
	int i;

	if (!mace_has(reader, offset, sizeof(struct ipv6hdr)))
		return false;
	/* Neither traffic class, flow label nor hop limit. */
	head = mace_take_bits(reader, offset, 0xf0000000ffffff00ULL);
	if (head >> 60 != 6)
		return false;
	length = head >> 16;
	proto = head >> 8;
	offset += sizeof(struct ipv6hdr);
	headers->flags = MACE_FLAG_KEY;
	headers->end = plain ? offset + length : mace_end(reader, offset, length);
	for (i = plain ? MACE_EXTENSION_HEADERS_MAX : 0;
	     i < MACE_EXTENSION_HEADERS_MAX && !fragment_offset; i++) {
		if (!mace_is_extension(proto))
			break;
		if (!mace_has(reader, offset, 8)) {
			offset = 0;
			break;
		}
		head = mace_take(reader, offset, 8);
		if (proto == NEXTHDR_FRAGMENT) {
			fragment = true;
			fragment_offset = head >> 32 & IP6_OFFSET;
			id = head;
			offset += 8;
		} else {
			/* The second byte is a length: RFC 8200, 4.3, and RFC 4302, 2.2. */
			offset += proto == NEXTHDR_AUTH ? ((head >> 48 & 0xff) + 2) * 4 :
							  ((head >> 48 & 0xff) + 1) * 8;
		}
		proto = head >> 56;
	}
	headers->first = 6ULL << 56 | (u64)proto << 48 | (u64)length << 16 | id;
	if (plain)
		return true;
	if (offset)
		mace_read_upper(reader, offset, 6, fragment_offset, headers);
	if (fragment)
		mace_read_fragment(fragment_offset, headers);
	return true;
}

static __always_inline struct mace_headers mace_read_ip(struct mace_reader *reader, int offset,
							u16 protocol)
{
	struct mace_headers headers = {};

	if (protocol == ETH_P_IP)
		mace_read_ipv4(reader, offset, false, &headers);
	else if (protocol == ETH_P_IPV6)
		mace_read_ipv6(reader, offset, false, &headers);
	return headers;
}

/* --- the key's words -------------------------------------------------------------- */

/* Eight bytes as they are. */
static __always_inline u64 mace_take_word(struct mace_reader *reader, int offset)
{
	return (__force u64)cpu_to_be64(mace_take(reader, offset, 8));
}

static __always_inline void mace_take_payload(struct mace_reader *reader,
					      const struct mace_headers *headers)
{
	int offset = headers->payload, bytes = headers->payload_bytes;
	const u8 *payload = reader->at + offset;

	if (!offset || bytes <= 0 || !mace_has(reader, offset, bytes))
		return;
	if (offset + bytes > reader->in_place) {
		payload = mace_in_first_page(reader->skb, offset - reader->in_place, bytes);
		if (unlikely(!payload))
			payload = mace_peek_elsewhere(reader->skb, reader->offset + offset, bytes);
		if (unlikely(!payload)) {
			reader->noted = false;
			return;
		}
	}
	reader->payload = offset;
	reader->payload_bytes = bytes;
	reader->content_mask[0] = ~0ULL;
	reader->content_mask[1] = ~0ULL;
	if (unlikely(bytes < MACE_PAYLOAD_BYTES)) {
		reader->content_mask[0] = mace_mask_before(0, bytes);
		reader->content_mask[1] = mace_mask_before(8, bytes);
	}
	/* In place, as in a page, what is behind may be loaded: see mace_is_same(). */
	reader->content[0] = get_unaligned((const u64 *)payload) & reader->content_mask[0];
	reader->content[1] = get_unaligned((const u64 *)(payload + 8)) & reader->content_mask[1];
}

/* The words of what is not IP; its content is among what was noted. */
static __always_inline bool mace_take_other(struct mace_reader *reader, int offset, u16 protocol,
					    struct mace_words *words)
{
	if (!mace_has(reader, offset, 3 * sizeof(u64)))
		return false;
	words->first = protocol;
	words->second = mace_take_word(reader, offset);
	words->payload = mace_take_word(reader, offset + 8);
	words->payload2 = mace_take_word(reader, offset + 16);
	return true;
}

static __always_inline struct mace_words mace_words_of(const struct mace_reader *reader,
						       const struct mace_headers *headers)
{
	return (struct mace_words){
		.first = headers->first,
		.second = headers->second,
		.payload = reader->content[0],
		.payload2 = reader->content[1],
	};
}

/*
 * Find the packet that @outer carries, behind the head of its frame if it is in one. @plain: a tag
 * is not passed.
 */
static __always_inline bool mace_find_inner(struct mace_reader *reader,
					    const struct mace_headers *outer, bool plain,
					    int *offset, u16 *protocol)
{
	int i;

	*offset = outer->inner;
	*protocol = outer->inner_protocol;
	if (*protocol != ETH_P_TEB)
		return true;
	if (!mace_has(reader, *offset, ETH_HLEN))
		return false;
	*protocol = mace_take(reader, *offset + offsetof(struct ethhdr, h_proto), 2);
	*offset += ETH_HLEN;
	for (i = plain ? 2 : 0; i < 2 && unlikely(eth_type_vlan(htons(*protocol))); i++) {
		if (!mace_has(reader, *offset, VLAN_HLEN))
			break;
		*protocol = mace_take(reader, *offset + 2, 2);
		*offset += VLAN_HLEN;
	}
	return true;
}

/* Compare what @last has noted with what is @at, and note it of @reader's packet as well. */
static __always_inline u64 mace_note_again(struct mace_reader *reader,
					   const struct mace_packet *last, int read, int offset)
{
	u64 value = get_unaligned((const u64 *)(reader->at + offset + last->offset[read]));
	struct mace_packet *packet = reader->packet;
	u64 mask = last->mask[read];

	packet->offset[reader->reads] = offset + last->offset[read];
	packet->value[reader->reads] = value;
	packet->mask[reader->reads] = mask;
	reader->reads++;
	return (value ^ last->value[read]) & mask;
}

/*
 * Whether what is at @offset is the packet of the last hook: it went into a tunnel. What it was
 * read by is what the tunnel's is read by, and its key is the tunnel's. A tunnel itself would be
 * only payload here, and what is not IP may be none. As mace_is_same(), but what is compared is
 * noted.
 */
static __always_inline bool mace_take_last(struct mace_reader *reader,
					   const struct mace_packet *last, int offset, u16 protocol)
{
	int in_place = reader->in_place - offset, i = MACE_READS_MIN;
	const u8 *payload = reader->at + offset + last->payload;
	u64 differs;

	/* What cannot be remembered has no protocol; what is not IP has no version. */
	if (last == reader->packet || (__force u16)htons(protocol) != last->protocol ||
	    !last->record.ip_version ||
	    (last->record.flags & (MACE_FLAG_KEY | MACE_FLAG_TUNNEL)) != MACE_FLAG_KEY ||
	    reader->reads + last->reads > MACE_READS_MAX)
		return false;
	if (last->whole > in_place) {
		if (last->in_place > in_place)
			return false;
		payload = mace_payload_elsewhere(last, reader->skb, reader->at + offset, in_place);
		if (unlikely(!payload))
			return false;
	}
	differs = (get_unaligned((const u64 *)payload) ^ last->content[0]) & last->content_mask[0];
	differs |= (get_unaligned((const u64 *)(payload + 8)) ^ last->content[1]) &
		   last->content_mask[1];
	differs |= mace_note_again(reader, last, 0, offset);
	differs |= mace_note_again(reader, last, 1, offset);
	differs |= mace_note_again(reader, last, 2, offset);
	/* What only fills up, none has to compare. */
	if (last->mask[3])
		differs |= mace_note_again(reader, last, 3, offset);
	for (; unlikely(i < last->reads); i++)
		differs |= mace_note_again(reader, last, i, offset);
	if (differs)
		return false;
	reader->noted_bytes = max(reader->noted_bytes, offset + last->in_place);
	reader->payload = last->payload ? offset + last->payload : 0;
	reader->payload_bytes = last->payload_bytes;
	reader->content[0] = last->content[0];
	reader->content[1] = last->content[1];
	reader->content_mask[0] = last->content_mask[0];
	reader->content_mask[1] = last->content_mask[1];
	return true;
}

/* The words of the packet that @outer carries, if it can be read. */
static __always_inline bool mace_take_inner(struct mace_reader *reader,
					    const struct mace_headers *outer,
					    struct mace_words *words)
{
	struct mace_headers headers;
	u16 protocol;
	int offset;

	if (!mace_find_inner(reader, outer, false, &offset, &protocol))
		return false;
	headers = mace_read_ip(reader, offset, protocol);
	if (!headers.flags)
		return outer->inner_protocol == ETH_P_TEB &&
		       mace_take_other(reader, offset, protocol, words);
	mace_take_payload(reader, &headers);
	*words = mace_words_of(reader, &headers);
	return true;
}

/* --- packets ---------------------------------------------------------------------- */

static __always_inline struct mace_reader mace_reader_of(struct mace_packet *packet,
							 const struct sk_buff *skb, int offset)
{
	return (struct mace_reader){
		.skb = skb,
		.packet = packet,
		.at = skb->data + offset,
		.offset = offset,
		.in_place = (int)skb_headlen(skb) - offset,
		.bytes = (int)skb->len - offset,
		.noted = true,
	};
}

/* The packet of @reader is read: all of it but who it is in. */
static __always_inline void mace_is_read(const struct mace_reader *reader,
					 const struct mace_headers *headers, __be16 protocol,
					 u8 version, u8 proto, u8 flags, u64 key)
{
	struct mace_packet *packet = reader->packet;
	struct mace_record *record = &packet->record;
	const u8 *ports = reader->at + headers->ports;
	unsigned int reads;

	if (likely(headers->ports + 4 <= reader->in_place)) {
		mace_set_ports(packet, ports);
	} else {
		ports = mace_peek_elsewhere(reader->skb, reader->offset + headers->ports, 4);
		if (ports)
			mace_set_ports(packet, ports);
	}
	if (!headers->ports || !ports) {
		record->l4_src = 0;
		record->l4_dst = 0;
	}
	record->ip_version = version;
	record->l4_proto = proto;
	record->flags = flags;
	record->l4_bits = headers->first >> 40;
	record->ip_id = version == 4 ? headers->first : 0;
	record->l4_seq = 0;
	if (flags & MACE_FLAG_FRAGMENT)
		record->l4_seq = headers->second; /* without the uppermost bit */
	else if (proto == IPPROTO_TCP || proto == IPPROTO_SCTP)
		record->l4_seq = headers->second >> 32;
	record->packet_key = key;

	packet->content[0] = reader->content[0];
	packet->content[1] = reader->content[1];
	packet->content_mask[0] = reader->content_mask[0];
	packet->content_mask[1] = reader->content_mask[1];
	packet->protocol = reader->noted ? (__force u16)protocol : MACE_PROTOCOL_NONE;
	packet->in_place = reader->noted_bytes;
	packet->payload = reader->payload;
	packet->payload_bytes = reader->payload_bytes;
	packet->whole = max(reader->noted_bytes, reader->payload + reader->payload_bytes);
	packet->ports = headers->ports;
	/* mace_is_same() compares as many. */
	for (reads = reader->reads; reads < MACE_READS_MIN || reads % 2; reads++) {
		packet->offset[reads] = 0;
		packet->mask[reads] = 0;
	}
	packet->reads = reads;
}

/* Read @packet anew. All in one function, so that the compiler can have the reader in registers. */
static noinline void mace_read_anew(struct mace_packet *packet, const struct sk_buff *skb,
				    int offset, __be16 protocol)
{
	struct mace_reader reader = mace_reader_of(packet, skb, offset);
	struct mace_headers headers = mace_read_ip(&reader, 0, ntohs(protocol));
	struct mace_words words;
	u8 flags = headers.flags;

	if (unlikely(!flags)) {
		if (mace_take_other(&reader, 0, ntohs(protocol), &words))
			flags = MACE_FLAG_KEY;
	} else if (unlikely(headers.inner) && mace_take_inner(&reader, &headers, &words)) {
		flags |= MACE_FLAG_TUNNEL;
	} else {
		mace_take_payload(&reader, &headers);
		words = mace_words_of(&reader, &headers);
	}
	mace_is_read(&reader, &headers, protocol, headers.first >> 56, headers.first >> 48, flags,
		     flags & MACE_FLAG_KEY ? mace_key(&words) : 0);
}

/* The rest of a packet without another one in it. */
static __always_inline bool mace_read_plain_payload(struct mace_reader *reader,
						    const struct mace_headers *headers, u8 version,
						    u8 proto)
{
	struct mace_words words;

	mace_take_payload(reader, headers);
	if (unlikely(!reader->noted))
		return false;
	words = mace_words_of(reader, headers);
	mace_is_read(reader, headers, htons(version == 4 ? ETH_P_IP : ETH_P_IPV6), version, proto,
		     headers->flags, mace_key(&words));
	return true;
}

/* The rest of one that carries that of the last hook, or none. */
static __always_inline bool mace_read_tunnel(struct mace_reader *reader,
					     const struct mace_headers *headers, u8 proto,
					     const struct mace_packet *last)
{
	u16 protocol;
	int offset;

	if (!headers->inner || !mace_find_inner(reader, headers, true, &offset, &protocol) ||
	    !reader->noted || !mace_take_last(reader, last, offset, protocol))
		return false;
	mace_is_read(reader, headers, htons(ETH_P_IP), 4, proto, headers->flags | MACE_FLAG_TUNNEL,
		     last->record.packet_key);
	return true;
}

/* The same, where @inner and @reads are mostly where the packet is and how many reads told so. */
static __always_inline bool mace_read_plain_tunnel(struct mace_reader *reader,
						   struct mace_headers *headers, u8 proto,
						   const struct mace_packet *last, int inner,
						   unsigned int reads, u16 protocol)
{
	if (headers->inner != inner || reader->reads != reads || !reader->noted ||
	    headers->inner_protocol != protocol)
		return mace_read_tunnel(reader, headers, proto, last);
	/* So that the compiler knows as well. */
	headers->inner = inner;
	headers->inner_protocol = protocol;
	reader->reads = reads;
	reader->noted = true;
	return mace_read_tunnel(reader, headers, proto, last);
}

/* A later fragment, or the first one of a datagram. */
static __always_inline bool mace_read_plain_fragment(struct mace_reader *reader,
						     struct mace_headers *headers, u16 fragment)
{
	const int upper = sizeof(struct iphdr);
	u8 proto = headers->first >> 48;

	if (fragment & IP_OFFSET)
		mace_has_payload(headers, upper, MACE_PAYLOAD_BYTES);
	else if (proto == IPPROTO_UDP)
		mace_read_udp(reader, upper, headers);
	else
		return false;
	mace_read_fragment((fragment & IP_OFFSET) * 8, headers);
	return mace_read_plain_payload(reader, headers, 4, proto);
}

/*
 * mace_read_anew() for most packets: where all is in its usual place, the compiler knows offsets,
 * masks and how many reads there are. @last is the packet of the last hook. Return: false: @packet
 * is none of these, and not read.
 */
static __always_inline bool mace_read_plain_ipv4(struct mace_packet *packet,
						 const struct mace_packet *last,
						 const struct sk_buff *skb, int offset)
{
	struct mace_reader reader = mace_reader_of(packet, skb, offset);
	const int upper = sizeof(struct iphdr);
	struct mace_headers headers = {};
	u16 fragment;

	if (!mace_is_plain_ipv4(&reader))
		return false;
	mace_read_ipv4(&reader, 0, true, &headers);
	fragment = get_unaligned_be16(reader.at + offsetof(struct iphdr, frag_off));
	if (unlikely(fragment & (IP_MF | IP_OFFSET)))
		return mace_read_plain_fragment(&reader, &headers, fragment);
	switch (headers.first >> 48 & 0xff) {
	case IPPROTO_TCP:
		if (reader.in_place < upper + (int)sizeof(struct tcphdr))
			return false;
		mace_read_tcp(&reader, upper, &headers);
		return mace_read_plain_payload(&reader, &headers, 4, IPPROTO_TCP);
	case IPPROTO_UDP:
		if (likely(!mace_read_udp(&reader, upper, &headers)))
			return mace_read_plain_payload(&reader, &headers, 4, IPPROTO_UDP);
		if (!headers.inner)
			return mace_read_plain_payload(&reader, &headers, 4, IPPROTO_UDP);
		/* VXLAN, or Geneve without options, with a frame in it */
		if (reader.reads == 3)
			return mace_read_plain_tunnel(&reader, &headers, IPPROTO_UDP, last,
						      upper + 16, 3, ETH_P_TEB);
		return mace_read_plain_tunnel(&reader, &headers, IPPROTO_UDP, last, upper + 16, 4,
					      ETH_P_TEB);
	case IPPROTO_ICMP:
		mace_read_icmp(&reader, upper, 4, &headers);
		/* An echo; errors are rare. */
		return headers.ports && mace_read_plain_payload(&reader, &headers, 4, IPPROTO_ICMP);
	case IPPROTO_GRE:
		mace_read_gre(&reader, upper, &headers);
		if (headers.inner_protocol == ETH_P_IP)
			return mace_read_plain_tunnel(&reader, &headers, IPPROTO_GRE, last,
						      upper + 4, 3, ETH_P_IP);
		return mace_read_tunnel(&reader, &headers, IPPROTO_GRE, last);
	case IPPROTO_IPIP:
		mace_carries(&headers, upper, ETH_P_IP);
		return mace_read_tunnel(&reader, &headers, IPPROTO_IPIP, last);
	default:
		return false;
	}
}

/* The same of IPv6; what is in a tunnel is read by mace_read_anew(). */
static __always_inline bool mace_read_plain_ipv6(struct mace_packet *packet,
						 const struct sk_buff *skb, int offset)
{
	struct mace_reader reader = mace_reader_of(packet, skb, offset);
	const int upper = sizeof(struct ipv6hdr);
	struct mace_headers headers = {};

	if (!mace_is_plain_ipv6(&reader))
		return false;
	mace_read_ipv6(&reader, 0, true, &headers);
	switch (headers.first >> 48 & 0xff) {
	case IPPROTO_TCP:
		if (reader.in_place < upper + (int)sizeof(struct tcphdr))
			return false;
		mace_read_tcp(&reader, upper, &headers);
		return mace_read_plain_payload(&reader, &headers, 6, IPPROTO_TCP);
	case IPPROTO_UDP:
		mace_read_udp(&reader, upper, &headers);
		return !headers.inner && mace_read_plain_payload(&reader, &headers, 6, IPPROTO_UDP);
	default:
		return false;
	}
}

static __always_inline bool mace_read_plain(struct mace_packet *packet,
					    const struct mace_packet *last,
					    const struct sk_buff *skb, int offset, __be16 protocol)
{
	if (likely(protocol == htons(ETH_P_IP)))
		return mace_read_plain_ipv4(packet, last, skb, offset);
	return protocol == htons(ETH_P_IPV6) && mace_read_plain_ipv6(packet, skb, offset);
}

/* mace_identify(), where it is part of reading. */
static __always_inline void mace_identify_here(struct mace_packet *packet,
					       const struct sk_buff *skb)
{
	struct mace_identified *identified = this_cpu_read(mace_packets)->identified +
					     hash_ptr((void *)skb, MACE_IDENTIFIED_BITS);

	if (unlikely(identified->skb != skb)) {
		identified->skb = skb;
		identified->skb_id = siphash_1u64((unsigned long)skb, &mace_skb_key);
	}
	packet->skb = skb;
	packet->record.skb_id = identified->skb_id;
}

/**
 * mace_identify() - note that a packet is in this buffer now
 * @packet: the packet
 * @skb: the buffer
 *
 * Context: interrupts off.
 */
noinline void mace_identify(struct mace_packet *packet, const struct sk_buff *skb)
{
	mace_identify_here(packet, skb);
}

/*
 * The packet that was in this data last, or the one before, or the last one in any, or another.
 * @compared: it is known not to be the one that was there last.
 */
static __always_inline struct mace_packet *mace_read(struct mace_data *data,
						     const struct sk_buff *skb, int offset,
						     __be16 protocol, bool compared)
{
	struct mace_packet *latest = data->latest, *packet = latest;
	const struct mace_packet *last = this_cpu_read(mace_last_packet);
	int in_place = (int)skb_headlen(skb) - offset;
	const u8 *at = skb->data + offset;

	if (compared || !mace_is_same(packet, skb, at, in_place, protocol)) {
		packet = latest == data->packets ? data->packets + 1 : data->packets;
		data->latest = packet;
		if (!mace_is_same(packet, skb, at, in_place, protocol)) {
			if (last == latest || !mace_is_same(last, skb, at, in_place, protocol)) {
				if (!mace_read_plain(packet, last, skb, offset, protocol))
					mace_read_anew(packet, skb, offset, protocol);
				return packet;
			}
			*packet = *last;
		}
	}
	mace_read_ports(packet, at);
	return packet;
}

/* For what happens seldom. */
static noinline struct mace_packet *mace_read_seldom(struct mace_data *data,
						     const struct sk_buff *skb, int offset,
						     __be16 protocol, bool compared)
{
	return mace_read(data, skb, offset, protocol, compared);
}

/*
 * A packet whose protocol is a VLAN's. The network header of one whose tag was put into its data on
 * the way to the driver (validate_xmit_vlan) is that behind the tag. Else the tag is what comes
 * next. Return: the offset of what the last tag carries, with its @protocol and the tag's @tci.
 */
static noinline int mace_find_vlan(const struct sk_buff *skb, int offset, __be16 *protocol,
				   int *tci)
{
	struct vlan_hdr tag __uninitialized;
	int i;

	if (offset >= ETH_HLEN + VLAN_HLEN &&
	    !skb_copy_bits(skb, offset - VLAN_HLEN, &tag, VLAN_HLEN)) {
		*tci = ntohs(tag.h_vlan_TCI);
		*protocol = tag.h_vlan_encapsulated_proto;
		return offset;
	}
	for (i = 0; i < 2 && eth_type_vlan(*protocol); i++) {
		if (skb_copy_bits(skb, offset, &tag, VLAN_HLEN))
			break;
		*tci = ntohs(tag.h_vlan_TCI);
		*protocol = tag.h_vlan_encapsulated_proto;
		offset += VLAN_HLEN;
	}
	return offset;
}

/* With a tag, or with an offset of nobody's making, as of a packet socket's frame, never parsed. */
static noinline struct mace_read mace_read_unusual(const struct sk_buff *skb, int l3_offset)
{
	struct mace_record *tagged = &this_cpu_read(mace_packets)->tagged;
	int tci = skb_vlan_tag_present(skb) ? skb_vlan_tag_get(skb) : -1;
	__be16 protocol = skb->protocol;
	struct mace_packet *packet;
	struct mace_read read;

	if (unlikely((unsigned int)l3_offset > skb->len))
		l3_offset = min_t(int, skb->dev->hard_header_len, skb->len);
	if (unlikely(eth_type_vlan(protocol)))
		l3_offset = mace_find_vlan(skb, l3_offset, &protocol, &tci);
	packet = mace_read_seldom(mace_data_of(mace_head_hash(skb)), skb, l3_offset, protocol,
				  false);
	read.record = mace_record_of(packet, skb);
	read.l3_len = max_t(int, (int)skb->len - l3_offset, 0);
	if (tci >= 0) {
		*tagged = *read.record;
		tagged->vlan = tci;
		tagged->flags |= MACE_FLAG_VLAN;
		read.record = tagged;
	}
	return read;
}

/**
 * mace_packet_read_other() - mace_packet_read_device() for a packet that is not the latest
 * @skb: the packet
 * @at: as there
 *
 * Context: interrupts off. Return: as there.
 */
struct mace_read mace_packet_read_other(const struct sk_buff *skb, const u8 *at)
{
	unsigned int offset = at - skb->data;
	struct mace_packet *packet;

	if (unlikely(skb_vlan_tag_present(skb) || offset > skb->len ||
		     (skb->protocol != htons(ETH_P_IP) && eth_type_vlan(skb->protocol))))
		return mace_read_unusual(skb, offset);
	packet = mace_read(mace_data_of(mace_head_hash(skb)), skb, offset, skb->protocol, true);
	if (packet->skb != skb)
		mace_identify_here(packet, skb);
	return (struct mace_read){ mace_record_of(packet, skb), skb->len - offset };
}

/**
 * mace_packet_read_buffer() - mace_packet_read_any() for a buffer whose packet is not the latest
 * @skb: as there
 *
 * Context: interrupts off. Return: as there.
 */
const struct mace_record *mace_packet_read_buffer(const struct sk_buff *skb)
{
	struct mace_data *data = mace_data_of(mace_head_hash(skb));
	struct mace_packet *packet = data->latest;
	u16 cpu = packet->record.cpu;

	if (skb->head && skb->network_header && skb_network_offset(skb) <= (int)skb_headlen(skb) &&
	    (skb->protocol == htons(ETH_P_IP) || skb->protocol == htons(ETH_P_IPV6)))
		packet = mace_read_seldom(data, skb, skb_network_offset(skb), skb->protocol,
					  packet->record.ip_version);
	else
		packet->record.ip_version = 0;
	if (!packet->record.ip_version) {
		packet->protocol = MACE_PROTOCOL_NONE;
		packet->record = (struct mace_record){ .cpu = cpu };
		packet->skb = NULL;
	}
	return mace_record_of(packet, skb);
}

/**
 * mace_packet_prepare() - memory for the packets of a CPU, which stays until the module goes
 * @cpu: one that probes are about to run on; the caller sees to it that nobody does the same
 *
 * Context: may sleep. Return: 0 or -ENOMEM.
 */
int mace_packet_prepare(unsigned int cpu)
{
	struct mace_packets *packets;
	struct mace_data *data;

	if (per_cpu(mace_packets, cpu))
		return 0;
	packets = kvzalloc_node(sizeof(*packets), GFP_KERNEL, cpu_to_node(cpu));
	if (!packets)
		return -ENOMEM;
	for (data = packets->data; data < packets->data + (1 << MACE_DATA_BITS); data++) {
		data->latest = data->packets;
		data->packets[0].protocol = MACE_PROTOCOL_NONE;
		data->packets[0].record.cpu = cpu;
		data->packets[1].protocol = MACE_PROTOCOL_NONE;
		data->packets[1].record.cpu = cpu;
	}
	per_cpu(mace_last_packet, cpu) = packets->data->packets;
	per_cpu(mace_packets, cpu) = packets;
	return 0;
}

void __init mace_packet_init(void)
{
	unsigned int i;

	for (i = 0; i < mace_vxlan_port_count; i++)
		mace_tunnel_port_bits |= BIT_ULL(mace_vxlan_ports[i] % 64);
	for (i = 0; i < mace_geneve_port_count; i++)
		mace_tunnel_port_bits |= BIT_ULL(mace_geneve_ports[i] % 64);
	get_random_bytes(&mace_skb_key, sizeof(mace_skb_key));
}

/* No probe runs any more. */
void mace_packet_exit(void)
{
	int cpu;

	for_each_possible_cpu(cpu)
		kvfree(per_cpu(mace_packets, cpu));
}
