/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * The ABI between mace.ko and whoever reads /dev/mace. This file is its only truth: the module is
 * compiled with it, and contracts/abi.py mirrors it by hand (tests/contract/test_abi.py compares
 * the two).
 *
 * How a reader works:
 *
 *	fd = open("/dev/mace")
 *	ioctl(fd, MACE_IOC_HELLO)	compare abi_major: another one is another ABI
 *	ioctl(fd, MACE_IOC_SETUP)	filter, and rings for every online CPU
 *	ioctl(fd, MACE_IOC_PLACES)	where to record, if not everywhere; at any time from here on
 *	mmap(fd, cpu * ring_bytes)	read-only, one mapping per CPU
 *	ioctl(fd, MACE_IOC_START)
 *	poll(fd), ioctl(fd, MACE_IOC_TAKE) per CPU: release what was read, learn what is ready
 *	ioctl(fd, MACE_IOC_STOP), a last MACE_IOC_TAKE per CPU, close(fd)
 *
 * A ring is an array of sub-buffers, written and handed over in order, round and round. Memory
 * that TAKE has handed over does not change until a later TAKE releases it. TAKE is the ordering
 * point: all that was written to a sub-buffer before it was handed over is visible after TAKE
 * returns, so a reader needs no barrier.
 *
 * When all sub-buffers are full, new records are discarded and counted, per CPU and hook. The next
 * sub-buffer to be opened says in its header how many are missing before its first record.
 *
 * Rules of growth: numbers are appended, never reused; a change that an old reader would misread
 * raises MACE_ABI_MAJOR, any other MACE_ABI_MINOR. All padding is zero, and a request with other
 * padding is refused.
 */
#ifndef _UAPI_MACE_H
#define _UAPI_MACE_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define MACE_ABI_MAJOR 1
#define MACE_ABI_MINOR 2

#define MACE_DEVICE_NAME "mace"

/**
 * enum mace_hook - observation points
 *
 * The numbers are those of capture files too.
 *
 * @MACE_HOOK_INVALID: no hook
 * @MACE_HOOK_NET_DEV_QUEUE: net:net_dev_queue
 * @MACE_HOOK_NET_DEV_START_XMIT: net:net_dev_start_xmit
 * @MACE_HOOK_NETIF_RX: net:netif_rx
 * @MACE_HOOK_NETIF_RECEIVE_SKB: net:netif_receive_skb
 * @MACE_HOOK_NAPI_GRO_RECEIVE_ENTRY: net:napi_gro_receive_entry
 * @MACE_HOOK_SKB_COPY_DATAGRAM_IOVEC: skb:skb_copy_datagram_iovec
 * @MACE_HOOK_CONSUME_SKB: skb:consume_skb
 * @MACE_HOOK_KFREE_SKB: skb:kfree_skb
 * @MACE_HOOK_IP_RCV: ip_rcv() or ipv6_rcv(), of packets whose last net:netif_receive_skb was at
 *	another device
 * @MACE_HOOK_COUNT: one more than the last
 */
enum mace_hook {
	MACE_HOOK_INVALID = 0,
	MACE_HOOK_NET_DEV_QUEUE = 1,
	MACE_HOOK_NET_DEV_START_XMIT = 2,
	MACE_HOOK_NETIF_RX = 3,
	MACE_HOOK_NETIF_RECEIVE_SKB = 4,
	MACE_HOOK_NAPI_GRO_RECEIVE_ENTRY = 5,
	MACE_HOOK_SKB_COPY_DATAGRAM_IOVEC = 6,
	MACE_HOOK_CONSUME_SKB = 7,
	MACE_HOOK_KFREE_SKB = 8,
	MACE_HOOK_IP_RCV = 9,
	MACE_HOOK_COUNT
};

/* Room for hooks in arrays of the ABI, so that a hook can be appended without another layout. */
#define MACE_HOOK_SLOTS 16

/* Bits of mace_record.flags. */
#define MACE_FLAG_KEY 0x01 /* packet_key is known */
#define MACE_FLAG_FRAGMENT 0x02 /* a fragment of an IP packet; l4_seq holds its offset in bytes */
#define MACE_FLAG_TUNNEL 0x04 /* a tunnel: packet_key is the inner packet's, else the outer's */
#define MACE_FLAG_VLAN 0x08 /* tagged: vlan holds the tag */
#define MACE_FLAG_CLONED 0x10 /* the buffer's data is shared with a clone */
#define MACE_FLAG_RECALLED \
	0x20 /* netns and ifindex are those of the packet's last device, not of this hook */
#define MACE_FLAG_FLOW 0x40 /* l4_src, l4_dst, l4_seq and l4_bits were read */

/**
 * struct mace_record - one packet at one hook; one cache line
 *
 * @ts_ns: CLOCK_MONOTONIC, nanoseconds; does not decrease within a ring
 * @skb_id: identity of the kernel buffer: a keyed hash of its address, with a key drawn at each
 *	load of the
 *	module. Equal while the buffer lives; reused afterwards
 * @packet_key: hash of what NAT, routing, bridging and encapsulation leave alone (see
 *	mace_packet.c); 0 if unknown
 * @netns: the device's network namespace: its inode, or the lower half of its cookie if SETUP asked
 *	for that (MACE_SETUP_COOKIES); 0 if the hook has no device and none is known
 * @ifindex: the device in that namespace; 0 likewise
 * @l3_len: bytes without the link-layer header; at MACE_HOOK_SKB_COPY_DATAGRAM_IOVEC the bytes
 *	copied; at the hooks
 *	that free, 0
 * @l4_src: source port, or ICMP identifier; host byte order
 * @l4_dst: destination port, or ICMP sequence number; host byte order
 * @l4_seq: TCP sequence number, SCTP verification tag, or the fragment's offset in bytes; host
 *	byte order
 * @drop_reason: enum skb_drop_reason of the running kernel at MACE_HOOK_KFREE_SKB, else 0
 * @gso_segs: segments this buffer will become on a wire; 0 or 1: itself
 * @cpu: CPU that ran the probe
 * @ip_id: IPv4 identification, host byte order; 0 for IPv6
 * @vlan: VLAN tag control information, host byte order
 * @hook: enum mace_hook
 * @ip_version: 4, 6, or 0 for what is not IP
 * @l4_proto: IP protocol number after the extension headers that were walked; 0 if not IP
 * @flags: MACE_FLAG_*
 * @l4_bits: TCP flags (FIN is bit 0), or ICMP type
 * @pad: 0
 */
struct mace_record {
	__u64 ts_ns;
	__u64 skb_id;
	__u64 packet_key;
	__u32 netns;
	__u32 ifindex;
	__u32 l3_len;
	__u16 l4_src;
	__u16 l4_dst;
	__u32 l4_seq;
	__u32 drop_reason;
	__u16 gso_segs;
	__u16 cpu;
	__u16 ip_id;
	__u16 vlan;
	__u8 hook;
	__u8 ip_version;
	__u8 l4_proto;
	__u8 flags;
	__u8 l4_bits;
	__u8 pad[3];
};

/**
 * struct mace_subbuf - head of a sub-buffer; the records follow it
 *
 * @sequence: number of this filling of a sub-buffer in its ring, from 0
 * @lost: records of this CPU that were discarded before the first record here and after the last
 *	one of the
 *	filling before
 * @lost_from_ns: time of the first of them; 0 if @lost is 0
 * @records: number of records
 * @cpu: the ring's CPU
 * @pad: 0
 */
struct mace_subbuf {
	__u64 sequence;
	__u64 lost;
	__u64 lost_from_ns;
	__u32 records;
	__u32 cpu;
	__u64 pad[4];
};

/* Bits of mace_hello.flags. */
#define MACE_HELLO_ALL 0x1 /* this session may see every network namespace */
#define MACE_HELLO_NETNS_GONE \
	0x2 /* the session's own namespace has died: no record will come any more */
#define MACE_HELLO_COOKIES 0x4 /* this kernel has cookies: MACE_SETUP_COOKIES may be asked for */

/**
 * struct mace_hello - who the module is, and what this session may
 *
 * @abi_major: MACE_ABI_MAJOR of the module
 * @abi_minor: MACE_ABI_MINOR of the module
 * @record_bytes: sizeof(struct mace_record)
 * @subbuf_head_bytes: sizeof(struct mace_subbuf)
 * @hooks: bit n: this kernel has hook n
 * @flags: MACE_HELLO_*
 * @netns: inode of the opener's network namespace
 * @cpus: CPUs that this kernel can have; their numbers are less than this
 * @ring_bytes_min: least memory of one CPU's ring, bytes
 * @ring_bytes_max: most memory of one CPU's ring, bytes (module parameter)
 * @load_id: random, drawn when the module was loaded: skb_ids of different loads cannot be
 *	compared
 * @version: the module's version, NUL-terminated
 */
struct mace_hello {
	__u16 abi_major;
	__u16 abi_minor;
	__u16 record_bytes;
	__u16 subbuf_head_bytes;
	__u32 hooks;
	__u32 flags;
	__u32 netns;
	__u32 cpus;
	__u64 ring_bytes_min;
	__u64 ring_bytes_max;
	__u64 load_id;
	char version[32];
};

#define MACE_MAX_NETNS 16
#define MACE_MAX_DEVICES 16
#define MACE_MAX_SAMPLE_SHIFT 31

/**
 * struct mace_device - a device to be let through
 *
 * @netns_fd: file descriptor of its network namespace, or -1 for the opener's
 * @ifindex: its index there
 */
struct mace_device {
	__s32 netns_fd;
	__u32 ifindex;
};

/**
 * struct mace_filter - what to record; what is named must all hold
 *
 * A packet at a hook without a device counts as being where it was seen last.
 *
 * @hooks: bit n: hook n; 0: all that there are
 * @sample_shift: of all packets 1/2^n, the same at every hook and in every session with this n; 0:
 *	all
 * @netns_count: network namespaces in @netns_fd; 0: every one that the session may see
 * @device_count: devices in @device; 0: any
 * @netns_fd: file descriptors of network namespaces; -1 for the opener's. Needed during the call
 *	only
 * @device: devices
 * @l4_protos: bit p of the 256: IP protocol number p (bit 0: also all that is not IP); all 0: any
 */
struct mace_filter {
	__u32 hooks;
	__u32 sample_shift;
	__u32 netns_count;
	__u32 device_count;
	__s32 netns_fd[MACE_MAX_NETNS];
	struct mace_device device[MACE_MAX_DEVICES];
	__u64 l4_protos[4];
};

/* Bits of mace_setup.flags. */
#define MACE_SETUP_COOKIES \
	0x1 /* records name namespaces by cookie (SO_NETNS_COOKIE), never given out again */

/**
 * struct mace_setup - make the session's rings; once per session
 *
 * @abi_major: MACE_ABI_MAJOR of the reader; another than the module's is refused (EPROTO)
 * @flags: MACE_SETUP_*
 * @subbuf_bytes: size of a sub-buffer, bytes: a power of two, at least a page and at most 4 MiB
 * @subbufs: sub-buffers per CPU, at least 2
 * @watermark: poll() reports readiness when a CPU has this many full sub-buffers; 1 to @subbufs
 * @flush_ms: or when a record has waited this long, milliseconds; 1 to 10000
 * @pad2: 0
 * @filter: what to record
 * @ring_bytes: set by the call: bytes of one CPU's ring; CPU n is mapped at offset n * ring_bytes
 * @cpu_count: set by the call: CPUs with a ring, those that are online now. A CPU that comes online
 *	later gets one before it runs, if there is memory; else its records are counted as lost
 * @pad3: 0
 */
struct mace_setup {
	__u16 abi_major;
	__u16 flags;
	__u32 subbuf_bytes;
	__u32 subbufs;
	__u32 watermark;
	__u32 flush_ms;
	__u32 pad2;
	struct mace_filter filter;
	__u64 ring_bytes;
	__u32 cpu_count;
	__u32 pad3;
};

/**
 * struct mace_place_name - a device, as records name it
 *
 * @netns: as mace_record.netns of this session
 * @ifindex: as mace_record.ifindex
 */
struct mace_place_name {
	__u32 netns;
	__u32 ifindex;
};

/**
 * struct mace_places - where to record from now on; since ABI 1.2
 *
 * A packet passes if its namespace or its device is listed, so without either none does. The
 * filter of SETUP must hold too. Replaces the places of the call before; a packet at a place that
 * is in both passes throughout. The names are those of records, so that no namespace has to be
 * opened. Only a cookie (MACE_SETUP_COOKIES) is never another namespace's later.
 *
 * @netns_count: namespaces in @netns
 * @device_count: devices in @device
 * @netns: namespaces, as mace_record.netns of this session; not 0
 * @device: devices; neither number is 0
 */
struct mace_places {
	__u32 netns_count;
	__u32 device_count;
	__u32 netns[MACE_MAX_NETNS];
	struct mace_place_name device[MACE_MAX_DEVICES];
};

/* Bits of mace_take.flags. */
#define MACE_TAKE_FLUSH \
	0x1 /* also hand over the sub-buffer that is being filled, if it holds a record */

/**
 * struct mace_take - release what was read of one CPU's ring, and learn what is ready
 *
 * @cpu: the ring
 * @flags: MACE_TAKE_*
 * @release: this many of the sub-buffers handed over by earlier calls are done with, oldest first
 * @first: set by the call: index in the ring of the oldest sub-buffer that is handed over
 * @ready: set by the call: sub-buffers handed over, from @first on, round the ring's end
 * @pad: 0
 * @now_ns: set by the call: CLOCK_MONOTONIC, nanoseconds. With MACE_TAKE_FLUSH every record from
 *	before it has been handed over
 */
struct mace_take {
	__u32 cpu;
	__u32 flags;
	__u32 release;
	__u32 first;
	__u32 ready;
	__u32 pad;
	__u64 now_ns;
};

/**
 * struct mace_stats - what this session counted on one CPU, per hook
 *
 * Records that passed the filter = @written + @lost, exactly, at any time.
 *
 * @cpu: CPU asked for; 0xffffffff: the sum over all, those without a ring included
 * @pad: 0
 * @written: records in sub-buffers
 * @lost: records discarded because the ring was full (or the CPU had none)
 */
struct mace_stats {
	__u32 cpu;
	__u32 pad;
	__u64 written[MACE_HOOK_SLOTS];
	__u64 lost[MACE_HOOK_SLOTS];
};

#define MACE_ALL_CPUS 0xffffffffU

/**
 * struct mace_cost - what the probes cost since the module was loaded, over all CPUs and sessions
 *
 * For sessions with MACE_HELLO_ALL only. Every call is counted and one in @every is timed.
 *
 * @every: module parameter cost_every
 * @pad: 0
 * @calls: calls of each hook's probe
 * @timed: those that were timed
 * @timed_ns: nanoseconds in them, the reading of the clock included
 */
struct mace_cost {
	__u32 every;
	__u32 pad;
	__u64 calls[MACE_HOOK_SLOTS];
	__u64 timed[MACE_HOOK_SLOTS];
	__u64 timed_ns[MACE_HOOK_SLOTS];
};

#define MACE_IOC_MAGIC 0xBE
#define MACE_IOC_HELLO _IOR(MACE_IOC_MAGIC, 0, struct mace_hello)
#define MACE_IOC_SETUP _IOWR(MACE_IOC_MAGIC, 1, struct mace_setup)
#define MACE_IOC_START _IO(MACE_IOC_MAGIC, 2)
#define MACE_IOC_STOP _IO(MACE_IOC_MAGIC, 3)
#define MACE_IOC_TAKE _IOWR(MACE_IOC_MAGIC, 4, struct mace_take)
#define MACE_IOC_STATS _IOWR(MACE_IOC_MAGIC, 5, struct mace_stats)
#define MACE_IOC_COST _IOR(MACE_IOC_MAGIC, 6, struct mace_cost)
#define MACE_IOC_PLACES _IOW(MACE_IOC_MAGIC, 7, struct mace_places)

#ifdef __cplusplus
#define MACE_STATIC_ASSERT static_assert
#else
#define MACE_STATIC_ASSERT _Static_assert
#endif

MACE_STATIC_ASSERT(sizeof(struct mace_record) == 64, "a record is one cache line");
MACE_STATIC_ASSERT(sizeof(struct mace_subbuf) == 64, "records stay aligned to cache lines");
MACE_STATIC_ASSERT(sizeof(struct mace_hello) == 80, "no hidden padding");
MACE_STATIC_ASSERT(sizeof(struct mace_filter) == 240, "no hidden padding");
MACE_STATIC_ASSERT(sizeof(struct mace_setup) == 280, "no hidden padding");
MACE_STATIC_ASSERT(sizeof(struct mace_places) == 200, "no hidden padding");
MACE_STATIC_ASSERT(sizeof(struct mace_take) == 32, "no hidden padding");
MACE_STATIC_ASSERT(sizeof(struct mace_stats) == 264, "no hidden padding");
MACE_STATIC_ASSERT(sizeof(struct mace_cost) == 392, "no hidden padding");
MACE_STATIC_ASSERT(MACE_HOOK_COUNT <= MACE_HOOK_SLOTS, "a slot for every hook");

#endif /* _UAPI_MACE_H */
