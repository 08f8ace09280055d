/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The interface between the programs and their loader. collector/bpf/layout.py mirrors this file by
 * hand (tests/contract/test_bpf_layout.py compares the two).
 *
 * Each CPU has its own ring, which is its element of the map mace_rings: in the object for kernels
 * before v6.2 a BPF ring buffer, in the other object an array that the reader maps (struct
 * mace_ring). A ring holds records of struct mace_record (kmod/uapi/mace.h). A record's pad, which
 * has no other use, holds the lower 24 bits of the number of records that this CPU had lost by then, lowest byte first. If
 * that number changes from one record to the next, records are missing between the two.
 */
#ifndef _MACE_BPF_H
#define _MACE_BPF_H

#include <linux/types.h>

#include "../kmod/uapi/mace.h"

/**
 * struct mace_config - a session's filter and settings; the loader writes them before it loads
 *
 * The verifier knows these values as constants and removes the code of unused filters, so such a
 * filter costs nothing.
 *
 * @skb_key: random key of the hash that turns a buffer's address into skb_id
 * @l4_protos: bit p of the 256 selects IP protocol number p (bit 0 also packets that are not IP)
 * @sample_mask: bits of packet_key that are 0 in the packets to record; 0 records all packets
 * @wake_every: number of records of a CPU after which it wakes the reader, a power of two
 * @l4_filtered: 1 applies @l4_protos, 0 records all protocols
 * @place_filtered: 1 applies the places of struct mace_state, 0 records packets everywhere
 * @cookies: 1 identifies namespaces by cookie, 0 by inode
 * @paged: 1 if this kernel lets programs read a buffer's pages (bpf_dynptr_from_skb())
 * @ring_slots: number of slots of each struct mace_ring, a power of two above MACE_RING_MARGIN
 * @hooks: bit n: the programs of hook n record. With MACE_HOOK_IP_RCV, receptions are noted
 */
struct mace_config {
	__u64 skb_key[2];
	__u64 l4_protos[4];
	__u32 sample_mask;
	__u32 wake_every;
	__u32 l4_filtered;
	__u32 place_filtered;
	__u32 cookies;
	__u32 paged;
	__u32 ring_slots;
	__u32 hooks;
};

/* A place of struct mace_state that no packet is at; no namespace and no device has this number. */
#define MACE_NO_PLACE 0xffffffffffffffffULL

/**
 * struct mace_state - variables that the loader writes while the programs are loaded
 *
 * @recording: 1 while the programs record. The loader sets it once all programs are attached, and
 *	clears it before it detaches them
 * @pad: 0
 * @nothing: always 0, but unknown to the verifier: see MACE_FORGET()
 * @netns: namespaces to record, by cookie or inode (see mace_config.cookies)
 * @device: devices to record: ifindex in the upper half, in the lower half that of the namespace's
 *	cookie or inode
 * @netns_count: number of elements of @netns in use; the loader writes an element first
 * @device_count: the same for @device
 *
 * A packet is recorded if its namespace or its device is among them. Each element is written at
 * once and may be MACE_NO_PLACE, so a change affects no packet at the places that stay.
 */
struct mace_state {
	__u32 recording;
	__u32 pad;
	__u64 nothing;
	__u64 netns[MACE_MAX_NETNS];
	__u64 device[MACE_MAX_DEVICES];
	__u32 netns_count;
	__u32 device_count;
};

/**
 * struct mace_counts - one CPU's counts; an element of the map mace_cpus begins with them
 *
 * @calls: runs of each hook's program while recording
 * @lost: records of each hook that were lost because the ring was full or the CPU had none
 * @lost_all: sum of @lost over all hooks
 * @since_wake: records that the CPU has written to a BPF ring buffer since it last woke the reader
 */
struct mace_counts {
	__u64 calls[MACE_HOOK_SLOTS];
	__u64 lost[MACE_HOOK_SLOTS];
	__u64 lost_all;
	__u64 since_wake;
};

/**
 * struct mace_ring - head of a CPU's ring; mace_config.ring_slots slots of 64 bytes follow it
 *
 * @head: number of slots that programs have reserved so far; the next is @head modulo the slots
 * @tail: number of slots that the reader has released so far; only the reader writes it
 * @pad: 0
 *
 * A program reserves a slot by an atomic addition to @head, and then writes a record to it with
 * MACE_WRITTEN in the last store. A program that interrupts it does the same with a slot behind. The
 * reader takes slots in order up to the first without MACE_WRITTEN, clears the bit in each, and
 * later adds their number to @tail.
 */
struct mace_ring {
	__u64 head;
	__u64 tail;
	__u64 pad[6];
};

/* Bit of mace_record.hook in a slot of struct mace_ring that is completely written. */
#define MACE_WRITTEN 0x80

/*
 * Slots that the programs leave free. A program that is interrupted between its look at @head and
 * its addition adds to a @head that has moved. The kernel does not run a program inside itself on a
 * CPU, so at most one run per hook is between the two.
 */
#define MACE_RING_MARGIN MACE_HOOK_SLOTS

/* Largest number of devices that one run of walk_devices describes. */
#define MACE_WALK_DEVICES 64

/**
 * enum mace_walked - what walk_devices returns
 *
 * @MACE_WALK_DONE: all devices were described, by this run and those before
 * @MACE_WALK_MORE: run it again for the next devices
 * @MACE_WALK_LOST: the place to continue at has disappeared: begin again
 */
enum mace_walked {
	MACE_WALK_DONE = 0,
	MACE_WALK_MORE = 1,
	MACE_WALK_LOST = 2,
};

/**
 * struct mace_netdev - a device, as walk_devices describes it in the map mace_netdevs
 *
 * @netns_cookie: cookie of the device's namespace; 0 before Linux 5.12
 * @netns: inode of the device's namespace
 * @proc_stat: inode of /proc/PID/net/stat for each process PID in the namespace. Any user may query it
 * @ifindex: the device, from 1 on; 0 if this element describes no device
 * @peer_netns: inode of the namespace of @peer_ifindex; of a VXLAN device that sends from another namespace, that one
 * @peer_ifindex: the other end of a veth or netkit pair, or 0
 * @lower_netns: inode of the namespace of @lower_ifindex
 * @lower_ifindex: the first of the devices below this one, or 0
 * @master_ifindex: the device of the same namespace that this one is a port of, or 0
 * @type: ARPHRD_*
 * @initial: 1 if the namespace is the one that the kernel started with, else 0
 * @pad: 0
 * @name: name, filled up with zeros
 * @kind: rtnetlink's kind, filled up with zeros; empty for hardware and loopback
 */
struct mace_netdev {
	__u64 netns_cookie;
	__u32 netns;
	__u32 proc_stat;
	__u32 ifindex;
	__u32 peer_netns;
	__u32 peer_ifindex;
	__u32 lower_netns;
	__u32 lower_ifindex;
	__u32 master_ifindex;
	__u16 type;
	__u16 initial;
	__u32 pad;
	__u8 name[16];
	__u8 kind[16];
};

#endif
