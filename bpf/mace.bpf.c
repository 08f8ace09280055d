// SPDX-License-Identifier: GPL-2.0-only
/*
 * Programs on the tracepoints, and on the functions where IP takes a packet: one small function per
 * hook, and the function that all of them call.
 *
 * A program runs wherever the kernel handles a packet, on any CPU. Another program may interrupt it
 * on the same CPU (from an interrupt; in the newest kernels also from another task). The entries
 * that the programs keep from packet to packet therefore show whether they are torn (struct
 * mace_seen, struct mace_identified), and the programs count losses with atomic additions. From v6.1
 * on the kernel does not run a program inside itself on one CPU (commit 05b24ff9b2cf ("bpf: Prevent
 * bpf program recursion for raw tracepoint probes")): it skips the inner call and counts it
 * (recursion_misses of struct bpf_prog_info), and the reader queries that count.
 *
 * A packet's device gives its namespace. At the hooks where a packet is delivered or freed,
 * skb->dev may dangle, so the programs take the namespace of the packet's socket, if it has one. At
 * these hooks a session that is limited to namespaces and devices gets only packets with a socket
 * in one of the namespaces.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "mace_bpf.h"
#include "mace_devices.h"
#include "mace_kernel.h"
#include "mace_packet.h"

/* 2^64 over the golden ratio: the upper bits of a product depend on all bits of the factor. */
#define MACE_FACTOR 0x9e3779b97f4a7c15ULL

/*
 * 1 for kernels before v6.2, which lack bpf_rdonly_cast(). Before v5.16 the verifier rejects even a
 * call of a missing function that is never reached: commit a5d827275241 ("bpf: Be conservative while
 * processing invalid kfunc calls").
 */
#ifndef MACE_OLD
#define MACE_OLD 0
#endif

/* The last of a record's words of 64 bits, and the shift in it of mace_record.pad. */
#define MACE_LAST_WORD 7
#define MACE_PAD_SHIFT 40

#define MACE_SEEN_BITS 5
#define MACE_IDENTIFIED_BITS 6
#define MACE_RECEIVED_BITS 8 /* a list of received buffers has up to 64 */
#define MACE_DATAREF_MASK 0xffff /* SKB_DATAREF_MASK */

/**
 * struct mace_identified - a buffer that a CPU has recorded
 *
 * @skb: the buffer's address
 * @skb_id: its identity in records
 * @check: @skb times MACE_FACTOR, XOR @skb_id; an entry that an interrupt's program tore fails it
 */
struct mace_identified {
	u64 skb;
	u64 skb_id;
	u64 check;
};

/**
 * struct mace_cpu - the state of one CPU
 *
 * @counts: counts that the reader queries
 * @identified: buffers, each in the slot of its address's hash
 * @seen: packets that were read, each in the slot of the hash of its data's address
 * @received: buffer and device of receptions, one word each, in the place of the data's address
 */
struct mace_cpu {
	struct mace_counts counts;
	struct mace_identified identified[1 << MACE_IDENTIFIED_BITS];
	struct mace_seen seen[1 << MACE_SEEN_BITS];
	u64 received[1 << MACE_RECEIVED_BITS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct mace_cpu);
} mace_cpus SEC(".maps");

/* The loader sets the sizes of rings and of the array: these are placeholders. */
#if MACE_OLD
struct mace_ring_map {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
};
#else
struct mace_ring_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct mace_ring));
};

/* Only wakes the reader: an entry has no content, and the reader empties the buffer unread. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} mace_wakes SEC(".maps");
#endif

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, u32);
	__array(values, struct mace_ring_map);
} mace_rings SEC(".maps");

const volatile struct mace_config mace_config = {};
volatile struct mace_state mace_state = {};

/*
 * Return a pointer as a number. The verifier restricts additions to a pointer; negating the pointer
 * twice makes it forget that the register held one.
 */
static __always_inline u64 mace_number(const volatile void *pointer)
{
	u64 number = (u64)pointer;

	asm volatile("%0 = -%0\n%0 = -%0" : "+r"(number));
	return number;
}

static __always_inline int mace_network_offset(const struct sk_buff *skb)
{
	return (int)(mace_number(skb->head) - mace_number(skb->data)) + skb->network_header;
}

static __always_inline bool mace_is_direct(void)
{
	return !MACE_OLD;
}

static __always_inline const void *mace_in_place(u64 at, u32 len)
{
	return bpf_rdonly_cast((const void *)at, bpf_core_type_id_kernel(struct pt_regs));
}

static __always_inline bool mace_is_paged_readable(void)
{
	return !MACE_OLD && mace_config.paged;
}

static __noinline long mace_copy_paged(const struct sk_buff *skb, int offset, void *to)
{
	struct bpf_dynptr bytes;

	if (offset < 0 || bpf_dynptr_from_skb(skb, 0, &bytes))
		return -1;
	return bpf_dynptr_read(to, MACE_PAYLOAD_BYTES, &bytes, offset, 0);
}

/* --- state from packet to packet -------------------------------------------------- */

static __always_inline u64 mace_skb_id(struct mace_cpu *cpu, const struct sk_buff *buffer)
{
	u64 skb = mace_number(buffer);
	volatile struct mace_identified *identified =
		&cpu->identified[skb * MACE_FACTOR >> (64 - MACE_IDENTIFIED_BITS)];
	u64 skb_id = identified->skb_id;

	if (likely(identified->skb == skb && identified->check == (skb * MACE_FACTOR ^ skb_id)))
		return skb_id;
	skb_id = mace_hash_of_skb(skb, mace_config.skb_key[0], mace_config.skb_key[1]);
	identified->skb = skb;
	identified->skb_id = skb_id;
	identified->check = skb * MACE_FACTOR ^ skb_id;
	return skb_id;
}

/* Set @fields to what the packet says. @head: address of the buffer's data */
static __always_inline void mace_read(struct mace_cpu *cpu, u64 head, struct mace_buffer *buffer,
				      u64 now, struct mace_fields *fields)
{
	/* A clone has the same data. */
	struct mace_seen *seen = &cpu->seen[head * MACE_FACTOR >> (64 - MACE_SEEN_BITS)];

	if (unlikely(!mace_recall(buffer, seen, fields))) {
		/* So that the verifier follows the reading once, not once for each kind of buffer. */
		MACE_FORGET(&mace_state, buffer->len);
		MACE_FORGET(&mace_state, buffer->in_place);
		MACE_FORGET(&mace_state, buffer->offset);
		MACE_FORGET(&mace_state, buffer->protocol);
		mace_read_anew(buffer, seen, fields, mace_state.nothing, now);
	}
}

/* --- where a packet was received -------------------------------------------------- */

/*
 * IP is handed a packet on the CPU that has received it. If the word of its place differs, the
 * packet has changed devices in between, past every tracepoint. A word may be overwritten by that
 * of another buffer; then the packet is recorded once more. The module does the same
 * (kmod/mace_probes.c).
 */
static __always_inline volatile u64 *mace_received_at(struct mace_cpu *cpu,
						      const struct sk_buff *skb,
						      const struct net_device *dev, u64 *word)
{
	u64 head = mace_number(skb->head) * MACE_FACTOR;

	*word = head ^ mace_number(dev);
	return &cpu->received[head >> (64 - MACE_RECEIVED_BITS)];
}

/* Return whether a session records @hook, a constant. The verifier knows the answer. */
static __always_inline bool mace_is_hook_wanted(const u8 hook)
{
	return mace_config.hooks >> hook & 1;
}

/*
 * Note where a packet is received, and return whether @hook, a constant, has a record of it. IP's
 * hook has none if the packet was received at the device where IP is handed it.
 */
static __always_inline bool mace_is_at_hook(struct mace_cpu *cpu, const u8 hook,
					    const struct sk_buff *skb, const struct net_device *dev)
{
	volatile u64 *place;
	u64 word;

	if (hook == MACE_HOOK_NETIF_RECEIVE_SKB && mace_is_hook_wanted(MACE_HOOK_IP_RCV)) {
		place = mace_received_at(cpu, skb, dev, &word);
		*place = word;
	} else if (hook == MACE_HOOK_IP_RCV) {
		place = mace_received_at(cpu, skb, dev, &word);
		if (*place == word)
			return false;
	}
	return mace_is_hook_wanted(hook);
}

/* --- the filter ------------------------------------------------------------------- */

static __always_inline u64 mace_name_of(const struct net *net)
{
	return mace_config.cookies ? net->net_cookie : net->ns.inum;
}

static __always_inline bool mace_is_place_wanted(u64 netns, u32 ifindex)
{
	u64 device = (u64)ifindex << 32 | (u32)netns;
	u32 i;

	if (!mace_config.place_filtered)
		return true;
	for (i = 0; i < MACE_MAX_NETNS && i < mace_state.netns_count; i++)
		if (mace_state.netns[i] == netns)
			return true;
	for (i = 0; i < MACE_MAX_DEVICES && i < mace_state.device_count; i++)
		if (mace_state.device[i] == device)
			return true;
	return false;
}

/*
 * Return whether @proto is among the protocols to record. The four words are read at constant
 * indexes: an index that depends on the packet would make the verifier follow every path to it
 * separately.
 */
static __always_inline bool mace_is_proto_wanted(u8 proto)
{
	u64 first = mace_config.l4_protos[0], second = mace_config.l4_protos[1],
	    third = mace_config.l4_protos[2], fourth = mace_config.l4_protos[3];
	u64 word = proto < 128 ? (proto < 64 ? first : second) : (proto < 192 ? third : fourth);

	return word >> (proto & 63) & 1;
}

static __always_inline bool mace_is_content_wanted(const struct mace_record *record)
{
	/* See MACE_FORGET(). */
	u64 key = record->packet_key ^ mace_state.nothing;

	if (mace_config.l4_filtered && !mace_is_proto_wanted(record->l4_proto))
		return false;
	/* A packet without a key belongs to no sample. */
	return !mace_config.sample_mask || (key && !(key & mace_config.sample_mask));
}

/* --- the buffer ------------------------------------------------------------------- */

static __always_inline bool mace_has_tag(const struct sk_buff *skb)
{
	const struct sk_buff___vlan_present *old = (const void *)skb;

	if (bpf_core_field_exists(skb->vlan_all))
		return skb->vlan_all;
	return BPF_CORE_READ_BITFIELD(old, vlan_present);
}

static __always_inline void mace_describe_shared(const struct sk_buff *skb,
						 struct mace_record *record)
{
	u64 at = mace_number(skb->head) + skb->end, copy[MACE_SHARED_BYTES / 8];
	const struct skb_shared_info *shared = (const void *)copy;

	if (mace_is_direct())
		shared = bpf_rdonly_cast((const void *)at,
					 bpf_core_type_id_kernel(struct skb_shared_info));
	else
		bpf_probe_read_kernel(copy, sizeof(copy), (const void *)at);
	if (shared->gso_size)
		record->gso_segs = shared->gso_segs;
	if (BPF_CORE_READ_BITFIELD(skb, cloned) &&
	    (shared->dataref.counter & MACE_DATAREF_MASK) != 1)
		record->flags |= MACE_FLAG_CLONED;
}

/* --- recording -------------------------------------------------------------------- */

/* Return the last word of a record, with the number of records that @cpu has lost in its pad. */
static __always_inline u64 mace_last_word(const struct mace_cpu *cpu,
					  const struct mace_record *record)
{
	return ((const u64 *)record)[MACE_LAST_WORD] | cpu->counts.lost_all << MACE_PAD_SHIFT;
}

/* Write @record to the ring of CPU @number. Return: whether the ring exists and had room. */
#if MACE_OLD
static __always_inline bool mace_put(struct mace_cpu *cpu, u32 number, struct mace_record *record)
{
	void *ring = bpf_map_lookup_elem(&mace_rings, &number);
	struct mace_record *slot = ring ? bpf_ringbuf_reserve(ring, sizeof(*slot), 0) : NULL;

	if (!slot)
		return false;
	*slot = *record;
	((u64 *)slot)[MACE_LAST_WORD] = mace_last_word(cpu, record);
	/* Not atomic: an interrupt here makes the next wakeup a little late or early. */
	if (++cpu->counts.since_wake < mace_config.wake_every) {
		bpf_ringbuf_submit(slot, BPF_RB_NO_WAKEUP);
	} else {
		cpu->counts.since_wake = 0;
		bpf_ringbuf_submit(slot, BPF_RB_FORCE_WAKEUP);
	}
	return true;
}
#else
static __noinline int mace_wake(void)
{
	/* The buffer is full only if the reader has been woken and has not emptied it yet. */
	void *wake = bpf_ringbuf_reserve(&mace_wakes, sizeof(u64), 0);

	if (wake)
		bpf_ringbuf_discard(wake, BPF_RB_FORCE_WAKEUP);
	return 0;
}

static __always_inline bool mace_put(struct mace_cpu *cpu, u32 number, struct mace_record *record)
{
	u32 zero = 0;
	void *map = bpf_map_lookup_elem(&mace_rings, &number);
	volatile struct mace_ring *ring = map ? bpf_map_lookup_elem(map, &zero) : NULL;
	const u64 *words = (const void *)record;
	volatile u64 *slot;
	u64 at;

	if (!ring || ring->head - ring->tail > mace_config.ring_slots - MACE_RING_MARGIN)
		return false;
	at = __sync_fetch_and_add(&ring->head, 1);
	slot = (void *)(ring + 1) + (at & (mace_config.ring_slots - 1)) * sizeof(*record);
	slot[0] = words[0];
	slot[1] = words[1];
	slot[2] = words[2];
	slot[3] = words[3];
	slot[4] = words[4];
	slot[5] = words[5];
	slot[6] = words[6];
	/* The last store: the compiler keeps the order of volatile stores, x86-64 of all stores. */
	slot[MACE_LAST_WORD] = mace_last_word(cpu, record) | MACE_WRITTEN;
	if (unlikely(!(at & (mace_config.wake_every - 1))))
		mace_wake();
	return true;
}
#endif

static __always_inline void mace_write(struct mace_cpu *cpu, u32 number, u8 hook,
				       struct mace_record *record)
{
	if (likely(mace_put(cpu, number, record)))
		return;
	__sync_fetch_and_add(&cpu->counts.lost[hook & (MACE_HOOK_SLOTS - 1)], 1);
	__sync_fetch_and_add(&cpu->counts.lost_all, 1);
}

/*
 * Set @buffer to the packet of @skb at the hooks that have a device, and the fields of @record that
 * its place in the buffer determines. @offset: start of the network layer from skb->data, bytes.
 */
static __always_inline void mace_find_at_device(const struct sk_buff *skb,
						const struct net_device *dev, int offset,
						struct mace_buffer *buffer,
						struct mace_record *record)
{
	int tci = -1;

	/* Nobody has set the offset, for instance of a packet socket's frame. */
	if (unlikely(offset < 0 || offset > buffer->len)) {
		offset = dev->hard_header_len;
		if (offset > buffer->len)
			offset = buffer->len;
	}
	buffer->offset = offset;
	if (unlikely(mace_has_tag(skb)))
		tci = skb->vlan_tci;
	buffer->tci = tci;
	if (unlikely(mace_is_vlan(buffer->protocol)) && !mace_find_vlan(buffer))
		buffer->in_place = 0;
	if (unlikely(buffer->tci >= 0)) {
		record->vlan = buffer->tci;
		record->flags |= MACE_FLAG_VLAN;
	}
	MACE_FORGET_OLD(&mace_state, record->vlan);
	MACE_FORGET_OLD(&mace_state, record->flags);
	MACE_FORGET_OLD(&mace_state, buffer->in_place);
	MACE_FORGET_OLD(&mace_state, buffer->offset);
	MACE_FORGET_OLD(&mace_state, buffer->protocol);
	record->l3_len = buffer->len > buffer->offset ? buffer->len - buffer->offset : 0;
}

/*
 * Set @buffer to the packet of @skb at the other hooks. Return: whether there is one. Headers may
 * have been pulled, and the buffer may never have been a packet.
 */
static __always_inline bool mace_find_nowhere(const struct sk_buff *skb, struct mace_buffer *buffer)
{
	bool is_ip = buffer->protocol == MACE_ETH_P_IP || buffer->protocol == MACE_ETH_P_IPV6;

	MACE_FORGET(&mace_state, buffer->protocol);
	buffer->offset = mace_network_offset(skb);
	return is_ip && skb->head && skb->network_header && buffer->offset <= buffer->in_place;
}

/*
 * Filter a packet, and write its record.
 *
 * @dev: the packet's device, or NULL at a hook where skb->dev may dangle
 * @offset: with @dev, start of the network layer from skb->data, bytes
 * @detail: bytes copied at MACE_HOOK_SKB_COPY_DATAGRAM_IOVEC, drop reason at MACE_HOOK_KFREE_SKB
 */
static __always_inline int mace_observe(const u8 hook, struct sk_buff *skb, struct net_device *dev,
					int offset, u32 detail)
{
	u32 zero = 0, number;
	struct mace_record record = {};
	struct mace_fields fields;
	struct mace_buffer buffer;
	struct mace_cpu *cpu;
	const struct sock *sk;
	u64 netns = 0;

	if (!mace_state.recording)
		return 0;
	cpu = bpf_map_lookup_elem(&mace_cpus, &zero);
	if (!cpu)
		return 0;
	/* Not atomic, which would cost more than all other counting: a call may be missing. */
	cpu->counts.calls[hook]++;
	if (!mace_is_at_hook(cpu, hook, skb, dev))
		return 0;
	if (dev) {
		netns = mace_name_of(dev->nd_net.net);
		record.ifindex = dev->ifindex;
	} else if (mace_config.place_filtered) {
		sk = skb->sk;
		if (sk)
			netns = mace_name_of(sk->__sk_common.skc_net.net);
	}
	if (!mace_is_place_wanted(netns, record.ifindex))
		return 0;
	record.ts_ns = bpf_ktime_get_ns();
	record.netns = netns;
	record.hook = hook;
	number = bpf_get_smp_processor_id();
	record.cpu = number;

	buffer.skb = skb;
	buffer.data = mace_number(skb->data);
	buffer.len = skb->len;
	buffer.in_place = skb->len - skb->data_len;
	buffer.protocol = BE16(skb->protocol);
	/* bpf_dynptr_from_skb() takes a tracepoint's buffer, but not the argument of a function. */
	buffer.pages = hook != MACE_HOOK_IP_RCV;
	if (dev)
		mace_find_at_device(skb, dev, offset, &buffer, &record);
	if (dev || mace_find_nowhere(skb, &buffer)) {
		mace_read(cpu, mace_number(skb->head), &buffer, record.ts_ns, &fields);
		/* Where headers may have been pulled, bytes that are not IP say nothing. */
		if (dev || fields.ip_version)
			mace_set_record(&fields, &record);
	}
	if (!mace_is_content_wanted(&record))
		return 0;
	record.skb_id = mace_skb_id(cpu, skb);
	if (dev || skb->head)
		mace_describe_shared(skb, &record);
	if (hook == MACE_HOOK_KFREE_SKB)
		record.drop_reason = detail;
	else if (hook == MACE_HOOK_SKB_COPY_DATAGRAM_IOVEC)
		record.l3_len = detail;
	mace_write(cpu, number, hook, &record);
	return 0;
}

/*
 * On the way down to a device the network header is set. On the way up it may not be, but skb->data
 * points to it. At delivery and free the device is unknown.
 */

static __always_inline int mace_down(const u8 hook, struct sk_buff *skb, struct net_device *dev)
{
	/* Never NULL here; the check spares the code for hooks without a device. */
	return dev ? mace_observe(hook, skb, dev, mace_network_offset(skb), 0) : 0;
}

static __always_inline int mace_up(const u8 hook, struct sk_buff *skb)
{
	struct net_device *dev = skb->dev;
	int offset = 0;

	/* A known offset makes old verifiers follow each number of tags separately. */
	MACE_FORGET_OLD(&mace_state, offset);
	return dev ? mace_observe(hook, skb, dev, offset, 0) : 0;
}

static __always_inline int mace_nowhere(const u8 hook, struct sk_buff *skb, u32 detail)
{
	return mace_observe(hook, skb, NULL, 0, detail);
}

/* --- the programs ----------------------------------------------------------------- */

SEC("tp_btf/net_dev_queue")
int BPF_PROG(net_dev_queue, struct sk_buff *skb)
{
	return mace_down(MACE_HOOK_NET_DEV_QUEUE, skb, skb->dev);
}

SEC("tp_btf/net_dev_start_xmit")
int BPF_PROG(net_dev_start_xmit, struct sk_buff *skb, struct net_device *dev)
{
	return mace_down(MACE_HOOK_NET_DEV_START_XMIT, skb, dev);
}

SEC("tp_btf/netif_rx")
int BPF_PROG(netif_rx, struct sk_buff *skb)
{
	return mace_up(MACE_HOOK_NETIF_RX, skb);
}

SEC("tp_btf/netif_receive_skb")
int BPF_PROG(netif_receive_skb, struct sk_buff *skb)
{
	return mace_up(MACE_HOOK_NETIF_RECEIVE_SKB, skb);
}

SEC("tp_btf/napi_gro_receive_entry")
int BPF_PROG(napi_gro_receive_entry, struct sk_buff *skb)
{
	return mace_up(MACE_HOOK_NAPI_GRO_RECEIVE_ENTRY, skb);
}

SEC("tp_btf/skb_copy_datagram_iovec")
int BPF_PROG(skb_copy_datagram_iovec, struct sk_buff *skb, int bytes)
{
	return mace_nowhere(MACE_HOOK_SKB_COPY_DATAGRAM_IOVEC, skb, bytes);
}

SEC("tp_btf/consume_skb")
int BPF_PROG(consume_skb, struct sk_buff *skb)
{
	return mace_nowhere(MACE_HOOK_CONSUME_SKB, skb, 0);
}

SEC("tp_btf/kfree_skb")
int BPF_PROG(kfree_skb, struct sk_buff *skb, void *location, u32 reason)
{
	return mace_nowhere(MACE_HOOK_KFREE_SKB, skb, reason);
}

/* Before v5.17 no reason: commit c504e5c2f964 ("net: skb: introduce kfree_skb_reason()"). */
SEC("tp_btf/kfree_skb")
int BPF_PROG(kfree_skb_without_reason, struct sk_buff *skb)
{
	return mace_nowhere(MACE_HOOK_KFREE_SKB, skb, 0);
}

/*
 * What ip_rcv() and ip_list_rcv(), the entry of packets that a driver hands over in lists, call for
 * each packet.
 */
SEC("fentry/ip_rcv_core")
int BPF_PROG(ip_rcv, struct sk_buff *skb)
{
	return mace_up(MACE_HOOK_IP_RCV, skb);
}

SEC("fentry/ip6_rcv_core")
int BPF_PROG(ipv6_rcv, struct sk_buff *skb)
{
	return mace_up(MACE_HOOK_IP_RCV, skb);
}

char LICENSE[] SEC("license") = "GPL";
