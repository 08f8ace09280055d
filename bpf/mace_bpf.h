/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the programs and whoever loads them agree on. collector/bpf/layout.py mirrors it by hand
 * (tests/contract/test_bpf_layout.py compares the two).
 *
 * Each CPU has a BPF ring buffer of its own, an entry of the map mace_rings. Every record in it is
 * a struct mace_record of kmod/uapi/mace.h. Its pad, which has no other use, holds the lower 24
 * bits of how many records this CPU had lost by then, lowest byte first: where that number changes
 * from one record to the next, records are missing between the two.
 */
#ifndef _MACE_BPF_H
#define _MACE_BPF_H

#include <linux/types.h>

#include "../kmod/uapi/mace.h"

/**
 * struct mace_config - what a session wants; written before the programs are loaded
 *
 * The verifier knows these numbers, so that a filter that is not asked for costs nothing.
 *
 * @skb_key: key of the hash that makes skb_id of a buffer's address; random
 * @netns: namespaces to record, by name
 * @place_netns: namespace of each device to record, by name
 * @l4_protos: bit p of the 256: IP protocol number p (bit 0: also all that is not IP)
 * @place_ifindex: index of each device to record
 * @netns_count: how many namespaces there are; 0: every one
 * @place_count: how many devices; 0: every one
 * @sample_mask: bits of packet_key that are 0 in the packets to record; 0: all packets
 * @wake_every: records of a CPU after which the reader is woken
 * @l4_filtered: whether @l4_protos counts
 * @cookies: a namespace's name is its cookie, else its inode
 */
struct mace_config {
	__u64 skb_key[2];
	__u64 netns[MACE_MAX_NETNS];
	__u64 place_netns[MACE_MAX_DEVICES];
	__u64 l4_protos[4];
	__u32 place_ifindex[MACE_MAX_DEVICES];
	__u32 netns_count;
	__u32 place_count;
	__u32 sample_mask;
	__u32 wake_every;
	__u32 l4_filtered;
	__u32 cookies;
};

/**
 * struct mace_state - what changes while the programs are loaded
 *
 * @recording: whether they record; set when all of them are attached, cleared before they are
 *	detached
 * @pad: 0
 * @nothing: stays 0, which the verifier does not know: see MACE_FORGET()
 */
struct mace_state {
	__u32 recording;
	__u32 pad;
	__u64 nothing;
};

/**
 * struct mace_counts - what a CPU counted; the beginning of an entry of the map mace_cpus
 *
 * @calls: runs of each hook's program while recording
 * @lost: records of each hook that found no room in the ring, or no ring
 * @lost_all: their sum
 * @since_wake: records since the reader was woken
 */
struct mace_counts {
	__u64 calls[MACE_HOOK_SLOTS];
	__u64 lost[MACE_HOOK_SLOTS];
	__u64 lost_all;
	__u64 since_wake;
};

#endif
