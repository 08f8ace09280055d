/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Reads a packet's bytes into the fields of a record, and computes its packet_key. The key's
 * definition, and the reasons for it, are in kmod/mace_packet.c; this file implements the same
 * definition in a form that the verifier accepts.
 *
 * A packet passes many hooks, and its bytes are parsed and hashed at the first. What was read is
 * remembered (struct mace_seen), together with the bytes that decided it. If at a later hook all of
 * those bytes are equal, so is what they mean, and it is copied. The comparison leaves out the bytes
 * of the IP header that neither record nor key contains: type of service, TTL, checksum, addresses.
 *
 * From Linux 6.2 on the programs load bytes in place (mace_is_direct()); a load from an address
 * that does not exist yields 0. Older kernels have to copy bytes to the stack first, which costs
 * about as much as ten loads (bpf_probe_read_kernel()).
 *
 * Headers are read in the linear part of a buffer only; payload in the buffer's pages, too, where
 * the kernel lets programs read it (mace_is_paged_readable()). If the key needs other bytes in
 * pages, the reader sets @hidden and the packet has no key: a key that differs from the module's
 * would be worse than none.
 *
 * tests/contract/test_packet_bpf.py compiles this file for user space and compares it with the
 * reading of packet captures, with which the module is compared too.
 */
#ifndef _MACE_PACKET_H
#define _MACE_PACKET_H

#include "mace_bpf.h"

/* See Linux's include/linux/compiler.h: what is read or written before the barrier stays before. */
#define barrier() asm volatile("" ::: "memory")

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif
#define __noinline __attribute__((noinline))
#define unlikely(condition) __builtin_expect(!!(condition), 0)
#define likely(condition) __builtin_expect(!!(condition), 1)

#include "../kmod/uapi/mace_key.h"

#define BE16(number) __builtin_bswap16(number)
#define BE32(number) __builtin_bswap32(number)

#define MACE_PAYLOAD_BYTES 16
/* The verifier requires of a copy on the stack that each of its words is aligned. */
#define MACE_ALIGNED __attribute__((aligned(8)))
#define MACE_EXTENSION_HEADERS_MAX 6

#define MACE_ETH_HLEN 14
#define MACE_VLAN_HLEN 4
#define MACE_ETH_P_IP 0x0800
#define MACE_ETH_P_IPV6 0x86dd
#define MACE_ETH_P_8021Q 0x8100
#define MACE_ETH_P_8021AD 0x88a8
#define MACE_ETH_P_TEB 0x6558
#define MACE_IP_MF 0x2000
#define MACE_IP_OFFSET 0x1fff
#define MACE_IP6_OFFSET 0xfff8

#define MACE_VXLAN_PORT 4789
#define MACE_VXLAN_PORT_OF_LINUX 8472
#define MACE_GENEVE_PORT 6081

/* IP protocol numbers (IANA). */
enum mace_proto {
	MACE_PROTO_HOP = 0,
	MACE_PROTO_ICMP = 1,
	MACE_PROTO_IPIP = 4,
	MACE_PROTO_TCP = 6,
	MACE_PROTO_UDP = 17,
	MACE_PROTO_IPV6 = 41,
	MACE_PROTO_ROUTING = 43,
	MACE_PROTO_FRAGMENT = 44,
	MACE_PROTO_GRE = 47,
	MACE_PROTO_AUTH = 51,
	MACE_PROTO_ICMPV6 = 58,
	MACE_PROTO_DEST = 60,
	MACE_PROTO_SCTP = 132,
	MACE_PROTO_UDPLITE = 136,
};

/**
 * struct mace_buffer - a kernel buffer with a packet; lengths in bytes
 *
 * @skb: the buffer, for mace_copy_paged()
 * @data: skb->data, a kernel address
 * @len: length of the packet from @data on, linear part and pages
 * @in_place: length of the linear part from @data on
 * @offset: start of the network layer from @data
 * @tci: tag control information of the VLAN tag beside the packet's data, or -1
 * @protocol: EtherType, host byte order
 * @pages: whether the program may call mace_copy_paged() with @skb; a constant in each program
 */
struct mace_buffer {
	const struct sk_buff *skb;
	u64 data;
	int len;
	int in_place;
	int offset;
	int tci;
	u16 protocol;
	bool pages;
};

/**
 * struct mace_reader - state of reading one packet; offsets are from its network header, in bytes
 *
 * @at: kernel address of the network header
 * @nothing: always 0, but unknown to the verifier: see MACE_FORGET()
 * @in_place: number of the packet's bytes in the linear part
 * @bytes: number of all bytes of the packet
 * @used: offset behind the last byte that was read in the linear part
 * @paged: offset of the MACE_PAYLOAD_BYTES in pages that the reading needs, or 0. They were read,
 *	or only other programs can read them
 * @hidden: 1 if a byte that the reading needs lies in pages and was not read
 */
struct mace_reader {
	u64 at;
	u64 nothing;
	int in_place;
	int bytes;
	int used;
	int paged;
	u32 hidden;
};

/**
 * struct mace_headers - the contents of a packet's headers; as in the module
 *
 * @first: first word of struct mace_words
 * @second: second word of struct mace_words
 * @end: offset of the first byte behind the packet, where the link layer's padding begins
 * @payload: offset of the payload that is part of the key, or 0
 * @payload_bytes: length of that payload, at most MACE_PAYLOAD_BYTES
 * @ports: source port or ICMP identifier, then destination port or ICMP sequence number, in the
 *	packet's byte order
 * @inner: offset of the packet that this packet carries, or 0
 * @inner_protocol: EtherType of the inner packet; MACE_ETH_P_TEB for an Ethernet frame
 * @flags: MACE_FLAG_*; 0 if the bytes are no IP packet
 */
struct mace_headers {
	u64 first;
	u64 second;
	int end;
	int payload;
	int payload_bytes;
	u32 ports;
	int inner;
	u16 inner_protocol;
	u8 flags;
};

/*
 * Make the verifier forget all that it knows of @number, whose value stays the same. The verifier
 * follows paths through a program separately as long as they differ in a number that a decision
 * depends on. Here the number of paths multiplies (kinds of headers, of tunnels, of payload). Where
 * paths meet, forgetting makes their states equal, so that the verifier follows one of them.
 */
#define MACE_FORGET(reader, number) ((number) ^= (__typeof__(number))(reader)->nothing)

/* The same for kernels before Linux 6.2 only, whose verifiers find fewer states equal. */
#define MACE_FORGET_OLD(reader, number)              \
	do {                                         \
		if (!mace_is_direct())               \
			MACE_FORGET(reader, number); \
	} while (0)

/* --- bytes ------------------------------------------------------------------------ */

/* The file that includes this one defines these four. Return whether mace_in_place() works. */
static __always_inline bool mace_is_direct(void);
/* Return the @len bytes at the kernel address @at. */
static __always_inline const void *mace_in_place(u64 at, u32 len);
/* Return whether mace_copy_paged() works. */
static __always_inline bool mace_is_paged_readable(void);
/*
 * Copy MACE_PAYLOAD_BYTES of the buffer @skb to @to, wherever they lie. @offset is from skb->data.
 * Not inlined: the compiler would put other variables where the verifier still sees a dynptr.
 * Return: 0, or less if the buffer does not have these bytes or nobody may read them.
 */
static __noinline long mace_copy_paged(const struct sk_buff *skb, int offset, void *to);

/* Return whether this program can read payload in the pages of @buffer. */
static __always_inline bool mace_reads_pages(const struct mace_buffer *buffer)
{
	return mace_is_paged_readable() && buffer->pages;
}

/* Return whether the packet has @len bytes at @offset, in the linear part or in pages. */
static __always_inline bool mace_has(const struct mace_reader *reader, int offset, int len)
{
	return offset + len <= reader->bytes;
}

/*
 * Return @len bytes at the kernel address @at: where they are, or on kernels that cannot load them
 * there, in @copy.
 */
static __always_inline const void *mace_look(u64 at, void *copy, u32 len)
{
	if (mace_is_direct())
		return mace_in_place(at, len);
	bpf_probe_read_kernel(copy, len, (const void *)at);
	return copy;
}

/*
 * Copy @len bytes at @offset to @to, or zeros if any of them lies in pages. mace_has() must be true
 * of them; @len is a constant and a multiple of four, and @to is aligned to eight bytes.
 */
static __always_inline void mace_take(struct mace_reader *reader, int offset, void *to, int len)
{
	const volatile u64 *words;
	int i, behind, sign;

	/* The sign bit of the remaining length, computed without a branch. */
	reader->hidden |= (u32)(reader->in_place - offset - len) >> 31;
	if (offset + len > reader->in_place) {
		/* Zeros that the verifier does not know: known ones would add paths. */
		for (i = 0; i < len / 4; i++)
			((u32 *)to)[i] = reader->nothing;
		return;
	}
	/* The larger of the two; the compiler must not make a branch of it either. */
	behind = offset + len - reader->used;
	sign = behind >> 31;
	asm volatile("" : "+r"(sign));
	reader->used += behind & ~sign;
	MACE_FORGET(reader, reader->used);
	if (!mace_is_direct()) {
		bpf_probe_read_kernel(to, len, (const void *)(reader->at + offset));
		return;
	}
	words = mace_in_place(reader->at + offset, len);
	for (i = 0; i < len / 8; i++)
		((u64 *)to)[i] = words[i];
	if (len % 8)
		((u32 *)to)[len / 4 - 1] = ((const volatile u32 *)words)[len / 4 - 1];
}

/* --- headers ---------------------------------------------------------------------- */

static __always_inline void mace_has_payload(struct mace_headers *headers, int offset, int bytes)
{
	int rest = headers->end - offset;

	headers->payload = offset;
	headers->payload_bytes = bytes < rest ? bytes : rest;
}

static __always_inline void mace_read_tcp(struct mace_reader *reader, int offset,
					  struct mace_headers *headers)
{
	u32 tcp[4] MACE_ALIGNED;

	if (!mace_has(reader, offset, 20))
		return;
	mace_take(reader, offset, tcp, sizeof(tcp));
	headers->flags |= MACE_FLAG_FLOW;
	headers->ports = tcp[0];
	headers->second = (u64)BE32(tcp[1]) << 32 | BE32(tcp[2]);
	headers->first |= (u64)(tcp[3] >> 8 & 0xff) << 40;
	mace_has_payload(headers, offset + (tcp[3] >> 4 & 0xf) * 4, MACE_PAYLOAD_BYTES);
}

static __always_inline void mace_carries(struct mace_headers *headers, int offset, u16 protocol)
{
	if (protocol != MACE_ETH_P_IP && protocol != MACE_ETH_P_IPV6 && protocol != MACE_ETH_P_TEB)
		return;
	headers->inner = offset;
	headers->inner_protocol = protocol;
}

static __always_inline void mace_read_tunnel_in_udp(struct mace_reader *reader, int offset,
						    u16 port, struct mace_headers *headers)
{
	u32 head[1] MACE_ALIGNED;

	if (!mace_has(reader, offset, 8))
		return;
	mace_take(reader, offset, head, sizeof(head));
	if (port == MACE_GENEVE_PORT) {
		/* RFC 8926, section 3.4: version 0, no control message ("O"), length of options. */
		if (!(BE32(head[0]) & 0xc0800000))
			mace_carries(headers, offset + 8 + (head[0] & 0x3f) * 4, BE32(head[0]));
	} else if ((head[0] & 0xff) == 0x08) {
		/* RFC 7348, section 5: of the flags only "I" (valid VNI) is set. */
		mace_carries(headers, offset + 8, MACE_ETH_P_TEB);
	}
}

static __always_inline void mace_read_udp(struct mace_reader *reader, int offset,
					  struct mace_headers *headers)
{
	u32 udp[2] MACE_ALIGNED;
	u16 port;

	if (!mace_has(reader, offset, 8))
		return;
	mace_take(reader, offset, udp, sizeof(udp));
	headers->flags |= MACE_FLAG_FLOW;
	headers->ports = udp[0];
	port = BE32(udp[0]);
	headers->second = (u64)(BE32(udp[1]) >> 16) << 32;
	mace_has_payload(headers, offset + 8, MACE_PAYLOAD_BYTES);
	if (unlikely(port == MACE_VXLAN_PORT || port == MACE_VXLAN_PORT_OF_LINUX ||
		     port == MACE_GENEVE_PORT))
		mace_read_tunnel_in_udp(reader, offset + 8, port, headers);
}

static __always_inline void mace_read_icmp(struct mace_reader *reader, int offset,
					   struct mace_headers *headers)
{
	u8 version = headers->first >> 56;
	u32 icmp[2] MACE_ALIGNED;
	bool echo;
	u8 type;

	if (!mace_has(reader, offset, 8))
		return;
	/* The key contains neither checksum nor identifier. */
	mace_take(reader, offset, icmp, sizeof(icmp));
	type = icmp[0];
	echo = version == 4 ? type == 8 || type == 0 : type == 128 || type == 129;
	headers->first |= (u64)(BE32(icmp[0]) >> 16) << 32;
	if (echo) {
		headers->flags |= MACE_FLAG_FLOW;
		headers->ports = icmp[1];
		headers->second = BE32(icmp[1]) & 0xffff;
	}
	mace_has_payload(headers, offset + 8, echo ? MACE_PAYLOAD_BYTES : 8);
}

/* RFC 9260, section 3.1. */
static __always_inline void mace_read_sctp(struct mace_reader *reader, int offset,
					   struct mace_headers *headers)
{
	u32 sctp[2] MACE_ALIGNED;

	if (!mace_has(reader, offset, 12))
		return;
	mace_take(reader, offset, sctp, sizeof(sctp));
	headers->flags |= MACE_FLAG_FLOW;
	headers->ports = sctp[0];
	headers->second = (u64)BE32(sctp[1]) << 32;
	mace_has_payload(headers, offset + 12, MACE_PAYLOAD_BYTES);
}

/* RFC 2784, section 2, and RFC 2890, section 2. */
static __always_inline void mace_read_gre(struct mace_reader *reader, int offset,
					  struct mace_headers *headers)
{
	u32 gre[1] MACE_ALIGNED, head;

	mace_has_payload(headers, offset, MACE_PAYLOAD_BYTES);
	if (!mace_has(reader, offset, 4))
		return;
	mace_take(reader, offset, gre, sizeof(gre));
	head = BE32(gre[0]);
	/* Not with source routing, which RFC 2784 removed, nor another version, such as PPTP's. */
	if (head & 0x40070000)
		return;
	offset += 4;
	offset += head & 0x80000000 ? 4 : 0; /* checksum */
	offset += head & 0x20000000 ? 4 : 0; /* key */
	offset += head & 0x10000000 ? 4 : 0; /* sequence number */
	mace_carries(headers, offset, head);
}

/* Read the header behind those of the network layer, at @offset; @fragment_offset is in bytes. */
static __always_inline void mace_read_upper(struct mace_reader *reader, int offset,
					    u32 fragment_offset, struct mace_headers *headers)
{
	u8 proto = headers->first >> 48;

	if (fragment_offset) {
		mace_has_payload(headers, offset, MACE_PAYLOAD_BYTES);
		return;
	}
	if (proto == MACE_PROTO_TCP) {
		mace_read_tcp(reader, offset, headers);
	} else if (proto == MACE_PROTO_UDP || proto == MACE_PROTO_UDPLITE) {
		mace_read_udp(reader, offset, headers);
	} else if (proto == MACE_PROTO_ICMP || proto == MACE_PROTO_ICMPV6) {
		mace_read_icmp(reader, offset, headers);
	} else if (proto == MACE_PROTO_SCTP) {
		mace_read_sctp(reader, offset, headers);
	} else if (proto == MACE_PROTO_GRE) {
		mace_read_gre(reader, offset, headers);
	} else {
		mace_has_payload(headers, offset, MACE_PAYLOAD_BYTES);
		if (proto == MACE_PROTO_IPIP)
			mace_carries(headers, offset, MACE_ETH_P_IP);
		else if (proto == MACE_PROTO_IPV6)
			mace_carries(headers, offset, MACE_ETH_P_IPV6);
	}
}

/**
 * struct mace_network - the contents of the network layer's headers
 *
 * @offset: offset of the first byte behind these headers
 * @fragment_offset: the fragment's offset in its datagram, bytes
 * @fragment: not 0 if the packet is a fragment
 * @cut: 1 if the packet ends within these headers
 */
struct mace_network {
	int offset;
	u32 fragment_offset;
	u32 fragment;
	u32 cut;
};

static __always_inline void mace_read_ipv4(struct mace_reader *reader, int offset,
					   struct mace_network *network,
					   struct mace_headers *headers)
{
	u16 fragment, length;
	u32 ip[4] MACE_ALIGNED;
	int ihl;

	if (!mace_has(reader, offset, 20))
		return;
	mace_take(reader, offset, ip, sizeof(ip));
	ihl = ip[0] & 0xf;
	if ((ip[0] >> 4 & 0xf) != 4 || ihl < 5)
		return;
	length = BE32(ip[0]);
	fragment = BE32(ip[1]);
	headers->first = (u64)4 << 56 | (u64)(ip[2] >> 8 & 0xff) << 48 | (u64)length << 16 |
			 BE32(ip[1]) >> 16;
	headers->flags = MACE_FLAG_KEY;
	/* Length 0: a TCP segment too long for the field (BIG TCP), which ends with its buffer. */
	headers->end = length ? offset + length : reader->bytes;
	network->offset = offset + ihl * 4;
	network->fragment = fragment & (MACE_IP_MF | MACE_IP_OFFSET);
	network->fragment_offset = (fragment & MACE_IP_OFFSET) * 8;
}

static __always_inline bool mace_is_extension(u8 proto)
{
	return proto == MACE_PROTO_HOP || proto == MACE_PROTO_ROUTING ||
	       proto == MACE_PROTO_FRAGMENT || proto == MACE_PROTO_AUTH || proto == MACE_PROTO_DEST;
}

static __always_inline void mace_read_ipv6(struct mace_reader *reader, int offset,
					   struct mace_network *network,
					   struct mace_headers *headers)
{
	u32 ip[2] MACE_ALIGNED, extension[2] MACE_ALIGNED, proto, octets;
	u16 length, id = 0;
	int i;

	if (!mace_has(reader, offset, 40))
		return;
	mace_take(reader, offset, ip, sizeof(ip));
	if ((ip[0] >> 4 & 0xf) != 6)
		return;
	length = BE32(ip[1]) >> 16;
	proto = ip[1] >> 16 & 0xff;
	offset += 40;
	headers->flags = MACE_FLAG_KEY;
	headers->end = length ? offset + length : reader->bytes;
	for (i = 0; i < MACE_EXTENSION_HEADERS_MAX; i++) {
		if (likely(!mace_is_extension(proto)) || network->fragment_offset)
			break;
		if (!mace_has(reader, offset, 8)) {
			network->cut = 1;
			break;
		}
		mace_take(reader, offset, extension, sizeof(extension));
		octets = extension[0] >> 8 & 0xff;
		if (proto == MACE_PROTO_FRAGMENT) {
			network->fragment = 1;
			network->fragment_offset = BE32(extension[0]) & MACE_IP6_OFFSET;
			id = BE32(extension[1]);
			offset += 8;
		} else {
			/* The second byte is a length: RFC 8200, section 4.3; RFC 4302, 2.2. */
			offset += proto == MACE_PROTO_AUTH ? (octets + 2) * 4 : (octets + 1) * 8;
		}
		proto = extension[0] & 0xff;
		MACE_FORGET(reader, proto);
		MACE_FORGET(reader, offset);
		MACE_FORGET(reader, network->fragment);
		MACE_FORGET(reader, network->fragment_offset);
		MACE_FORGET_OLD(reader, reader->hidden);
	}
	headers->first = (u64)6 << 56 | (u64)proto << 48 | (u64)length << 16 | id;
	network->offset = offset;
}

static __always_inline void mace_forget_headers(struct mace_reader *reader,
						struct mace_headers *headers)
{
	MACE_FORGET(reader, headers->first);
	MACE_FORGET(reader, headers->second);
	MACE_FORGET(reader, headers->end);
	MACE_FORGET(reader, headers->payload);
	MACE_FORGET(reader, headers->payload_bytes);
	MACE_FORGET(reader, headers->ports);
	MACE_FORGET(reader, headers->inner);
	MACE_FORGET(reader, headers->inner_protocol);
	MACE_FORGET(reader, headers->flags);
	MACE_FORGET_OLD(reader, reader->hidden);
}

/* Read the packet at @offset, of EtherType @protocol. Flags stay 0 if it is no IP packet. */
static __always_inline void mace_read_ip(struct mace_reader *reader, int offset, u16 protocol,
					 struct mace_headers *headers)
{
	struct mace_network network = {};

	__builtin_memset(headers, 0, sizeof(*headers));
	if (protocol == MACE_ETH_P_IP)
		mace_read_ipv4(reader, offset, &network, headers);
	else if (protocol == MACE_ETH_P_IPV6)
		mace_read_ipv6(reader, offset, &network, headers);
	mace_forget_headers(reader, headers);
	MACE_FORGET(reader, network.offset);
	MACE_FORGET(reader, network.fragment_offset);
	MACE_FORGET(reader, network.fragment);
	MACE_FORGET(reader, network.cut);
	if (!headers->flags)
		return;
	if (!network.cut)
		mace_read_upper(reader, network.offset, network.fragment_offset, headers);
	if (network.fragment) {
		headers->flags |= MACE_FLAG_FRAGMENT;
		headers->second = (u64)1 << 63 | network.fragment_offset;
		headers->inner = 0;
	}
	mace_forget_headers(reader, headers);
}

/* --- the key's words -------------------------------------------------------------- */

/*
 * Set the payload's words, as the module does. A length that depends on the packet would make the
 * verifier follow every path to it separately. The copy therefore always has MACE_PAYLOAD_BYTES and
 * ends where the payload ends. A header precedes every payload, so these bytes exist.
 */
static __always_inline void mace_take_payload(struct mace_reader *reader,
					      const struct mace_buffer *buffer,
					      const struct mace_headers *headers,
					      struct mace_words *words)
{
	int offset = headers->payload, bytes = headers->payload_bytes, from;
	u64 payload[MACE_PAYLOAD_BYTES / 8];
	u32 bits;

	if (!offset || bytes <= 0 || !mace_has(reader, offset, bytes))
		return;
	from = offset + bytes - MACE_PAYLOAD_BYTES;
	if (likely(offset + bytes <= reader->in_place)) {
		mace_take(reader, from, payload, sizeof(payload));
	} else if (mace_reads_pages(buffer) &&
		   !mace_copy_paged(buffer->skb, buffer->offset + from, payload)) {
		reader->paged = from;
	} else {
		reader->hidden = 1;
		/* Other programs can read these bytes: the packet must not be remembered without. */
		if (mace_is_paged_readable() && !buffer->pages)
			reader->paged = from;
		return;
	}
	bits = (MACE_PAYLOAD_BYTES - bytes) * 8;
	if (unlikely(bits)) {
		/* Keep the last @bytes bytes, the first of them as the lowest. */
		if (bits >= 64) {
			payload[0] = payload[1] >> (bits - 64);
			payload[1] = 0;
		} else {
			payload[0] = payload[0] >> bits | payload[1] << (64 - bits);
			payload[1] >>= bits;
		}
	}
	words->payload = payload[0];
	words->payload2 = payload[1];
}

/* Set the words of a packet that is not IP. Return: whether it has enough bytes. */
static __always_inline bool mace_take_other(struct mace_reader *reader, int offset, u16 protocol,
					    struct mace_words *words)
{
	u64 bytes[3];

	if (!mace_has(reader, offset, sizeof(bytes)))
		return false;
	mace_take(reader, offset, bytes, sizeof(bytes));
	words->first = protocol;
	words->second = bytes[0];
	words->payload = bytes[1];
	words->payload2 = bytes[2];
	return true;
}

static __always_inline bool mace_is_vlan(u16 protocol)
{
	return protocol == MACE_ETH_P_8021Q || protocol == MACE_ETH_P_8021AD;
}

/*
 * Set the words of the inner packet at @offset, of EtherType @protocol, which @reader's packet
 * carries. Return: whether it can be read.
 */
static __always_inline bool mace_take_inner(struct mace_reader *reader,
					    const struct mace_buffer *buffer, int offset,
					    u16 protocol, struct mace_words *words)
{
	u32 frame = protocol == MACE_ETH_P_TEB;
	struct mace_headers headers;
	u32 ethernet[1] MACE_ALIGNED;
	int i;

	if (frame) {
		if (!mace_has(reader, offset, MACE_ETH_HLEN))
			return false;
		mace_take(reader, offset + 10, ethernet, sizeof(ethernet));
		protocol = BE32(ethernet[0]);
		offset += MACE_ETH_HLEN;
		for (i = 0; i < 2 && mace_is_vlan(protocol); i++) {
			if (!mace_has(reader, offset, MACE_VLAN_HLEN))
				break;
			mace_take(reader, offset, ethernet, sizeof(ethernet));
			protocol = BE32(ethernet[0]);
			offset += MACE_VLAN_HLEN;
			MACE_FORGET(reader, offset);
			MACE_FORGET(reader, protocol);
		}
	}
	MACE_FORGET(reader, offset);
	MACE_FORGET(reader, protocol);
	MACE_FORGET(reader, frame);
	mace_read_ip(reader, offset, protocol, &headers);
	if (!headers.flags)
		return frame && mace_take_other(reader, offset, protocol, words);
	words->first = headers.first;
	words->second = headers.second;
	mace_take_payload(reader, buffer, &headers, words);
	return true;
}

/* --- the identity of a buffer ------------------------------------------------------- */

/* SipHash-2-4 (Aumasson and Bernstein, 2012, section 2) of whole words, as the kernel's siphash. */
#define MACE_SIP_ROTATE(word, bits) ((word) << (bits) | (word) >> (64 - (bits)))

struct mace_sip {
	u64 v0, v1, v2, v3;
};

static __always_inline void mace_sip_round(struct mace_sip *sip)
{
	sip->v0 += sip->v1;
	sip->v2 += sip->v3;
	sip->v1 = MACE_SIP_ROTATE(sip->v1, 13) ^ sip->v0;
	sip->v3 = MACE_SIP_ROTATE(sip->v3, 16) ^ sip->v2;
	sip->v0 = MACE_SIP_ROTATE(sip->v0, 32);
	sip->v2 += sip->v1;
	sip->v0 += sip->v3;
	sip->v1 = MACE_SIP_ROTATE(sip->v1, 17) ^ sip->v2;
	sip->v3 = MACE_SIP_ROTATE(sip->v3, 21) ^ sip->v0;
	sip->v2 = MACE_SIP_ROTATE(sip->v2, 32);
}

static __always_inline void mace_sip_begin(struct mace_sip *sip, u64 key0, u64 key1)
{
	sip->v0 = key0 ^ 0x736f6d6570736575ULL;
	sip->v1 = key1 ^ 0x646f72616e646f6dULL;
	sip->v2 = key0 ^ 0x6c7967656e657261ULL;
	sip->v3 = key1 ^ 0x7465646279746573ULL;
}

static __always_inline void mace_sip_word(struct mace_sip *sip, u64 word)
{
	sip->v3 ^= word;
	mace_sip_round(sip);
	mace_sip_round(sip);
	sip->v0 ^= word;
}

static __always_inline u64 mace_sip_end(struct mace_sip *sip, u64 words)
{
	mace_sip_word(sip, words * 8 << 56);
	sip->v2 ^= 0xff;
	mace_sip_round(sip);
	mace_sip_round(sip);
	mace_sip_round(sip);
	mace_sip_round(sip);
	return sip->v0 ^ sip->v1 ^ sip->v2 ^ sip->v3;
}

/* Return the skb_id of a buffer's address @skb. */
static __always_inline u64 mace_hash_of_skb(u64 skb, u64 key0, u64 key1)
{
	struct mace_sip sip;

	mace_sip_begin(&sip, key0, key1);
	mace_sip_word(&sip, skb);
	return mace_sip_end(&sip, 1);
}

/* --- packets ---------------------------------------------------------------------- */

/*
 * Find the network layer of a packet whose EtherType is a VLAN's, and set @tci, @protocol and
 * @offset. If the kernel moved the tag into the data on the way to the driver (validate_xmit_vlan),
 * the network header already points behind the tag. Otherwise the tag is at @offset. Return:
 * whether the tags lie in the linear part.
 */
static __always_inline bool mace_find_vlan(struct mace_buffer *buffer)
{
	int i, offset = buffer->offset;
	u32 tag = 0;

	if (offset >= MACE_ETH_HLEN + MACE_VLAN_HLEN && offset <= buffer->len) {
		if (offset > buffer->in_place)
			return false;
		bpf_probe_read_kernel(&tag, sizeof(tag),
				      (const void *)(buffer->data + offset - MACE_VLAN_HLEN));
		buffer->tci = BE32(tag) >> 16;
		buffer->protocol = BE32(tag);
		return true;
	}
	for (i = 0; i < 2 && mace_is_vlan(buffer->protocol); i++) {
		if (offset + MACE_VLAN_HLEN > buffer->len)
			break;
		if (offset + MACE_VLAN_HLEN > buffer->in_place)
			return false;
		bpf_probe_read_kernel(&tag, sizeof(tag), (const void *)(buffer->data + offset));
		buffer->tci = BE32(tag) >> 16;
		buffer->protocol = BE32(tag);
		offset += MACE_VLAN_HLEN;
		buffer->offset = offset;
	}
	return true;
}

/**
 * struct mace_fields - the part of a record that the packet's bytes determine
 *
 * The members have their meaning in struct mace_record.
 *
 * @packet_key: 0 if the key needs a byte that the packet does not have or that lies in pages
 */
struct mace_fields {
	u64 packet_key;
	u16 l4_src;
	u16 l4_dst;
	u32 l4_seq;
	u16 ip_id;
	u8 ip_version;
	u8 l4_proto;
	u8 flags;
	u8 l4_bits;
	u8 pad[2];
};

static __always_inline void mace_set_fields(const struct mace_headers *headers,
					    struct mace_fields *fields)
{
	fields->l4_src = BE16((u16)headers->ports);
	fields->l4_dst = BE16((u16)(headers->ports >> 16));
	fields->l4_seq = 0;
	fields->ip_id = 0;
	fields->ip_version = headers->first >> 56;
	fields->l4_proto = headers->first >> 48;
	fields->l4_bits = headers->first >> 40;
	if (fields->ip_version == 4)
		fields->ip_id = headers->first;
	if (headers->flags & MACE_FLAG_FRAGMENT)
		fields->l4_seq = headers->second; /* without bit 63, the mark */
	else if (fields->l4_proto == MACE_PROTO_TCP || fields->l4_proto == MACE_PROTO_SCTP)
		fields->l4_seq = headers->second >> 32;
}

/**
 * mace_read_buffer() - read a packet
 * @buffer: the packet's place
 * @nothing: always 0, but unknown to the verifier: see MACE_FORGET()
 * @fields: receives what the packet says
 * @paged: receives the offset of MACE_PAYLOAD_BYTES in pages that decided @fields too, or 0
 *
 * Return: number of the packet's first bytes that decided @fields, or -1 if these are unknown.
 */
static __always_inline int mace_read_buffer(const struct mace_buffer *buffer, u64 nothing,
					    struct mace_fields *fields, int *paged)
{
	struct mace_headers headers;
	struct mace_reader reader;
	struct mace_words words;
	u8 flags;

	reader.at = buffer->data + buffer->offset;
	reader.in_place = buffer->in_place - buffer->offset;
	reader.bytes = buffer->len - buffer->offset;
	reader.nothing = nothing;
	reader.used = 0;
	reader.paged = 0;
	reader.hidden = 0;
	MACE_FORGET(&reader, reader.at);
	MACE_FORGET(&reader, reader.in_place);
	MACE_FORGET(&reader, reader.bytes);
	mace_read_ip(&reader, 0, buffer->protocol, &headers);
	flags = headers.flags;
	words.first = headers.first;
	words.second = headers.second;
	words.payload = 0;
	words.payload2 = 0;
	if (unlikely(!flags)) {
		if (mace_take_other(&reader, 0, buffer->protocol, &words))
			flags = MACE_FLAG_KEY;
	} else if (unlikely(headers.inner) && mace_take_inner(&reader, buffer, headers.inner,
							      headers.inner_protocol, &words)) {
		flags |= MACE_FLAG_TUNNEL;
	} else {
		mace_take_payload(&reader, buffer, &headers, &words);
	}
	if (reader.hidden)
		flags &= ~MACE_FLAG_KEY;
	/* All kinds of packets meet here. */
	MACE_FORGET_OLD(&reader, flags);
	MACE_FORGET_OLD(&reader, reader.used);
	/* Of a product the verifier knows as much as of its factors: the hash's would differ. */
	MACE_FORGET(&reader, words.first);
	MACE_FORGET(&reader, words.second);
	MACE_FORGET(&reader, words.payload);
	MACE_FORGET(&reader, words.payload2);
	MACE_FORGET_OLD(&reader, headers.first);
	MACE_FORGET_OLD(&reader, headers.second);
	MACE_FORGET_OLD(&reader, headers.ports);
	MACE_FORGET_OLD(&reader, headers.flags);
	*paged = reader.paged;
	mace_set_fields(&headers, fields);
	fields->flags = flags;
	fields->packet_key = flags & MACE_FLAG_KEY ? mace_key(&words) : 0;
	return headers.flags ? reader.used : -1;
}

/* --- packets that were read before ------------------------------------------------ */

/* Type of service, TTL, checksum and addresses of IPv4 may differ between hooks, and in IPv6: */
#define MACE_IPV4_FIRST 0xffffffffffff00ffULL /* version, length, identification, fragment */
#define MACE_IPV4_SECOND 0x000000000000ff00ULL /* protocol */
#define MACE_IPV6_FIRST 0x00ffffff000000f0ULL /* version, length, next header */

/* No EtherType: an entry that no packet equals. */
#define MACE_NO_KIND 0xffffffff00000000ULL

#define MACE_TAIL_BYTES 16
#define MACE_PIECE_BYTES 16
#define MACE_PIECES 5
/* A packet whose reading needs more bytes behind the IP header is read anew at each hook. */
#define MACE_SEEN_BYTES_MAX (8 + MACE_PIECES * MACE_PIECE_BYTES + MACE_TAIL_BYTES)

/**
 * struct mace_seen - a packet that was read, and the bytes that decided what was read
 *
 * Several programs of one CPU may have an entry in hand at once: an interrupt's program inside
 * another, and where the kernel preempts programs, those of several tasks. A program writes only
 * while it is the only one that does (@writers), and @version changes with every writing, so that a
 * reader notices it.
 *
 * The members up to @paged_at are all that a datagram or an echo needs: two cache lines.
 *
 * @version: time of the last writing, 0 before the first and while one is under way
 * @shape: bytes of the packet (upper half), and how many of them are in the linear part
 * @kind: EtherType (upper half) and number of bytes that decided @fields
 * @fields: what the packet says
 * @first: the first 16 bytes
 * @upper: 8 bytes behind the IP header without options
 * @tail: the last bytes of those that decided @fields
 * @paged_at: offset of @paged, or 0
 * @pieces: the bytes from @upper to @tail, as far as these two do not meet
 * @paged: bytes in pages that decided @fields too
 * @writers: programs that are about to write
 */
struct mace_seen {
	u64 version;
	u64 shape;
	u64 kind;
	struct mace_fields fields;
	u64 first[2];
	u64 upper;
	u64 tail[MACE_TAIL_BYTES / 8];
	u64 paged_at;
	u64 pieces[MACE_PIECES][MACE_PIECE_BYTES / 8];
	u64 paged[MACE_PAYLOAD_BYTES / 8];
	u64 writers;
};

static __always_inline u64 mace_shape(const struct mace_buffer *buffer)
{
	return (u64)(buffer->len - buffer->offset) << 32 | (u32)(buffer->in_place - buffer->offset);
}

static __always_inline u64 mace_kind(const struct mace_buffer *buffer, int used)
{
	return (u64)buffer->protocol << 32 | (u32)used;
}

/* Return the length of the IP header without options, bytes. */
static __always_inline int mace_ip_bytes(const struct mace_buffer *buffer)
{
	return buffer->protocol == MACE_ETH_P_IP ? 20 : 40;
}

/* Whether the packet's bytes are equal to those of @seen, as far as they decided its fields. */
static __always_inline bool mace_is_equal(const struct mace_buffer *buffer,
					  const struct mace_seen *seen)
{
	u64 at = buffer->data + buffer->offset;
	int i, used = seen->kind;
	u64 copy[3], changed;
	const u64 *bytes;

	if (seen->shape != mace_shape(buffer) || seen->kind != mace_kind(buffer, used))
		return false;
	bytes = mace_look(at, copy, 16);
	if (buffer->protocol == MACE_ETH_P_IP)
		changed = ((bytes[0] ^ seen->first[0]) & MACE_IPV4_FIRST) |
			  ((bytes[1] ^ seen->first[1]) & MACE_IPV4_SECOND);
	else
		changed = (bytes[0] ^ seen->first[0]) & MACE_IPV6_FIRST;
	at += mace_ip_bytes(buffer);
	used -= mace_ip_bytes(buffer);
	/* UDP and echoes: one copy instead of two. */
	if (!mace_is_direct() && likely(used == 8 + MACE_TAIL_BYTES)) {
		bpf_probe_read_kernel(copy, 8 + MACE_TAIL_BYTES, (const void *)at);
		return !(changed | (copy[0] ^ seen->upper) | (copy[1] ^ seen->tail[0]) |
			 (copy[2] ^ seen->tail[1]));
	}
	bytes = mace_look(at, copy, 8);
	changed |= bytes[0] ^ seen->upper;
	for (i = 0; i < MACE_PIECES; i++) {
		if (likely(used <= 8 + i * MACE_PIECE_BYTES + MACE_TAIL_BYTES))
			break;
		bytes = mace_look(at + 8 + i * MACE_PIECE_BYTES, copy, MACE_PIECE_BYTES);
		changed |= (bytes[0] ^ seen->pieces[i][0]) | (bytes[1] ^ seen->pieces[i][1]);
	}
	bytes = mace_look(at + used - MACE_TAIL_BYTES, copy, MACE_TAIL_BYTES);
	changed |= (bytes[0] ^ seen->tail[0]) | (bytes[1] ^ seen->tail[1]);
	/* A program that reads no pages relies on the one at the reception, which compared them. */
	if (mace_reads_pages(buffer) && unlikely(seen->paged_at)) {
		if (mace_copy_paged(buffer->skb, buffer->offset + (int)seen->paged_at, copy))
			return false;
		changed |= (copy[0] ^ seen->paged[0]) | (copy[1] ^ seen->paged[1]);
	}
	return !changed;
}

/* Set @fields to those of @seen. Return: whether they are the packet's, else @fields is undefined. */
static __always_inline bool mace_recall(const struct mace_buffer *buffer,
					const struct mace_seen *seen, struct mace_fields *fields)
{
	u64 version = *(const volatile u64 *)&seen->version;
	bool equal;

	barrier();
	*fields = seen->fields;
	equal = mace_is_equal(buffer, seen);
	barrier();
	return likely(equal && version && *(const volatile u64 *)&seen->version == version);
}

/* Write @seen. See mace_read_buffer(). */
static __always_inline void mace_write_seen(const struct mace_buffer *buffer,
					    struct mace_seen *seen,
					    const struct mace_fields *fields, int used, int paged)
{
	u64 at = buffer->data + buffer->offset, copy[2];
	const u64 *bytes;
	int i;

	seen->fields = *fields;
	seen->shape = mace_shape(buffer);
	seen->kind = mace_kind(buffer, used);
	seen->paged_at = 0;
	bytes = mace_look(at, copy, sizeof(copy));
	seen->first[0] = bytes[0];
	seen->first[1] = bytes[1];
	at += mace_ip_bytes(buffer);
	used -= mace_ip_bytes(buffer);
	bytes = mace_look(at, copy, 8);
	seen->upper = bytes[0];
	for (i = 0; i < MACE_PIECES; i++) {
		if (used <= 8 + i * MACE_PIECE_BYTES + MACE_TAIL_BYTES)
			break;
		bytes = mace_look(at + 8 + i * MACE_PIECE_BYTES, copy, MACE_PIECE_BYTES);
		seen->pieces[i][0] = bytes[0];
		seen->pieces[i][1] = bytes[1];
	}
	bytes = mace_look(at + used - MACE_TAIL_BYTES, copy, MACE_TAIL_BYTES);
	seen->tail[0] = bytes[0];
	seen->tail[1] = bytes[1];
	if (likely(!paged))
		return;
	if (mace_reads_pages(buffer) &&
	    !mace_copy_paged(buffer->skb, buffer->offset + paged, copy)) {
		seen->paged_at = paged;
		seen->paged[0] = copy[0];
		seen->paged[1] = copy[1];
	} else {
		seen->kind = MACE_NO_KIND;
	}
}

/*
 * Read the packet, and remember it in @seen.
 *
 * @fields: receives what the packet says
 * @now: not 0, and different at each call of a CPU
 */
static __always_inline void mace_read_anew(const struct mace_buffer *buffer, struct mace_seen *seen,
					   struct mace_fields *fields, u64 nothing, u64 now)
{
	int paged, used = mace_read_buffer(buffer, nothing, fields, &paged);
	int least = mace_ip_bytes(buffer) + MACE_TAIL_BYTES;

	if (used < 0 || used > mace_ip_bytes(buffer) + MACE_SEEN_BYTES_MAX)
		return;
	/* Bytes that decided nothing do no harm. */
	if (used < least)
		used = least;
	if (used > buffer->in_place - buffer->offset)
		return;
	__sync_fetch_and_add(&seen->writers, 1);
	if (likely(*(volatile u64 *)&seen->writers == 1)) {
		*(volatile u64 *)&seen->version = 0;
		barrier();
		mace_write_seen(buffer, seen, fields, used, paged);
		barrier();
		*(volatile u64 *)&seen->version = now;
	}
	__sync_fetch_and_add(&seen->writers, -1);
}

/* Set the fields of @record that the packet's bytes determine; flags are added. */
static __always_inline void mace_set_record(const struct mace_fields *fields,
					    struct mace_record *record)
{
	record->packet_key = fields->packet_key;
	record->l4_src = fields->l4_src;
	record->l4_dst = fields->l4_dst;
	record->l4_seq = fields->l4_seq;
	record->ip_id = fields->ip_id;
	record->ip_version = fields->ip_version;
	record->l4_proto = fields->l4_proto;
	record->flags |= fields->flags;
	record->l4_bits = fields->l4_bits;
}

#endif
