/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * The hash that a packet_key is. The module and the BPF programs compile this file, so that hosts
 * with different sources give one packet the same key; collector/pcap/packet_key.py has the same
 * in numpy. What goes into the words is in mace_packet.c.
 */
#ifndef _UAPI_MACE_KEY_H
#define _UAPI_MACE_KEY_H

#include <linux/types.h>

/**
 * struct mace_words - what a packet_key is the hash of
 *
 * @first: version, protocol, l4_bits, code (8 bits each), length and identification (16 each); of
 *	a packet that is not IP the EtherType
 * @second: sequence number and the one acknowledged (32 bits each), or what stands in their place
 * @payload: the first eight bytes of payload
 * @payload2: the next eight
 */
struct mace_words {
	__u64 first;
	__u64 second;
	__u64 payload;
	__u64 payload2;
};

/* Fixed, so that hosts agree; nothing is secret about it. */
#define MACE_KEY_SEED 0x4d41434520706b74ULL
#define MACE_KEY_FACTOR 0xc6a4a7935bd1e995ULL
#define MACE_KEY_SHIFT 47

/* Words that differ make hashes that differ, and hashes that differ stay so. */
static __always_inline __u64 mace_key_of_word(__u64 hash, __u64 word)
{
	word *= MACE_KEY_FACTOR;
	word ^= word >> MACE_KEY_SHIFT;
	word *= MACE_KEY_FACTOR;
	return (hash ^ word) * MACE_KEY_FACTOR;
}

/*
 * MurmurHash64A (Appleby, 2008) of the words; not 0, which stands for "unknown". Two packets that
 * differ in one word have different keys, but for the two whose hashes are 0 and 1.
 */
static __always_inline __u64 mace_key(const struct mace_words *words)
{
	__u64 key = MACE_KEY_SEED ^ sizeof(*words) * MACE_KEY_FACTOR;

	key = mace_key_of_word(key, words->first);
	key = mace_key_of_word(key, words->second);
	key = mace_key_of_word(key, words->payload);
	key = mace_key_of_word(key, words->payload2);
	key ^= key >> MACE_KEY_SHIFT;
	key *= MACE_KEY_FACTOR;
	key ^= key >> MACE_KEY_SHIFT;
	return key ? key : 1;
}

#endif
