/*
 * As much of the kernel as kmod/mace_packet.c uses, for a program in user space: one CPU, a buffer with a linear part and
 * pages, and the real arithmetic. test_packet_module.py compiles it in front of that file.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <linux/if_ether.h>
#include <linux/types.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#undef __always_inline
#define __always_inline inline __attribute__((always_inline))
#define noinline __attribute__((noinline))
#define __force
#define __init
#define __read_mostly
#define __uninitialized
#define likely(condition) __builtin_expect(!!(condition), 1)
#define unlikely(condition) __builtin_expect(!!(condition), 0)
#define IS_ENABLED(option) 0
/* Of mace_compat.h: what else it has for kernels without is not used here. */
#define MACE_HAVE_VM_FLAGS_MOD
#define BIT_ULL(n) (1ULL << (n))
#define PAGE_SIZE 4096ULL
#define offset_in_page(address) ((uintptr_t)(address) & (PAGE_SIZE - 1))
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define min_t(type, a, b) min((type)(a), (type)(b))
#define max_t(type, a, b) max((type)(a), (type)(b))

#define cpu_to_be64 htobe64
#define be64_to_cpu be64toh
#define get_unaligned(at)                                    \
	({                                                   \
		struct {                                     \
			__typeof__(*(at)) value;             \
		} __attribute__((packed)) const *at_ = (const void *)(at); \
		at_->value;                                  \
	})
#define get_unaligned_be64(at) be64toh(get_unaligned((const u64 *)(at)))
#define get_unaligned_be16(at) be16toh(get_unaligned((const u16 *)(at)))

/* --- one CPU ---------------------------------------------------------------------- */

#define DECLARE_PER_CPU(type, name) extern __typeof__(type) name
#define DEFINE_PER_CPU(type, name) __typeof__(type) name
#define this_cpu_ptr(variable) (variable)
#define this_cpu_read(variable) (variable)
#define this_cpu_write(variable, value) ((variable) = (value))
#define per_cpu(variable, cpu) (variable)
#define for_each_possible_cpu(cpu) for (cpu = 0; cpu < 1; cpu++)
#define cpu_to_node(cpu) 0
#define GFP_KERNEL 0
#define kvzalloc_node(bytes, flags, node) calloc(1, bytes)
#define kvfree free
#define get_random_bytes(buffer, bytes) memset(buffer, 7, bytes)

#define GOLDEN_RATIO_64 0x61c8864680b583ebULL

static inline u32 hash_ptr(const void *pointer, unsigned int bits)
{
	return (u64)pointer * GOLDEN_RATIO_64 >> (64 - bits);
}

/* --- SipHash-2-4 (Aumasson and Bernstein, 2012, section 2) ------------------------ */

typedef struct {
	u64 key[2];
} siphash_key_t;

static void sip_rounds(u64 v[4], int count)
{
#define SIP_ROTATE(word, bits) (word = word << (bits) | word >> (64 - (bits)))
	for (; count; count--) {
		v[0] += v[1];
		v[2] += v[3];
		SIP_ROTATE(v[1], 13);
		SIP_ROTATE(v[3], 16);
		v[1] ^= v[0];
		v[3] ^= v[2];
		SIP_ROTATE(v[0], 32);
		v[2] += v[1];
		v[0] += v[3];
		SIP_ROTATE(v[1], 17);
		SIP_ROTATE(v[3], 21);
		v[1] ^= v[2];
		v[3] ^= v[0];
		SIP_ROTATE(v[2], 32);
	}
}

static u64 siphash_words(const u64 *words, int count, const siphash_key_t *key)
{
	u64 v[4] = { key->key[0] ^ 0x736f6d6570736575ULL, key->key[1] ^ 0x646f72616e646f6dULL,
		     key->key[0] ^ 0x6c7967656e657261ULL, key->key[1] ^ 0x7465646279746573ULL };
	int i;

	for (i = 0; i <= count; i++) {
		u64 word = i < count ? words[i] : (u64)count * 8 << 56;

		v[3] ^= word;
		sip_rounds(v, 2);
		v[0] ^= word;
	}
	v[2] ^= 0xff;
	sip_rounds(v, 4);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

#define siphash_1u64(a, key) siphash_words((const u64[]){ a }, 1, key)

/* --- a buffer --------------------------------------------------------------------- */

typedef struct {
	u8 *bytes;
	int size;
} skb_frag_t;

struct skb_shared_info {
	int nr_frags;
	skb_frag_t frags[2];
};

struct net_device {
	int hard_header_len;
};

struct sk_buff {
	u8 *head;
	u8 *data;
	unsigned int len;
	unsigned int data_len;
	u16 network_header;
	__be16 protocol;
	struct net_device *dev;
	struct skb_shared_info shared;
};

#define skb_shinfo(skb) (&(skb)->shared)
#define skb_headlen(skb) ((skb)->len - (skb)->data_len)
#define skb_is_nonlinear(skb) ((skb)->data_len)
#define skb_network_offset(skb) ((int)((skb)->head + (skb)->network_header - (skb)->data))
#define skb_vlan_tag_present(skb) 0
#define skb_vlan_tag_get(skb) 0
#define skb_frag_size(frag) ((unsigned int)(frag)->size)
#define skb_frag_page(frag) ((struct page *)(frag)->bytes)
#define page_address(page) ((void *)(page))
#define skb_frag_off(frag) ((void)(frag), 0)

static int skb_copy_bits(const struct sk_buff *skb, int offset, void *to, int len)
{
	int i, at;

	if (offset < skb->head - skb->data || offset > (int)skb->len - len)
		return -EFAULT;
	for (i = 0; i < len; i++) {
		at = offset + i - (int)skb_headlen(skb);
		((u8 *)to)[i] = at < 0 ? skb->data[offset + i] :
				at < skb->shared.frags[0].size ?
					 skb->shared.frags[0].bytes[at] :
					 skb->shared.frags[1].bytes[at - skb->shared.frags[0].size];
	}
	return 0;
}

/* --- headers ---------------------------------------------------------------------- */

#define VLAN_HLEN 4
#define ETH_P_TEB 0x6558
#define IP_MF 0x2000
#define IP_OFFSET 0x1fff
#define IP6_OFFSET 0xfff8
#define NEXTHDR_HOP 0
#define NEXTHDR_ROUTING 43
#define NEXTHDR_FRAGMENT 44
#define NEXTHDR_AUTH 51
#define NEXTHDR_DEST 60
#define ICMP_ECHO 8
#define ICMP_ECHOREPLY 0
#define eth_type_vlan(protocol) ((protocol) == htons(0x8100) || (protocol) == htons(0x88a8))

struct vlan_hdr {
	__be16 h_vlan_TCI;
	__be16 h_vlan_encapsulated_proto;
};

struct iphdr {
	u8 bytes[6];
	__be16 frag_off;
	u8 more[12];
};

struct ipv6hdr {
	u8 bytes[40];
};

struct tcphdr {
	__be16 source;
	__be16 dest;
	__be32 seq;
	u8 bytes[12];
};

struct udphdr {
	__be16 source;
	__be16 dest;
	__be16 len;
	__be16 check;
};

struct icmphdr {
	u8 type;
	u8 code;
	__be16 checksum;
	union {
		struct {
			__be16 id;
			__be16 sequence;
		} echo;
	} un;
};
