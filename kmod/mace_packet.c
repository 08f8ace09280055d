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
 * and of a VXLAN packet, of the packet inside, so that it survives encapsulation. The hash's key
 * is a constant: two hosts give one packet the same key. What it cannot survive, because it makes
 * other packets of it: segmentation, receive coalescing, fragmentation and reassembly, and NAT
 * helpers that rewrite payload.
 *
 * Everything here runs in probes: no sleeping, no allocation, and no byte is read but by
 * mace_peek(), which checks bounds, of non-linear buffers too.
 */
#include <linux/icmp.h>
#include <linux/if_ether.h>
#include <linux/if_vlan.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/siphash.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <net/ip.h>
#include <net/ipv6.h>

#include "mace_compat.h"
#include "mace_packet.h"

/*
 * Buffers and structures here are __uninitialized where the compiler would fill them with zeroes
 * (CONFIG_INIT_STACK_ALL_ZERO) for every packet: they are written before they are read.
 */

/* Enough for any that hosts send; a hostile chain is cut here. */
#define MACE_EXTENSION_HEADERS_MAX 6
#define MACE_PAYLOAD_BYTES 16

unsigned short mace_vxlan_ports[MACE_VXLAN_PORTS_MAX] = { 4789, 8472 };
unsigned int mace_vxlan_port_count = 2;

/* Fixed, so that hosts agree; nothing is secret about it. */
static const siphash_key_t mace_content_key = { { 0x4d41434520706b74ULL, 0x6b65792076312e30ULL } };

/* What one IP header and what follows it say; host byte order. */
struct mace_ip {
	u8 version;
	u8 l4_proto;
	u8 l4_bits;
	u8 l4_code;
	bool fragment;
	bool flow;
	u16 id;
	u16 length;
	u16 l4_src;
	u16 l4_dst;
	u16 fragment_offset;
	u32 l4_seq;
	u32 l4_ack;
	int l4; /* offset of the transport layer's header, or 0 if that was not read */
	int end; /* offset of the first byte after the packet */
	int inner; /* offset of an Ethernet frame in VXLAN, or 0 */
	int used; /* offset of the first byte that nothing here depends on, or 0 */
	u64 payload[MACE_PAYLOAD_BYTES / sizeof(u64)];
};

DEFINE_PER_CPU(struct mace_known_cpu, mace_known);

static noinline const void *mace_peek_slowly(const struct sk_buff *skb, int offset, int len,
					     void *buffer)
{
	if (offset < 0 || skb_copy_bits(skb, offset, buffer, len))
		return NULL;
	return buffer;
}

/*
 * @len bytes at @offset from skb->data, which may be negative: in place, or copied to @buffer.
 * NULL if there are no such bytes.
 */
static __always_inline const void *mace_peek(const struct sk_buff *skb, int offset, int len,
					     void *buffer)
{
	if (unlikely(offset < -(int)skb_headroom(skb)))
		return NULL;
	if (likely(offset + len <= (int)skb_headlen(skb)))
		return skb->data + offset;
	return mace_peek_slowly(skb, offset, len, buffer);
}

static noinline void mace_read_part_of_payload(const struct sk_buff *skb, int offset, int bytes,
					       struct mace_ip *ip)
{
	u8 buffer[MACE_PAYLOAD_BYTES] __uninitialized;
	const void *payload;

	/* Bytes behind the packet's end are padding of the link layer, which comes and goes. */
	bytes = min(bytes, ip->end - offset);
	if (bytes <= 0)
		return;
	payload = mace_peek(skb, offset, bytes, buffer);
	if (!payload) {
		ip->used = 0;
		return;
	}
	ip->used = max(ip->used, offset + bytes);
	memcpy(ip->payload, payload, bytes);
}

/* @bytes of what the headers before @offset carry, at most MACE_PAYLOAD_BYTES. */
static __always_inline void mace_read_payload(const struct sk_buff *skb, int offset, int bytes,
					      struct mace_ip *ip)
{
	int end = offset + MACE_PAYLOAD_BYTES;

	/* Behind headers that were read in place, so that it cannot begin before the buffer. */
	if (bytes != MACE_PAYLOAD_BYTES || end > ip->end || end > (int)skb_headlen(skb) ||
	    offset < 0) {
		mace_read_part_of_payload(skb, offset, bytes, ip);
		return;
	}
	ip->used = max(ip->used, end);
	memcpy(ip->payload, skb->data + offset, MACE_PAYLOAD_BYTES);
}

static void mace_read_tcp(const struct sk_buff *skb, int offset, struct mace_ip *ip)
{
	struct tcphdr buffer __uninitialized;
	const struct tcphdr *tcp = mace_peek(skb, offset, sizeof(buffer), &buffer);

	if (!tcp)
		return;
	ip->l4_src = ntohs(tcp->source);
	ip->l4_dst = ntohs(tcp->dest);
	ip->l4_seq = ntohl(tcp->seq);
	ip->l4_ack = ntohl(tcp->ack_seq);
	ip->l4_bits = ((const u8 *)tcp)[13];
	ip->flow = true;
	ip->used = offset + sizeof(*tcp);
	mace_read_payload(skb, offset + tcp->doff * 4, MACE_PAYLOAD_BYTES, ip);
}

static bool mace_is_vxlan_port(u16 port)
{
	unsigned int i;

	for (i = 0; i < mace_vxlan_port_count; i++)
		if (mace_vxlan_ports[i] == port)
			return true;
	return false;
}

static void mace_read_udp(const struct sk_buff *skb, int offset, struct mace_ip *ip)
{
	struct {
		struct udphdr udp;
		__be32 vxlan_flags;
		__be32 vxlan_vni;
	} buffer __uninitialized;
	const struct udphdr *udp = mace_peek(skb, offset, sizeof(*udp), &buffer);
	const __be32 *vxlan;

	if (!udp)
		return;
	ip->l4_src = ntohs(udp->source);
	ip->l4_dst = ntohs(udp->dest);
	ip->l4_seq = ntohs(udp->len);
	ip->flow = true;
	offset += sizeof(*udp);
	ip->used = offset;
	/* RFC 7348, section 5: of the flags only "I", a valid VNI, and that one is set. */
	if (mace_is_vxlan_port(ip->l4_dst) && !ip->fragment) {
		vxlan = mace_peek(skb, offset, 8, &buffer);
		if (vxlan && (vxlan[0] & htonl(0xff000000)) == htonl(0x08000000))
			ip->inner = offset + 8;
	}
	mace_read_payload(skb, offset, MACE_PAYLOAD_BYTES, ip);
}

static void mace_read_icmp(const struct sk_buff *skb, int offset, struct mace_ip *ip)
{
	struct icmphdr buffer __uninitialized;
	const struct icmphdr *icmp = mace_peek(skb, offset, sizeof(buffer), &buffer);
	bool echo;

	if (!icmp)
		return;
	echo = ip->version == 4 ? icmp->type == ICMP_ECHO || icmp->type == ICMP_ECHOREPLY :
				  icmp->type == 128 || icmp->type == 129; /* RFC 4443, section 4 */
	ip->l4_bits = icmp->type;
	ip->l4_code = icmp->code;
	ip->used = offset + sizeof(*icmp);
	if (echo) {
		ip->l4_src = ntohs(icmp->un.echo.id);
		ip->l4_dst = ntohs(icmp->un.echo.sequence);
		ip->flow = true;
	}
	mace_read_payload(skb, offset + sizeof(*icmp), echo ? MACE_PAYLOAD_BYTES : 8, ip);
}

static void mace_read_sctp(const struct sk_buff *skb, int offset, struct mace_ip *ip)
{
	struct {
		__be16 source;
		__be16 dest;
		__be32 tag;
		__be32 checksum;
	} buffer __uninitialized;
	/* RFC 9260, section 3.1 */
	const typeof(buffer) *sctp = mace_peek(skb, offset, sizeof(buffer), &buffer);

	if (!sctp)
		return;
	ip->l4_src = ntohs(sctp->source);
	ip->l4_dst = ntohs(sctp->dest);
	ip->l4_seq = ntohl(sctp->tag);
	ip->flow = true;
	ip->used = offset + sizeof(buffer);
	mace_read_payload(skb, offset + sizeof(buffer), MACE_PAYLOAD_BYTES, ip);
}

static __always_inline void mace_read_l4(const struct sk_buff *skb, int offset, struct mace_ip *ip)
{
	if (ip->fragment_offset) {
		mace_read_payload(skb, offset, MACE_PAYLOAD_BYTES, ip);
		return;
	}
	ip->l4 = offset;
	switch (ip->l4_proto) {
	case IPPROTO_TCP:
		mace_read_tcp(skb, offset, ip);
		break;
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
		mace_read_udp(skb, offset, ip);
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		mace_read_icmp(skb, offset, ip);
		break;
	case IPPROTO_SCTP:
		mace_read_sctp(skb, offset, ip);
		break;
	default:
		mace_read_payload(skb, offset, MACE_PAYLOAD_BYTES, ip);
	}
}

static __always_inline bool mace_read_ipv4(const struct sk_buff *skb, int offset,
					   struct mace_ip *ip)
{
	struct iphdr buffer __uninitialized;
	const struct iphdr *header = mace_peek(skb, offset, sizeof(buffer), &buffer);
	u16 fragment;

	if (!header || header->version != 4 || header->ihl < 5)
		return false;
	fragment = ntohs(header->frag_off);
	ip->version = 4;
	ip->l4_proto = header->protocol;
	ip->id = ntohs(header->id);
	ip->length = ntohs(header->tot_len);
	ip->fragment = fragment & (IP_MF | IP_OFFSET);
	ip->fragment_offset = (fragment & IP_OFFSET) * 8;
	/* A length of 0: a TCP segment too long for the field (BIG TCP), as long as its buffer. */
	ip->end = ip->length ? offset + ip->length : (int)skb->len;
	mace_read_l4(skb, offset + header->ihl * 4, ip);
	return true;
}

static noinline bool mace_read_ipv6(const struct sk_buff *skb, int offset, struct mace_ip *ip)
{
	struct ipv6hdr buffer __uninitialized;
	const struct ipv6hdr *header = mace_peek(skb, offset, sizeof(buffer), &buffer);
	struct frag_hdr extension_buffer __uninitialized;
	/* The longest of them; all begin with the next header's number. */
	const struct frag_hdr *extension;
	int i, bytes;

	if (!header || header->version != 6)
		return false;
	ip->version = 6;
	ip->l4_proto = header->nexthdr;
	ip->length = ntohs(header->payload_len);
	offset += sizeof(*header);
	ip->end = ip->length ? offset + ip->length : (int)skb->len;
	for (i = 0; i < MACE_EXTENSION_HEADERS_MAX && !ip->fragment_offset; i++) {
		u8 proto = ip->l4_proto;

		if (proto != NEXTHDR_HOP && proto != NEXTHDR_ROUTING && proto != NEXTHDR_FRAGMENT &&
		    proto != NEXTHDR_DEST && proto != NEXTHDR_AUTH)
			break;
		extension = mace_peek(skb, offset, sizeof(extension_buffer), &extension_buffer);
		if (!extension)
			return true;
		if (proto == NEXTHDR_FRAGMENT) {
			ip->fragment = true;
			ip->fragment_offset = ntohs(extension->frag_off) & IP6_OFFSET;
			ip->id = (u16)ntohl(extension->identification);
			bytes = sizeof(*extension);
		} else {
			/* The second byte is a length: RFC 8200, 4.3, and RFC 4302, 2.2. */
			bytes = proto == NEXTHDR_AUTH ? (extension->reserved + 2) * 4 :
							(extension->reserved + 1) * 8;
		}
		ip->l4_proto = extension->nexthdr;
		offset += bytes;
	}
	mace_read_l4(skb, offset, ip);
	return true;
}

static bool mace_read_ip(const struct sk_buff *skb, int offset, __be16 protocol, struct mace_ip *ip)
{
	mace_clear(ip, sizeof(*ip));
	if (protocol == htons(ETH_P_IP))
		return mace_read_ipv4(skb, offset, ip);
	if (protocol == htons(ETH_P_IPV6))
		return mace_read_ipv6(skb, offset, ip);
	return false;
}

static u64 mace_hash(u64 first, u64 second, u64 third, u64 fourth)
{
	/* 0 stands for "unknown". */
	return siphash_4u64(first, second, third, fourth, &mace_content_key) ?: 1;
}

static __always_inline u64 mace_ip_key(const struct mace_ip *ip)
{
	u64 first = (u64)ip->version << 56 | (u64)ip->l4_proto << 48 | (u64)ip->l4_bits << 40 |
		    (u64)ip->l4_code << 32 | (u64)ip->length << 16 | ip->id;
	u64 second = (u64)ip->l4_seq << 32 | ip->l4_ack;

	if (ip->fragment)
		second = (u64)1 << 63 | ip->fragment_offset;
	else if (ip->l4_proto == IPPROTO_ICMP || ip->l4_proto == IPPROTO_ICMPV6)
		second = ip->l4_dst;
	return mace_hash(first, second, ip->payload[0], ip->payload[1]);
}

static u64 mace_other_key(const struct sk_buff *skb, int offset, __be16 protocol)
{
	u64 buffer[3] __uninitialized;
	const void *start = mace_peek(skb, offset, sizeof(buffer), buffer);

	if (!start)
		return 0;
	if (start != buffer)
		memcpy(buffer, start, sizeof(buffer));
	return mace_hash(ntohs(protocol), buffer[0], buffer[1], buffer[2]);
}

/* The offset and the protocol of what VLAN tags in the packet's data carry; the last one's @tci. */
static int mace_skip_vlan(const struct sk_buff *skb, int offset, __be16 *protocol, int *tci)
{
	struct vlan_hdr buffer __uninitialized;
	const struct vlan_hdr *tag;
	int i;

	for (i = 0; i < 2 && eth_type_vlan(*protocol); i++) {
		tag = mace_peek(skb, offset, sizeof(buffer), &buffer);
		if (!tag)
			break;
		*tci = ntohs(tag->h_vlan_TCI);
		*protocol = tag->h_vlan_encapsulated_proto;
		offset += sizeof(*tag);
	}
	return offset;
}

static u64 mace_inner_key(const struct sk_buff *skb, int offset)
{
	struct ethhdr buffer __uninitialized;
	const struct ethhdr *frame = mace_peek(skb, offset, sizeof(buffer), &buffer);
	struct mace_ip ip __uninitialized;
	__be16 protocol;
	int tci;

	if (!frame)
		return 0;
	protocol = frame->h_proto;
	offset = mace_skip_vlan(skb, offset + sizeof(*frame), &protocol, &tci);
	if (mace_read_ip(skb, offset, protocol, &ip))
		return mace_ip_key(&ip);
	return mace_other_key(skb, offset, protocol);
}

/* What of @mask's bytes, from the network layer's header on, NAT and routing rewrite. */
static void mace_leave_out(u8 *mask, const struct mace_ip *ip, int l4)
{
	if (ip->version == 4) {
		mask[8] = 0; /* TTL */
		memset(mask + 10, 0, 2 + 4 + 4); /* checksum, addresses */
	} else {
		mask[7] = 0; /* hop limit */
		memset(mask + 8, 0, 16 + 16); /* addresses */
	}
	if (!ip->flow)
		return;
	switch (ip->l4_proto) {
	case IPPROTO_TCP:
		memset(mask + l4, 0, 4); /* ports */
		memset(mask + l4 + 16, 0, 2); /* checksum */
		break;
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
		/* The destination says whether to look for VXLAN. */
		memset(mask + l4, 0, 2);
		memset(mask + l4 + 6, 0, 2);
		break;
	case IPPROTO_SCTP:
		memset(mask + l4, 0, 4);
		memset(mask + l4 + 8, 0, 4);
		break;
	default: /* an echo's checksum and identifier */
		memset(mask + l4 + 2, 0, 2 + 2);
	}
}

static void mace_set_masks(struct mace_known *known, const struct mace_ip *ip, int l4, int bytes)
{
	u64 mask[MACE_KNOWN_BYTES / sizeof(u64)] __uninitialized;
	int i;

	for (i = 0; i < MACE_KNOWN_BYTES / sizeof(u64); i++)
		WRITE_ONCE(mask[i], ~0ULL);
	mace_leave_out((u8 *)mask, ip, l4);
	for (i = 0; i < MACE_KNOWN_BYTES / sizeof(u64); i++)
		known->words[i].mask = mask[i];
	known->last.mask = get_unaligned((const u64 *)((u8 *)mask + bytes - sizeof(u64)));
}

/* @known's record was read from @ip, which is at @offset: know it again, if that is possible. */
static __always_inline void mace_know(struct mace_known *known, const struct sk_buff *skb,
				      int offset, __be16 protocol, const struct mace_ip *ip)
{
	int bytes = ip->used - offset, l4 = ip->l4 - offset;
	const u8 *at = skb->data + offset, *last = at + bytes - sizeof(u64);
	struct mace_word *word = known->words;
	u32 shape;

	/* Not what depends on the length of the buffer, or on bytes outside its linear part. */
	if (!ip->used || !ip->length || ip->inner || bytes < MACE_KNOWN_BYTES_MIN ||
	    bytes > MACE_KNOWN_BYTES || offset + bytes > (int)skb_headlen(skb))
		return;
	/* All that the masks depend on, each with bits of its own; never 0. */
	shape = ip->version | ip->l4_proto << 8 | bytes << 16 | (ip->flow ? l4 << 24 : 0);
	if (unlikely(known->shape != shape)) {
		mace_set_masks(known, ip, l4, bytes);
		known->shape = shape;
	}
	for (; at < last; at += sizeof(u64), word++)
		word->bytes = get_unaligned((const u64 *)at);
	known->last.bytes = get_unaligned((const u64 *)last);
	known->bytes = bytes;
	known->protocol = (__force u16)protocol;
	if (ip->flow)
		known->ports = ip->l4_proto == IPPROTO_ICMP || ip->l4_proto == IPPROTO_ICMPV6 ?
				       l4 + offsetof(struct icmphdr, un.echo.id) :
				       l4;
}

static void mace_read_anew(struct mace_known *known, const struct sk_buff *skb, int offset,
			   __be16 protocol)
{
	struct mace_record *record = &known->record;
	struct mace_ip ip __uninitialized;

	known->protocol = MACE_KNOWN_NOTHING;
	known->ports = 0;
	known->flags = 0;
	known->skb = NULL;
	mace_clear(record, sizeof(*record));
	if (!mace_read_ip(skb, offset, protocol, &ip)) {
		record->packet_key = mace_other_key(skb, offset, protocol);
		if (record->packet_key)
			known->flags = MACE_FLAG_KEY;
		return;
	}
	record->ip_version = ip.version;
	record->l4_proto = ip.l4_proto;
	record->ip_id = ip.version == 4 ? ip.id : 0;
	record->l4_src = ip.l4_src;
	record->l4_dst = ip.l4_dst;
	record->l4_seq = ip.fragment_offset;
	record->l4_bits = ip.l4_bits;
	if (ip.flow && (ip.l4_proto == IPPROTO_TCP || ip.l4_proto == IPPROTO_SCTP))
		record->l4_seq = ip.l4_seq;
	known->flags = MACE_FLAG_KEY;
	if (ip.flow)
		known->flags |= MACE_FLAG_FLOW;
	if (ip.fragment)
		known->flags |= MACE_FLAG_FRAGMENT;
	if (ip.inner)
		record->packet_key = mace_inner_key(skb, ip.inner);
	if (record->packet_key)
		known->flags |= MACE_FLAG_TUNNEL;
	else
		record->packet_key = mace_ip_key(&ip);
	mace_know(known, skb, offset, protocol, &ip);
}

static bool mace_is_known(const struct mace_known *known, const struct sk_buff *skb, int offset,
			  __be16 protocol)
{
	const unsigned char *at = skb->data + offset;

	return (__force u16)protocol == known->protocol && at >= skb->head &&
	       offset + (int)known->bytes <= (int)skb_headlen(skb) && mace_is_same(known, at);
}

/* Whichever packet it is: the one that was seen last, the one before, or another. */
static __always_inline struct mace_known *mace_read(const struct sk_buff *skb, int offset,
						    __be16 protocol)
{
	struct mace_known_cpu *cpu = this_cpu_ptr(&mace_known);
	struct mace_known *known = cpu->latest;

	if (!mace_is_known(known, skb, offset, protocol)) {
		known = known == cpu->packets ? cpu->packets + 1 : cpu->packets;
		/* The compiler would rather calculate the address at each use. */
		OPTIMIZER_HIDE_VAR(known);
		cpu->latest = known;
		if (!mace_is_known(known, skb, offset, protocol))
			mace_read_anew(known, skb, offset, protocol);
	}
	mace_read_ports(known, skb, offset);
	return known;
}

/*
 * A packet whose protocol is a VLAN's. The network header of one whose tag was put into its data on
 * the way to the driver (validate_xmit_vlan) is that behind the tag. Else the tag is what comes
 * next.
 */
static noinline int mace_find_vlan(const struct sk_buff *skb, int offset, __be16 *protocol,
				   int *tci)
{
	struct vlan_hdr buffer __uninitialized;
	const struct vlan_hdr *tag = NULL;

	if (offset >= ETH_HLEN + VLAN_HLEN)
		tag = mace_peek(skb, offset - VLAN_HLEN, VLAN_HLEN, &buffer);
	if (!tag)
		return mace_skip_vlan(skb, offset, protocol, tci);
	*tci = ntohs(tag->h_vlan_TCI);
	*protocol = tag->h_vlan_encapsulated_proto;
	return offset;
}

/**
 * mace_packet_read_other() - mace_packet_read_device() for a packet that it does not know
 * @skb: the packet
 * @l3_offset: where the network layer begins, from skb->data
 *
 * Context: interrupts off. Return: as there.
 */
struct mace_known *mace_packet_read_other(const struct sk_buff *skb, int l3_offset)
{
	int tci = skb_vlan_tag_present(skb) ? skb_vlan_tag_get(skb) : -1;
	__be16 protocol = skb->protocol;
	struct mace_known *known;

	/* An offset of nobody's making, as of a packet socket's frame that was never parsed. */
	if (unlikely((unsigned int)l3_offset > skb->len))
		l3_offset = min_t(int, skb->dev->hard_header_len, skb->len);
	if (unlikely(eth_type_vlan(protocol)))
		l3_offset = mace_find_vlan(skb, l3_offset, &protocol, &tci);
	known = mace_read(skb, l3_offset, protocol);
	known->record.l3_len = max_t(int, (int)skb->len - l3_offset, 0);
	known->record.vlan = tci < 0 ? 0 : tci;
	known->record.flags = known->flags | (tci < 0 ? 0 : MACE_FLAG_VLAN);
	return known;
}

/**
 * mace_packet_read_buffer() - mace_packet_read_any() for a buffer that it does not know
 * @skb: as there
 *
 * Context: interrupts off. Return: as there.
 */
struct mace_known *mace_packet_read_buffer(const struct sk_buff *skb)
{
	struct mace_known *known;

	if (skb->head && skb->network_header && skb_network_offset(skb) <= (int)skb_headlen(skb) &&
	    (skb->protocol == htons(ETH_P_IP) || skb->protocol == htons(ETH_P_IPV6))) {
		known = mace_read(skb, skb_network_offset(skb), skb->protocol);
		if (known->record.ip_version) {
			known->record.l3_len = 0;
			known->record.vlan = 0;
			known->record.flags = known->flags;
			return known;
		}
	}
	known = this_cpu_ptr(&mace_known.nothing);
	known->skb = NULL;
	mace_clear(&known->record, sizeof(known->record));
	return known;
}

void __init mace_packet_init(void)
{
	int cpu;

	for_each_possible_cpu(cpu) {
		struct mace_known_cpu *known = per_cpu_ptr(&mace_known, cpu);

		known->packets[0].protocol = MACE_KNOWN_NOTHING;
		known->packets[1].protocol = MACE_KNOWN_NOTHING;
		known->latest = known->packets;
	}
}
