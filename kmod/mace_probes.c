// SPDX-License-Identifier: GPL-2.0-only
/*
 * Probes: one small function per hook, one table that names them, one function that does the work.
 *
 * A probe runs wherever the kernel touches a packet: in tasks, softirqs and interrupts, on any
 * CPU. It has interrupts off from beginning to end, so that nothing on its CPU comes between, and
 * so is a reader of RCU's too: the newest kernels' tracepoints no longer see to that. It takes no
 * lock, and it neither sleeps nor allocates nor prints, nor touches user memory.
 *
 * Where a packet is, its device tells, never the task that happens to run. At the hooks where it
 * is delivered or freed skb->dev may dangle, so there the module recalls where it last saw this
 * buffer: a table of some thousand entries, by the buffer's identity, checked against the packet's
 * content. An entry that was overwritten is no harm: the place is then unknown, and only sessions
 * that see everything get the record.
 */
#include <linux/cache.h>
#include <linux/err.h>
#include <linux/irqflags.h>
#include <linux/log2.h>
#include <linux/netdevice.h>
#include <linux/percpu.h>
#include <linux/random.h>
#include <linux/rculist.h>
#include <linux/siphash.h>
#include <linux/skbuff.h>
#include <linux/string.h>
#include <linux/timekeeping.h>
#include <linux/tracepoint.h>
#include <linux/vmalloc.h>
#include <net/sock.h>
#include <trace/events/net.h>
#include <trace/events/skb.h>

#include "mace_compat.h"
#include "mace_packet.h"
#include "mace_probes.h"
#include "mace_session.h"

#define MACE_RECALL_BITS 15 /* 32768 buffers under way at once, 1 MiB */

static const u32 mace_placeless_hooks = BIT(MACE_HOOK_SKB_COPY_DATAGRAM_IOVEC) |
					BIT(MACE_HOOK_CONSUME_SKB) | BIT(MACE_HOOK_KFREE_SKB);

/* --- the place where a buffer was seen last --------------------------------------- */

/*
 * Written and read without a lock; @check holds the words together, so that a torn entry matches
 * nothing.
 */
struct mace_recall {
	u64 check;
	u64 place;
	u64 inode;
	u64 unused;
};

static struct mace_recall *mace_recalls;
static unsigned int mace_recall_users;
static siphash_key_t mace_skb_key __read_mostly;

static u64 mace_recall_check(const struct mace_record *record, u64 place, u64 inode)
{
	/* An odd factor (2^64 / golden ratio): a change of one word changes the whole. */
	return record->skb_id ^ inode ^ (record->packet_key + place * 0x9e3779b97f4a7c15ULL);
}

static void mace_remember(const struct mace_record *record, struct mace_place at)
{
	struct mace_recall *entry = &mace_recalls[record->skb_id >> (64 - MACE_RECALL_BITS)];
	u64 place = (u64)at.serial << 32 | at.ifindex;

	/* Only what mace_packet_read_any() reads again has a key to be checked. */
	if (!record->ip_version)
		return;
	WRITE_ONCE(entry->check, mace_recall_check(record, place, record->netns));
	WRITE_ONCE(entry->place, place);
	WRITE_ONCE(entry->inode, record->netns);
}

static struct mace_place mace_recall(struct mace_record *record)
{
	const struct mace_recall *entry = &mace_recalls[record->skb_id >> (64 - MACE_RECALL_BITS)];
	u64 check = READ_ONCE(entry->check), place = READ_ONCE(entry->place),
	    inode = READ_ONCE(entry->inode);
	struct mace_place at = {};

	if (!record->ip_version || check != mace_recall_check(record, place, inode))
		return at;
	at.serial = place >> 32;
	at.ifindex = place;
	record->netns = inode;
	record->ifindex = at.ifindex;
	record->flags |= MACE_FLAG_RECALLED;
	return at;
}

/* --- the work of a probe ---------------------------------------------------------- */

struct mace_cost_cpu {
	u64 calls[MACE_HOOK_SLOTS];
	u64 timed[MACE_HOOK_SLOTS];
	u64 timed_ns[MACE_HOOK_SLOTS];
};

static DEFINE_PER_CPU(struct mace_cost_cpu, mace_costs);
unsigned int mace_cost_every = 64;
static u64 mace_cost_mask __read_mostly;

static noinline bool mace_is_among(const struct mace_session *session, struct mace_place at)
{
	u32 i;

	if (session->serial_count) {
		for (i = 0; i < session->serial_count; i++)
			if (session->serials[i] == at.serial)
				break;
		if (i == session->serial_count)
			return false;
	}
	if (session->place_count) {
		for (i = 0; i < session->place_count; i++)
			if (session->places[i].serial == at.serial &&
			    session->places[i].ifindex == at.ifindex)
				break;
		if (i == session->place_count)
			return false;
	}
	return true;
}

static __always_inline bool mace_is_at(const struct mace_session *session, struct mace_place at)
{
	return !(session->filters & MACE_FILTER_PLACE) || mace_is_among(session, at);
}

static noinline bool mace_is_content_wanted(const struct mace_session *session,
					    const struct mace_record *record)
{
	if (session->l4_filtered &&
	    !(session->l4_protos[record->l4_proto / 64] & 1ULL << record->l4_proto % 64))
		return false;
	/* What has no key belongs to no sample. */
	return !session->sample_mask ||
	       (record->packet_key && !(record->packet_key & session->sample_mask));
}

static __always_inline bool mace_is_wanted(const struct mace_session *session,
					   const struct mace_record *record)
{
	return !(session->filters & MACE_FILTER_CONTENT) || mace_is_content_wanted(session, record);
}

static __always_inline void mace_record_to(struct mace_session *session, enum mace_hook hook,
					   const struct mace_record *record)
{
	struct mace_ring *ring = session->rings[record->cpu];

	if (unlikely(!ring))
		atomic64_inc(&session->lost[hook]);
	else if (unlikely(mace_ring_write(ring, hook, record) >= session->watermark))
		irq_work_queue(&session->wake);
}

/* Buffers that were identified on a CPU: mostly one of them is there at the next hook. */
#define MACE_IDENTIFIED_BITS 4

struct mace_identified {
	const struct sk_buff *skb;
	u64 skb_id;
};

static DEFINE_PER_CPU(struct mace_identified[1 << MACE_IDENTIFIED_BITS], mace_identified);

static noinline u64 mace_skb_id(const struct sk_buff *skb)
{
	/* Buffers are 256 bytes apart, a little more or less. */
	unsigned int slot = (unsigned long)skb >> 8 & ((1 << MACE_IDENTIFIED_BITS) - 1);
	struct mace_identified *known = this_cpu_ptr(&mace_identified[slot]);

	if (known->skb != skb) {
		known->skb = skb;
		known->skb_id = siphash_1u64((unsigned long)skb, &mace_skb_key);
	}
	return known->skb_id;
}

/* All that is the same at every hook. */
static __always_inline struct mace_record *
mace_describe(struct mace_known *known, enum mace_hook hook, const struct sk_buff *skb, u64 now_ns)
{
	struct mace_record *record = &known->record;

	if (known->skb != skb) {
		known->skb = skb;
		record->skb_id = mace_skb_id(skb);
	}
	record->ts_ns = now_ns;
	record->gso_segs = skb_is_gso(skb) ? skb_shinfo(skb)->gso_segs : 0;
	record->cpu = smp_processor_id();
	record->hook = hook;
	if (skb_cloned(skb))
		record->flags |= MACE_FLAG_CLONED;
	return record;
}

static __always_inline struct mace_record *
mace_describe_at_device(enum mace_hook hook, const struct sk_buff *skb, const struct net *net,
			u32 ifindex, int l3_offset, u64 now_ns)
{
	struct mace_known *known = mace_packet_read_device(skb, l3_offset);
	struct mace_record *record = mace_describe(known, hook, skb, now_ns);

	record->netns = net->ns.inum;
	record->ifindex = ifindex;
	record->drop_reason = 0;
	return record;
}

static __always_inline struct mace_record *mace_describe_elsewhere(enum mace_hook hook,
								   const struct sk_buff *skb,
								   u32 detail, u64 now_ns,
								   struct mace_place *at)
{
	struct mace_known *known = mace_packet_read_any(skb);
	struct mace_record *record = mace_describe(known, hook, skb, now_ns);
	bool dropped = hook == MACE_HOOK_KFREE_SKB;

	record->drop_reason = dropped ? detail : 0;
	record->l3_len = dropped ? 0 : detail;
	record->netns = 0;
	record->ifindex = 0;
	*at = mace_recall(record);
	/* Queued at a socket, charged to it: it lives, where its reader does. */
	if (!at->serial && skb->sk && skb->destructor == sock_rfree) {
		at->serial = mace_netns_serial(sock_net(skb->sk));
		record->netns = sock_net(skb->sk)->ns.inum;
	}
	return record;
}

/* The first session from @node on that wants this hook, and this place if that is known. */
static __always_inline struct mace_session *
mace_next_session(struct hlist_node *node, enum mace_hook hook, const struct mace_place *at)
{
	struct mace_session *session;

	for (; node; node = rcu_dereference_raw(hlist_next_rcu(node))) {
		session = hlist_entry(node, struct mace_session, node);
		if ((session->hooks & BIT(hook)) && (!at || mace_is_at(session, *at)))
			return session;
	}
	return NULL;
}

/*
 * Inlined into every probe, so that none pays for what only another one does; what happens seldom
 * is in functions of its own.
 *
 * @dev: the device that the packet is at, or NULL
 * @l3_offset: where its network layer begins, from skb->data, if @dev
 * @detail: bytes copied at MACE_HOOK_SKB_COPY_DATAGRAM_IOVEC, the reason at MACE_HOOK_KFREE_SKB
 */
static __always_inline void mace_observe(enum mace_hook hook, const struct sk_buff *skb,
					 const struct net_device *dev, int l3_offset, u32 detail)
{
	struct mace_place at = {};
	const struct mace_place *where = dev ? &at : NULL;
	const struct net *net = NULL;
	struct mace_session *session;
	struct mace_record *record;
	struct hlist_node *node;
	bool recorded = false;
	unsigned long irq;
	u64 now_ns;

	/* With interrupts off we are a reader of RCU's as well (since v5.0, whatisRCU.rst). */
	local_irq_save(irq);
	now_ns = ktime_get_mono_fast_ns();
	if (dev) {
		net = dev_net(dev);
		at.serial = mace_netns_serial(net);
		at.ifindex = dev->ifindex;
	}
	node = rcu_dereference_raw(hlist_first_rcu(&mace_running));
	session = mace_next_session(node, hook, where);
	if (session) {
		record = dev ? mace_describe_at_device(hook, skb, net, at.ifindex, l3_offset,
						       now_ns) :
			       mace_describe_elsewhere(hook, skb, detail, now_ns, &at);
		do {
			if ((dev || mace_is_at(session, at)) && mace_is_wanted(session, record)) {
				mace_record_to(session, hook, record);
				recorded = true;
			}
			node = rcu_dereference_raw(hlist_next_rcu(&session->node));
			session = mace_next_session(node, hook, where);
		} while (session);
		if (dev && likely(recorded && READ_ONCE(mace_recall_users)))
			mace_remember(record, at);
	}
	if (unlikely(!(__this_cpu_inc_return(mace_costs.calls[hook]) & mace_cost_mask))) {
		__this_cpu_inc(mace_costs.timed[hook]);
		__this_cpu_add(mace_costs.timed_ns[hook], ktime_get_mono_fast_ns() - now_ns);
	}
	local_irq_restore(irq);
}

static noinline void mace_observe_nowhere(enum mace_hook hook, const struct sk_buff *skb)
{
	mace_observe(hook, skb, NULL, 0, 0);
}

static __always_inline void mace_observe_at_device(enum mace_hook hook, const struct sk_buff *skb,
						   const struct net_device *dev, int l3_offset)
{
	if (likely(dev))
		mace_observe(hook, skb, dev, l3_offset, 0);
	else
		mace_observe_nowhere(hook, skb);
}

/* --- the probes ------------------------------------------------------------------- */

/* The way down: the network header is set. The way up: it may not be, but the data begins there. */

static void mace_probe_net_dev_queue(void *data, struct sk_buff *skb)
{
	mace_observe_at_device(MACE_HOOK_NET_DEV_QUEUE, skb, skb->dev, skb_network_offset(skb));
}

static void mace_probe_net_dev_start_xmit(void *data, const struct sk_buff *skb,
					  const struct net_device *dev)
{
	mace_observe_at_device(MACE_HOOK_NET_DEV_START_XMIT, skb, dev, skb_network_offset(skb));
}

static void mace_probe_netif_rx(void *data, struct sk_buff *skb)
{
	mace_observe_at_device(MACE_HOOK_NETIF_RX, skb, skb->dev, 0);
}

static void mace_probe_netif_receive_skb(void *data, struct sk_buff *skb)
{
	mace_observe_at_device(MACE_HOOK_NETIF_RECEIVE_SKB, skb, skb->dev, 0);
}

static void mace_probe_napi_gro_receive_entry(void *data, const struct sk_buff *skb)
{
	mace_observe_at_device(MACE_HOOK_NAPI_GRO_RECEIVE_ENTRY, skb, skb->dev, 0);
}

static void mace_probe_skb_copy_datagram_iovec(void *data, const struct sk_buff *skb, int bytes)
{
	mace_observe(MACE_HOOK_SKB_COPY_DATAGRAM_IOVEC, skb, NULL, 0, bytes);
}

MACE_DEFINE_CONSUME_SKB(mace_probe_consume_skb, skb)
{
	mace_observe(MACE_HOOK_CONSUME_SKB, skb, NULL, 0, 0);
}

MACE_DEFINE_KFREE_SKB(mace_probe_kfree_skb, skb)
{
	mace_observe(MACE_HOOK_KFREE_SKB, skb, NULL, 0, MACE_DROP_REASON());
}

/**
 * struct mace_probe - a row of the table of probes
 * @name: the tracepoint's
 * @function: our function on it
 * @tracepoint: found when the module is loaded; NULL if this kernel has none of that name
 * @users: running sessions that want it; mace_running_lock
 */
struct mace_probe {
	const char *name;
	void *function;
	struct tracepoint *tracepoint;
	unsigned int users;
};

#define MACE_PROBE(tracepoint_name)                                                \
	{                                                                          \
		.name = #tracepoint_name, .function = mace_probe_##tracepoint_name \
	}

static struct mace_probe mace_probes[MACE_HOOK_COUNT] = {
	[MACE_HOOK_NET_DEV_QUEUE] = MACE_PROBE(net_dev_queue),
	[MACE_HOOK_NET_DEV_START_XMIT] = MACE_PROBE(net_dev_start_xmit),
	[MACE_HOOK_NETIF_RX] = MACE_PROBE(netif_rx),
	[MACE_HOOK_NETIF_RECEIVE_SKB] = MACE_PROBE(netif_receive_skb),
	[MACE_HOOK_NAPI_GRO_RECEIVE_ENTRY] = MACE_PROBE(napi_gro_receive_entry),
	[MACE_HOOK_SKB_COPY_DATAGRAM_IOVEC] = MACE_PROBE(skb_copy_datagram_iovec),
	[MACE_HOOK_CONSUME_SKB] = MACE_PROBE(consume_skb),
	[MACE_HOOK_KFREE_SKB] = MACE_PROBE(kfree_skb),
};

/* The table holds void pointers; here the compiler says whether they fit their tracepoints. */
static void __maybe_unused mace_check_probes(void)
{
	check_trace_callback_type_net_dev_queue(mace_probe_net_dev_queue);
	check_trace_callback_type_net_dev_start_xmit(mace_probe_net_dev_start_xmit);
	check_trace_callback_type_netif_rx(mace_probe_netif_rx);
	check_trace_callback_type_netif_receive_skb(mace_probe_netif_receive_skb);
	check_trace_callback_type_napi_gro_receive_entry(mace_probe_napi_gro_receive_entry);
	check_trace_callback_type_skb_copy_datagram_iovec(mace_probe_skb_copy_datagram_iovec);
	check_trace_callback_type_consume_skb(mace_probe_consume_skb);
	check_trace_callback_type_kfree_skb(mace_probe_kfree_skb);
}

static void mace_find_tracepoint(struct tracepoint *tracepoint, void *unused)
{
	int hook;

	for (hook = 0; hook < MACE_HOOK_COUNT; hook++)
		if (mace_probes[hook].name && !strcmp(mace_probes[hook].name, tracepoint->name))
			mace_probes[hook].tracepoint = tracepoint;
}

/**
 * mace_probes_available() - the hooks that this kernel has
 *
 * Return: bit n: hook n.
 */
u32 mace_probes_available(void)
{
	u32 hooks = 0;
	int hook;

	for (hook = 0; hook < MACE_HOOK_COUNT; hook++)
		if (mace_probes[hook].tracepoint)
			hooks |= BIT(hook);
	return hooks;
}

static void mace_probe_put(int hook)
{
	struct mace_probe *probe = &mace_probes[hook];

	if (!--probe->users)
		tracepoint_probe_unregister(probe->tracepoint, probe->function, NULL);
}

/**
 * mace_probes_get() - one more user of some hooks
 * @hooks: bit n: hook n; all available
 *
 * Context: may sleep; mace_running_lock is held. Return: 0, or what registering a probe returned:
 * then nothing is got.
 */
int mace_probes_get(u32 hooks)
{
	int hook, error = 0;

	for (hook = 0; hook < MACE_HOOK_COUNT; hook++) {
		struct mace_probe *probe = &mace_probes[hook];

		if (!(hooks & BIT(hook)))
			continue;
		if (!probe->users)
			error = tracepoint_probe_register(probe->tracepoint, probe->function, NULL);
		if (error)
			goto unwind;
		probe->users++;
	}
	if (hooks & mace_placeless_hooks)
		WRITE_ONCE(mace_recall_users, mace_recall_users + 1);
	return 0;
unwind:
	while (--hook >= 0)
		if (hooks & BIT(hook))
			mace_probe_put(hook);
	return error;
}

/**
 * mace_probes_put() - undo one mace_probes_get()
 * @hooks: the same
 *
 * Context: may sleep; mace_running_lock is held. Probes may still run when it returns:
 * tracepoint_synchronize_unregister().
 */
void mace_probes_put(u32 hooks)
{
	int hook;

	for (hook = 0; hook < MACE_HOOK_COUNT; hook++)
		if (hooks & BIT(hook))
			mace_probe_put(hook);
	if (hooks & mace_placeless_hooks)
		WRITE_ONCE(mace_recall_users, mace_recall_users - 1);
}

/**
 * mace_probes_cost() - what the probes cost up to now
 * @cost: set
 */
void mace_probes_cost(struct mace_cost *cost)
{
	int cpu, hook;

	memset(cost, 0, sizeof(*cost));
	cost->every = mace_cost_every;
	for_each_possible_cpu(cpu) {
		const struct mace_cost_cpu *each = per_cpu_ptr(&mace_costs, cpu);

		for (hook = 0; hook < MACE_HOOK_SLOTS; hook++) {
			cost->calls[hook] += READ_ONCE(each->calls[hook]);
			cost->timed[hook] += READ_ONCE(each->timed[hook]);
			cost->timed_ns[hook] += READ_ONCE(each->timed_ns[hook]);
		}
	}
}

int __init mace_probes_init(void)
{
	mace_cost_every = roundup_pow_of_two(clamp(mace_cost_every, 1U, 1U << 20));
	mace_cost_mask = mace_cost_every - 1;
	get_random_bytes(&mace_skb_key, sizeof(mace_skb_key));
	mace_recalls = vzalloc(sizeof(*mace_recalls) << MACE_RECALL_BITS);
	if (!mace_recalls)
		return -ENOMEM;
	for_each_kernel_tracepoint(mace_find_tracepoint, NULL);
	return 0;
}

void mace_probes_exit(void)
{
	/* No session, so no probe is registered; those that were may still be running. */
	tracepoint_synchronize_unregister();
	vfree(mace_recalls);
}
