// SPDX-License-Identifier: GPL-2.0-only
/*
 * Probes: one small function per hook, one table that names them, one function that does the work.
 *
 * A probe runs wherever the kernel touches a packet: in tasks, softirqs and interrupts, on any
 * CPU. It has interrupts off from beginning to end, so that nothing on its CPU comes between, and
 * so is a reader of RCU's too: the newest kernels' tracepoints no longer see to that. It takes no
 * lock, and it neither sleeps nor allocates nor prints, nor touches user memory.
 *
 * Where a packet is, its device says, never the task that happens to run. At the hooks where it is
 * delivered or freed skb->dev may dangle, so there the module looks up where this buffer was last
 * (struct mace_context). A session of some namespaces or devices gets such a record only if the
 * buffer is certainly still there; where that is not known, only sessions that see everything get
 * it.
 */
#include <linux/cache.h>
#include <linux/delay.h>
#include <linux/err.h>
#include <linux/etherdevice.h>
#include <linux/hash.h>
#include <linux/if_vlan.h>
#include <linux/irqflags.h>
#include <linux/log2.h>
#include <linux/netdevice.h>
#include <linux/netfilter.h>
#include <linux/netfilter_bridge.h>
#include <linux/percpu.h>
#include <linux/rculist.h>
#include <linux/skbuff.h>
#include <linux/string.h>
#include <linux/timekeeping.h>
#include <linux/tracepoint.h>
#include <linux/vmalloc.h>
#include <net/dst.h>
#include <net/net_namespace.h>
#include <net/sock.h>
#include <trace/events/net.h>
#include <trace/events/skb.h>

#include "mace_compat.h"
#include "mace_packet.h"
#include "mace_probes.h"
#include "mace_session.h"

#define MACE_CONTEXT_BITS 15 /* 32768 buffers under way at once, 1 MiB */
#define MACE_RECEIVED_BITS 8 /* a list of received buffers has up to 64; 2 KiB for each CPU */

/*
 * The table of hooks: the number's name, the tracepoint, and what is known of the packet there. It
 * is at a device (AT_DEVICE), or it has none: it is delivered (NO_DEVICE), or its buffer is freed
 * (AT_END). A row, and a probe of the tracepoint's name below: a hook needs no more here.
 * MACE_OTHER_HOOKS are no tracepoints.
 */
#define MACE_TRACEPOINTS(ROW)                                            \
	ROW(NET_DEV_QUEUE, net_dev_queue, AT_DEVICE)                     \
	ROW(NET_DEV_START_XMIT, net_dev_start_xmit, AT_DEVICE)           \
	ROW(NETIF_RX, netif_rx, AT_DEVICE)                               \
	ROW(NETIF_RECEIVE_SKB, netif_receive_skb, AT_DEVICE)             \
	ROW(NAPI_GRO_RECEIVE_ENTRY, napi_gro_receive_entry, AT_DEVICE)   \
	ROW(SKB_COPY_DATAGRAM_IOVEC, skb_copy_datagram_iovec, NO_DEVICE) \
	ROW(CONSUME_SKB, consume_skb, AT_END)                            \
	ROW(KFREE_SKB, kfree_skb, AT_END)
#define MACE_OTHER_HOOKS(ROW) ROW(IP_RCV, ip_rcv, AT_DEVICE)
#define MACE_HOOKS(ROW) MACE_TRACEPOINTS(ROW) MACE_OTHER_HOOKS(ROW)

enum mace_hook_at {
	MACE_AT_DEVICE,
	MACE_NO_DEVICE,
	MACE_AT_END
};

#define MACE_BIT_AT_DEVICE(hook, tracepoint, at) \
	| (MACE_##at == MACE_AT_DEVICE ? BIT(MACE_HOOK_##hook) : 0)
#define MACE_BIT_AT_END(hook, tracepoint, at) \
	| (MACE_##at == MACE_AT_END ? BIT(MACE_HOOK_##hook) : 0)
#define MACE_BIT(hook, tracepoint, at) | BIT(MACE_HOOK_##hook)

static const u32 mace_device_hooks = 0 MACE_HOOKS(MACE_BIT_AT_DEVICE);
/* The way down: the network header is set. */
static const u32 mace_down_hooks = BIT(MACE_HOOK_NET_DEV_QUEUE) | BIT(MACE_HOOK_NET_DEV_START_XMIT);
static const u32 mace_end_hooks = 0 MACE_HOOKS(MACE_BIT_AT_END);
static const u32 mace_placeless_hooks = (0 MACE_HOOKS(MACE_BIT)) &
					~(0 MACE_HOOKS(MACE_BIT_AT_DEVICE));

/* --- the context of a buffer ------------------------------------------------------ */

/**
 * struct mace_where - a place, and how records name its namespace
 *
 * @at: the place; serial 0: not known, or not certain
 * @names: the namespace's
 */
struct mace_where {
	struct mace_place at;
	u64 names;
};

/*
 * Where a buffer was at the last device hook: written there, or removed there if no session follows
 * the packet, and removed where the buffer is freed. So that no device hook is missed, all of them
 * are probed as long as a session wants a hook without a device.
 *
 * Not every buffer's end is at a hook (TCP frees its own without a tracepoint), and not every way
 * from one namespace into another passes a device hook (macvlan, tunnels, XDP). Hence a lookup
 * takes nothing for granted:
 *
 *	the buffer, its memory and its content (packet_key) are those of the entry, so that another
 *	life of the same buffer has no entry;
 *	a packet that was received has passed no other device, as skb->skb_iif tells, which the
 *	stack sets anew for each (__netif_receive_skb_core());
 *	any other packet is still at the device, as skb->dev tells, and has no route into another
 *	namespace (iptunnel_xmit() gives it one before the tunnel's outer device is seen).
 *
 * Words are written and read without a lock. @check covers them all, so that a torn entry is no
 * entry. An entry may be overwritten by that of another buffer; then the place is not known.
 *
 * @check: see above
 * @buffer: skb; its upper half XOR the lower one of skb->dev or, once received, the index of the
 *	device's bond or VRF or its own again
 * @place: ifindex (bits 0 to 30), MACE_CONTEXT_RECEIVED, serial
 * @names: the namespace's
 */
struct mace_context {
	u64 check;
	u64 buffer;
	u64 place;
	u64 names;
};

#define MACE_CONTEXT_RECEIVED BIT(31)
#define MACE_CONTEXT_AMBIGUOUS U32_MAX /* no index of a device */

static struct mace_context *mace_contexts;
static unsigned int mace_context_users;
/* Entries of before the last time that nobody followed buffers are void. */
static u64 mace_context_epoch;

static __always_inline struct mace_context *mace_context_of(const struct sk_buff *skb)
{
	return &mace_contexts[hash_ptr(skb, MACE_CONTEXT_BITS)];
}

static __always_inline u64 mace_context_check(const struct sk_buff *skb, u64 packet_key, u64 buffer,
					      u64 place, u64 names)
{
	/* 2^64 divided by the golden ratio: a change of one word changes the whole. */
	const u64 factor = GOLDEN_RATIO_64;
	/* The product is that of hash_ptr() in mace_context_of(). */
	u64 check = (unsigned long)skb * factor ^ READ_ONCE(mace_context_epoch);

	check = check * factor ^ (unsigned long)skb->head;
	check = check * factor ^ packet_key;
	check = check * factor ^ buffer;
	check = check * factor ^ place;
	return check * factor ^ names;
}

/*
 * Whether the stack may go on with a device on top of this one, without another hook. What a bridge
 * goes on with has hooks of its own, but VLAN devices come before the bridge.
 */
static __always_inline bool mace_is_handed_up(const struct sk_buff *skb,
					      const struct net_device *dev)
{
	return unlikely(!list_empty(&dev->adj_list.upper)) &&
	       (!netif_is_bridge_port(dev) || skb_vlan_tag_present(skb) ||
		(skb->protocol != htons(ETH_P_IP) && eth_type_vlan(skb->protocol)));
}

struct mace_upper {
	const struct sk_buff *skb;
	const struct net_device *dev;
	u32 ifindex;
	bool ambiguous;
};

/* Whether @upper is of another namespace, takes this packet, and would leave the same skb_iif. */
static int mace_check_upper(struct net_device *upper, struct netdev_nested_priv *priv)
{
	struct mace_upper *found = priv->data;

	if (net_eq(dev_net(upper), dev_net(found->dev)) ||
	    (upper->ifindex != found->dev->ifindex && upper->ifindex != found->ifindex))
		return 0;
	/* Unicast goes to the device with that address (macvlan), if it has one of its own. */
	if (upper->addr_len == ETH_ALEN && skb_mac_header_was_set(found->skb) &&
	    !ether_addr_equal(eth_hdr(found->skb)->h_dest, upper->dev_addr))
		return 0;
	found->ambiguous = true;
	return 1;
}

/*
 * What skb->skb_iif may be, beside the device's own index, as long as the packet is in the same
 * namespace: the index of its bond or VRF. MACE_CONTEXT_AMBIGUOUS, if it may be elsewhere and have
 * one of these all the same.
 */
static noinline u32 mace_upper_index(const struct sk_buff *skb, const struct net_device *dev)
{
	struct mace_upper found = { .skb = skb, .dev = dev, .ifindex = dev->ifindex };
	struct netdev_nested_priv priv = { .data = &found };
	struct net_device *master;

	rcu_read_lock();
	master = netdev_master_upper_dev_get_rcu((struct net_device *)dev);
	if (master)
		found.ifindex = master->ifindex;
	netdev_walk_all_upper_dev_rcu((struct net_device *)dev, mace_check_upper, &priv);
	rcu_read_unlock();
	return found.ambiguous ? MACE_CONTEXT_AMBIGUOUS : found.ifindex;
}

static __always_inline void mace_context_set(const struct sk_buff *skb, enum mace_hook hook,
					     const struct net_device *dev,
					     const struct mace_netns *netns, u64 packet_key)
{
	u64 place = (u64)netns->serial << 32 | (u32)dev->ifindex;
	struct mace_context *context = mace_context_of(skb);
	u64 names = netns->names;
	u32 via = (unsigned long)dev;
	u64 buffer;

	if (hook == MACE_HOOK_NETIF_RECEIVE_SKB || hook == MACE_HOOK_IP_RCV) {
		via = mace_is_handed_up(skb, dev) ? mace_upper_index(skb, dev) : dev->ifindex;
		place |= MACE_CONTEXT_RECEIVED;
	}
	buffer = (u64)via << 32 ^ (unsigned long)skb;
	WRITE_ONCE(context->check, mace_context_check(skb, packet_key, buffer, place, names));
	WRITE_ONCE(context->buffer, buffer);
	WRITE_ONCE(context->place, place);
	WRITE_ONCE(context->names, names);
}

static __always_inline void mace_context_forget(const struct sk_buff *skb)
{
	struct mace_context *context = mace_context_of(skb);

	if ((u32)READ_ONCE(context->buffer) == (u32)(unsigned long)skb)
		WRITE_ONCE(context->buffer, 0);
}

/* Whether a route leads out of the namespace; only of a packet that is still at a device. */
static bool mace_is_routed_elsewhere(const struct sk_buff *skb, u32 serial)
{
	const struct dst_entry *dst = (struct dst_entry *)(skb->_skb_refdst & SKB_DST_PTRMASK);
	const struct net_device *dev = dst ? READ_ONCE(dst->dev) : NULL;

	return dev && mace_netns_serial(dev_net(dev)) != serial;
}

/*
 * Where the buffer was at the last device hook, for the record to say; @where->at.serial is 0 if it
 * is not certain that it is still there. Returns whether there is an entry.
 */
static __always_inline bool mace_context_get(const struct sk_buff *skb, u64 packet_key,
					     struct mace_where *where)
{
	const struct mace_context *context = mace_context_of(skb);
	u64 check = READ_ONCE(context->check), buffer = READ_ONCE(context->buffer),
	    place = READ_ONCE(context->place), names = READ_ONCE(context->names);
	u32 via = (buffer ^ (unsigned long)skb) >> 32, serial = place >> 32;
	bool there;

	if ((u32)buffer != (u32)(unsigned long)skb ||
	    check != mace_context_check(skb, packet_key, buffer, place, names))
		return false;
	where->at.ifindex = (u32)place & ~(u32)MACE_CONTEXT_RECEIVED;
	where->names = names;
	if (place & MACE_CONTEXT_RECEIVED)
		there = via != MACE_CONTEXT_AMBIGUOUS &&
			(skb->skb_iif == where->at.ifindex || skb->skb_iif == via);
	else
		there = (u32)(unsigned long)skb->dev == via &&
			!mace_is_routed_elsewhere(skb, serial);
	where->at.serial = there ? serial : 0;
	return true;
}

/* --- where a packet was received -------------------------------------------------- */

/*
 * Of the buffers that a CPU has received, each with its device, in one word. IP is handed a packet
 * on the CPU that has received it: if the word differs, the packet has changed devices in between,
 * past every tracepoint. A clone, which IP makes of a shared buffer, has the same head. An entry
 * may be overwritten by that of another buffer; then the packet is recorded once more.
 */
static DEFINE_PER_CPU(u64, mace_received[1 << MACE_RECEIVED_BITS]);

static __always_inline void mace_received_set(const struct sk_buff *skb,
					      const struct net_device *dev)
{
	u64 head_hash = mace_head_hash(skb);

	this_cpu_write(mace_received[head_hash >> (64 - MACE_RECEIVED_BITS)],
		       head_hash ^ (unsigned long)dev);
}

/* Also with interrupts on: it is one word that is read. */
static __always_inline bool mace_was_received(const struct sk_buff *skb,
					      const struct net_device *dev)
{
	u64 head_hash = mace_head_hash(skb);

	return this_cpu_read(mace_received[head_hash >> (64 - MACE_RECEIVED_BITS)]) ==
	       (head_hash ^ (unsigned long)dev);
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

/* Count a call of a hook's probe. Return: whether it is one of those whose time is added up. */
static __always_inline bool mace_is_timed(enum mace_hook hook)
{
	return !(this_cpu_inc_return(mace_costs.calls[hook]) & mace_cost_mask);
}

static noinline void mace_add_time(enum mace_hook hook, u64 begin_ns)
{
	this_cpu_inc(mace_costs.timed[hook]);
	this_cpu_add(mace_costs.timed_ns[hook], ktime_get_mono_fast_ns() - begin_ns);
}

/* Whether the place is one of those that MACE_IOC_PLACES has listed. */
static bool mace_is_listed(const struct mace_session *session, struct mace_where where)
{
	const struct mace_listed *listed = rcu_dereference_raw(session->listed);
	u32 netns = where.names >> session->name_shift;
	u32 i;

	if (!listed)
		return true;
	if (!where.at.serial)
		return false;
	for (i = 0; i < listed->places.netns_count; i++)
		if (listed->places.netns[i] == netns)
			return true;
	for (i = 0; i < listed->places.device_count; i++)
		if (listed->places.device[i].netns == netns &&
		    listed->places.device[i].ifindex == where.at.ifindex)
			return true;
	return false;
}

static noinline bool mace_is_among(const struct mace_session *session, struct mace_where where)
{
	struct mace_place at = where.at;
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
	return mace_is_listed(session, where);
}

/* By value, as everything of a record that is not in memory yet: registers hold it. */
static __always_inline bool mace_is_at(const struct mace_session *session, struct mace_where where)
{
	return likely(!(READ_ONCE(session->filters) & MACE_FILTER_PLACE)) ||
	       mace_is_among(session, where);
}

static noinline bool mace_is_content_wanted(const struct mace_session *session,
					    const struct mace_record *read)
{
	if (session->l4_filtered &&
	    !(session->l4_protos[read->l4_proto / 64] & 1ULL << read->l4_proto % 64))
		return false;
	/* What has no key belongs to no sample. */
	return !session->sample_mask ||
	       (read->packet_key && !(read->packet_key & session->sample_mask));
}

static __always_inline bool mace_is_wanted(const struct mace_session *session,
					   const struct mace_record *read)
{
	return likely(!(session->filters & MACE_FILTER_CONTENT)) ||
	       mace_is_content_wanted(session, read);
}

/**
 * struct mace_here - what a record says of this hook, and not of the packet
 *
 * @ts_ns: as in the record
 * @ifindex: likewise
 * @l3_len: likewise
 * @drop_reason: likewise
 * @gso_segs: likewise
 * @flags: beside those of the packet
 */
struct mace_here {
	u64 ts_ns;
	u32 ifindex;
	u32 l3_len;
	u32 drop_reason;
	u16 gso_segs;
	u8 flags;
};

/* Into the ring at once: what was read, and what is here. */
static __always_inline void mace_record_to(struct mace_session *session, enum mace_hook hook,
					   const struct mace_record *read, struct mace_here here,
					   u64 names)
{
	struct mace_ring *ring = session->rings[read->cpu];
	const u64 *from = (const u64 *)read;
	struct mace_record *slot;
	u64 *to;

	if (unlikely(!ring)) {
		atomic64_inc(&session->lost[hook]);
		return;
	}
	if (unlikely(!mace_ring_has_room(ring, hook, here.ts_ns)))
		return;
	slot = ring->next;
	to = (u64 *)slot;
	to[1] = from[1]; /* skb_id */
	to[2] = from[2]; /* packet_key */
	/* Two stores; the compiler would make one of them, by a shift and more. */
	WRITE_ONCE(slot->netns, names >> session->name_shift);
	slot->ifindex = here.ifindex;
	slot->l3_len = here.l3_len;
	((u32 *)slot)[9] = ((const u32 *)read)[9]; /* l4_src, l4_dst */
	to[5] = from[5]; /* l4_seq, drop_reason */
	to[6] = from[6]; /* gso_segs to vlan */
	to[7] = from[7]; /* hook to pad */
	if (here.drop_reason)
		slot->drop_reason = here.drop_reason;
	slot->gso_segs = here.gso_segs;
	slot->hook = hook;
	if (unlikely(here.flags))
		slot->flags |= here.flags;
	if (unlikely(mace_ring_written(ring, hook, slot, here.ts_ns)) &&
	    mace_ring_close_subbuf(ring) >= session->watermark)
		irq_work_queue(&session->wake);
}

static __always_inline struct mace_where mace_where_is(const struct mace_netns *netns, u32 ifindex)
{
	return (struct mace_where){
		.at = { .serial = netns->serial, .ifindex = ifindex },
		.names = netns->names,
	};
}

/*
 * A packet at no device: where it was, and what is known of it here; @read is of its bytes. Sets
 * MACE_FLAG_RECALLED in @flags, if it is from the context.
 */
static __always_inline struct mace_where mace_where_was(const struct sk_buff *skb,
							const struct mace_record *read, u8 *flags)
{
	struct mace_where where = {};
	bool recalled;

	/* Only what is read again is compared: what is not IP has no context. */
	recalled = read->ip_version && mace_context_get(skb, read->packet_key, &where);
	/* Queued at a socket, charged to it: it lives, where its reader does. */
	if (skb->sk && skb->destructor == sock_rfree &&
	    mace_netns_serial(sock_net(skb->sk)) != where.at.serial) {
		where = mace_where_is(mace_netns_of(sock_net(skb->sk)), 0);
		recalled = false;
	}
	if (recalled)
		*flags |= MACE_FLAG_RECALLED;
	return where;
}

/* Read the packet, which is at @dev if there is one. */
static __always_inline struct mace_read mace_read_at(enum mace_hook hook, const struct sk_buff *skb,
						     const struct net_device *dev)
{
	const u8 *at;

	if (!dev)
		return (struct mace_read){ mace_packet_read_any(skb), 0 };
	/* The way down: the header is set. The way up: it may not be, but the data begins there. */
	at = BIT(hook) & mace_down_hooks ? skb_network_header(skb) : skb->data;
	return mace_packet_read_device(skb, at);
}

/*
 * Where the packet is or was, and all that a record says of this hook; @netns: of @dev, if there is
 * one; @detail: of mace_observe()
 */
static __always_inline struct mace_where
mace_describe(enum mace_hook hook, const struct sk_buff *skb, const struct net_device *dev,
	      const struct mace_netns *netns, struct mace_read read, u64 now_ns, u32 detail,
	      struct mace_here *here)
{
	const struct skb_shared_info *shared;
	struct mace_where where;

	*here = (struct mace_here){
		.ts_ns = now_ns,
		.l3_len = read.l3_len,
	};
	/* A buffer that is freed may have no data any more. */
	if (BIT(hook) & mace_device_hooks || skb->head) {
		shared = skb_shinfo(skb);
		here->gso_segs = shared->gso_size ? shared->gso_segs : 0;
		/* As skb_cloned(). */
		if (skb->cloned && (atomic_read(&shared->dataref) & SKB_DATAREF_MASK) != 1)
			here->flags |= MACE_FLAG_CLONED;
	}
	if (dev) {
		where = mace_where_is(netns, dev->ifindex);
	} else {
		where = mace_where_was(skb, read.record, &here->flags);
		here->l3_len = hook == MACE_HOOK_KFREE_SKB ? 0 : detail;
		here->drop_reason = hook == MACE_HOOK_KFREE_SKB ? detail : 0;
	}
	here->ifindex = where.at.ifindex;
	return where;
}

/* Note where the buffer is, or was; @record: its packet's, if a session has @followed it */
static __always_inline void mace_note_context(enum mace_hook hook, const struct sk_buff *skb,
					      const struct net_device *dev,
					      const struct mace_netns *netns, bool followed,
					      const struct mace_record *record)
{
	if (dev && likely(READ_ONCE(mace_context_users))) {
		if (followed && likely(record->ip_version))
			mace_context_set(skb, hook, dev, netns, record->packet_key);
		else
			mace_context_forget(skb);
	} else if (BIT(hook) & mace_end_hooks) {
		mace_context_forget(skb);
	}
}

/* The records for the sessions from @node on. Return: whether any of them follows the packet. */
static noinline bool mace_record_to_each(struct hlist_node *node, enum mace_hook hook,
					 const struct sk_buff *skb, const struct net_device *dev,
					 struct mace_read read, u64 now_ns, u32 detail)
{
	struct mace_session *session;
	struct mace_where where;
	struct mace_here here;
	bool followed = false;

	where = mace_describe(hook, skb, dev, dev ? mace_netns_of(dev_net(dev)) : NULL, read,
			      now_ns, detail, &here);
	for (; node; node = rcu_dereference_raw(hlist_next_rcu(node))) {
		session = hlist_entry(node, struct mace_session, node);
		if (!(session->watched & BIT(hook)) || !mace_is_at(session, where) ||
		    !mace_is_wanted(session, read.record))
			continue;
		followed = true;
		if (session->hooks & BIT(hook))
			mace_record_to(session, hook, read.record, here, where.names);
	}
	return followed;
}

/* The first session from @node on that watches this hook, and @dev if there is one. */
static __always_inline struct mace_session *mace_next_session(struct hlist_node *node,
							      enum mace_hook hook,
							      const struct net_device *dev,
							      const struct mace_netns *netns)
{
	struct mace_where where = {};
	struct mace_session *session;

	if (dev)
		where = mace_where_is(netns, dev->ifindex);
	for (; node; node = rcu_dereference_raw(hlist_next_rcu(node))) {
		session = hlist_entry(node, struct mace_session, node);
		if ((session->watched & BIT(hook)) && (!dev || mace_is_at(session, where)))
			return session;
	}
	return NULL;
}

/* What mace_observe() does where the first session does not get every packet, if there is one. */
static noinline void mace_observe_filtered(struct hlist_node *node, enum mace_hook hook,
					   const struct sk_buff *skb, const struct net_device *dev,
					   u64 now_ns, u32 detail)
{
	const struct mace_netns *netns = dev ? mace_netns_of(dev_net(dev)) : NULL;
	struct mace_session *session = mace_next_session(node, hook, dev, netns);
	struct mace_read read = {};
	bool followed = false;

	/* A packet that nobody watches is not read. */
	if (session) {
		read = mace_read_at(hook, skb, dev);
		followed =
			mace_record_to_each(&session->node, hook, skb, dev, read, now_ns, detail);
	}
	mace_note_context(hook, skb, dev, netns, followed, read.record);
}

/*
 * Inlined into every probe, so that none pays for what only another one does; what happens seldom
 * is in functions of its own: filters, and further sessions.
 *
 * @dev: the device that the packet is at, or NULL
 * @detail: bytes copied at MACE_HOOK_SKB_COPY_DATAGRAM_IOVEC, the reason at MACE_HOOK_KFREE_SKB
 */
static __always_inline void mace_observe(enum mace_hook hook, const struct sk_buff *skb,
					 const struct net_device *dev, u32 detail)
{
	const struct mace_netns *netns = NULL;
	struct mace_session *session;
	struct mace_where where;
	struct hlist_node *node;
	struct mace_here here;
	struct mace_read read;
	unsigned long irq;
	u64 now_ns;

	/* With interrupts off we are a reader of RCU's as well (since v5.0, whatisRCU.rst). */
	local_irq_save(irq);
	now_ns = ktime_get_mono_fast_ns();
	if (hook == MACE_HOOK_NETIF_RECEIVE_SKB)
		mace_received_set(skb, dev);
	node = rcu_dereference_raw(hlist_first_rcu(&mace_running));
	session = hlist_entry_safe(node, struct mace_session, node);
	if (likely(session && READ_ONCE(session->unfiltered) & BIT(hook))) {
		read = mace_read_at(hook, skb, dev);
		if (dev)
			netns = mace_netns_of(dev_net(dev));
		where = mace_describe(hook, skb, dev, netns, read, now_ns, detail, &here);
		mace_record_to(session, hook, read.record, here, where.names);
		node = rcu_dereference_raw(hlist_next_rcu(&session->node));
		if (unlikely(node))
			mace_record_to_each(node, hook, skb, dev, read, now_ns, detail);
		mace_note_context(hook, skb, dev, netns, true, read.record);
	} else {
		mace_observe_filtered(node, hook, skb, dev, now_ns, detail);
	}
	if (unlikely(mace_is_timed(hook)))
		mace_add_time(hook, now_ns);
	local_irq_restore(irq);
}

static noinline void mace_observe_nowhere(enum mace_hook hook, const struct sk_buff *skb)
{
	mace_observe(hook, skb, NULL, 0);
}

static __always_inline void mace_observe_at_device(enum mace_hook hook, const struct sk_buff *skb,
						   const struct net_device *dev)
{
	if (likely(dev))
		mace_observe(hook, skb, dev, 0);
	else
		mace_observe_nowhere(hook, skb);
}

/* --- the probes ------------------------------------------------------------------- */

static void mace_probe_net_dev_queue(void *data, struct sk_buff *skb)
{
	mace_observe_at_device(MACE_HOOK_NET_DEV_QUEUE, skb, skb->dev);
}

static void mace_probe_net_dev_start_xmit(void *data, const struct sk_buff *skb,
					  const struct net_device *dev)
{
	mace_observe_at_device(MACE_HOOK_NET_DEV_START_XMIT, skb, dev);
}

static void mace_probe_netif_rx(void *data, struct sk_buff *skb)
{
	mace_observe_at_device(MACE_HOOK_NETIF_RX, skb, skb->dev);
}

static void mace_probe_netif_receive_skb(void *data, struct sk_buff *skb)
{
	mace_observe_at_device(MACE_HOOK_NETIF_RECEIVE_SKB, skb, skb->dev);
}

static void mace_probe_napi_gro_receive_entry(void *data, const struct sk_buff *skb)
{
	mace_observe_at_device(MACE_HOOK_NAPI_GRO_RECEIVE_ENTRY, skb, skb->dev);
}

static void mace_probe_skb_copy_datagram_iovec(void *data, const struct sk_buff *skb, int bytes)
{
	mace_observe(MACE_HOOK_SKB_COPY_DATAGRAM_IOVEC, skb, NULL, bytes);
}

MACE_DEFINE_CONSUME_SKB(mace_probe_consume_skb, skb)
{
	mace_observe(MACE_HOOK_CONSUME_SKB, skb, NULL, 0);
}

MACE_DEFINE_KFREE_SKB(mace_probe_kfree_skb, skb)
{
	mace_observe(MACE_HOOK_KFREE_SKB, skb, NULL, MACE_DROP_REASON());
}

/* A call that has nothing to do, as long as it takes. */
static noinline void mace_time_received(const struct sk_buff *skb)
{
	u64 begin_ns = ktime_get_mono_fast_ns();

	if (mace_was_received(skb, skb->dev))
		mace_add_time(MACE_HOOK_IP_RCV, begin_ns);
}

static noinline void mace_observe_ip_rcv(const struct sk_buff *skb)
{
	/*
	 * A bridge calls with its ports' packets, before it receives them itself, and a VRF with
	 * packets that IP was handed before.
	 */
	if (!nf_bridge_in_prerouting(skb) && !netif_is_l3_master(skb->dev))
		mace_observe(MACE_HOOK_IP_RCV, skb, skb->dev, 0);
}

/* Nearly always the packet was received where it is: neither the clock nor interrupts matter. */
static void mace_probe_ip_rcv(const struct sk_buff *skb)
{
	if (unlikely(!mace_was_received(skb, skb->dev)))
		mace_observe_ip_rcv(skb);
	else if (unlikely(mace_is_timed(MACE_HOOK_IP_RCV)))
		mace_time_received(skb);
}

/* --- ip_rcv(), by netfilter --------------------------------------------------------- */

#ifdef CONFIG_NETFILTER
static unsigned int mace_prerouting(void *unused, struct sk_buff *skb,
				    const struct nf_hook_state *state)
{
	mace_probe_ip_rcv(skb);
	return NF_ACCEPT;
}

/* Before all others: they may drop the packet or take it. NFPROTO_INET is IPv4 and IPv6. */
static const struct nf_hook_ops mace_prerouting_ops = {
	.hook = mace_prerouting,
	.pf = NFPROTO_INET,
	.hooknum = NF_INET_PRE_ROUTING,
	.priority = INT_MIN,
};

static int __net_init mace_prerouting_init(struct net *net)
{
	return nf_register_net_hook(net, &mace_prerouting_ops);
}

static void __net_exit mace_prerouting_exit(struct net *net)
{
	nf_unregister_net_hook(net, &mace_prerouting_ops);
}

/* In every namespace, those to come included, as tracepoints are; each session filters. */
static struct pernet_operations mace_prerouting_everywhere = {
	.init = mace_prerouting_init,
	.exit = mace_prerouting_exit,
};

static int mace_ip_rcv_register(void)
{
	return register_pernet_subsys(&mace_prerouting_everywhere);
}

static void mace_ip_rcv_unregister(void)
{
	unregister_pernet_subsys(&mace_prerouting_everywhere);
}
#else
static int mace_ip_rcv_register(void)
{
	return -EOPNOTSUPP;
}

static void mace_ip_rcv_unregister(void)
{
}
#endif

/* --- the table of probes ------------------------------------------------------------ */

/**
 * struct mace_probe - a row of the table of probes
 * @name: the tracepoint's
 * @function: our function on it; NULL at ip_rcv()
 * @tracepoint: found when the module is loaded; NULL if this kernel has none of that name
 * @available: whether this kernel has the hook
 * @users: running sessions that watch it; mace_running_lock
 * @registered: whether our function is on it; mace_running_lock
 */
struct mace_probe {
	const char *name;
	void *function;
	struct tracepoint *tracepoint;
	bool available;
	unsigned int users;
	bool registered;
};

#define MACE_PROBE(hook, tracepoint_name, at)             \
	[MACE_HOOK_##hook] = {                            \
		.name = #tracepoint_name,                 \
		.function = mace_probe_##tracepoint_name, \
	},

static struct mace_probe mace_probes[MACE_HOOK_COUNT] = {
	MACE_TRACEPOINTS(MACE_PROBE)[MACE_HOOK_IP_RCV] = { .available =
								   IS_ENABLED(CONFIG_NETFILTER) },
};

#define MACE_CHECK_PROBE(hook, tracepoint, at) \
	check_trace_callback_type_##tracepoint(mace_probe_##tracepoint);

/* The table holds void pointers; here the compiler says whether they fit their tracepoints. */
static void __maybe_unused mace_check_probes(void)
{
	MACE_TRACEPOINTS(MACE_CHECK_PROBE)
}

static void mace_find_tracepoint(struct tracepoint *tracepoint, void *unused)
{
	int hook;

	for (hook = 0; hook < MACE_HOOK_COUNT; hook++) {
		if (mace_probes[hook].name && !strcmp(mace_probes[hook].name, tracepoint->name)) {
			mace_probes[hook].tracepoint = tracepoint;
			mace_probes[hook].available = true;
		}
	}
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
		if (mace_probes[hook].available)
			hooks |= BIT(hook);
	return hooks;
}

/**
 * mace_probes_watched() - what has to be probed for some hooks
 * @hooks: bit n: hook n
 *
 * Return: @hooks, and every device hook if one of @hooks has no device: its records say where the
 * buffer was last. With ip_rcv() also the hook that says where the packet was received.
 */
u32 mace_probes_watched(u32 hooks)
{
	if (hooks & mace_placeless_hooks)
		hooks |= mace_device_hooks & mace_probes_available();
	if (hooks & BIT(MACE_HOOK_IP_RCV))
		hooks |= BIT(MACE_HOOK_NETIF_RECEIVE_SKB) & mace_probes_available();
	return hooks;
}

static int mace_probe_register(const struct mace_probe *probe)
{
	if (!probe->tracepoint)
		return mace_ip_rcv_register();
	return tracepoint_probe_register(probe->tracepoint, probe->function, NULL);
}

static int mace_probe_get(struct mace_probe *probe)
{
	int error = 0;

	if (!probe->registered)
		error = mace_probe_register(probe);
	if (error)
		return error;
	probe->registered = true;
	probe->users++;
	return 0;
}

/* Before v5.11 it needs memory, and may have none: then it stays registered. */
static void mace_probe_unregister(struct mace_probe *probe)
{
	if (!probe->tracepoint) {
		mace_ip_rcv_unregister();
		probe->registered = false;
	} else if (!tracepoint_probe_unregister(probe->tracepoint, probe->function, NULL)) {
		probe->registered = false;
	}
}

static void mace_probe_put(struct mace_probe *probe)
{
	if (!--probe->users)
		mace_probe_unregister(probe);
}

/**
 * mace_probes_get() - one more user of some hooks
 * @hooks: bit n: hook n; all available; as mace_probes_watched() returns them
 *
 * Context: may sleep; mace_running_lock is held. Return: 0, or -ENOMEM or what registering a probe
 * returned: then nothing is got.
 */
int mace_probes_get(u32 hooks)
{
	int hook, error;

	/* Once there is one, it stays until the module goes. */
	if (!mace_contexts)
		mace_contexts = vzalloc(sizeof(*mace_contexts) << MACE_CONTEXT_BITS);
	if (!mace_contexts)
		return -ENOMEM;
	for (hook = 0; hook < MACE_HOOK_COUNT; hook++) {
		if (!(hooks & BIT(hook)))
			continue;
		error = mace_probe_get(&mace_probes[hook]);
		if (error)
			goto unwind;
	}
	if (hooks & mace_placeless_hooks) {
		/* Whatever happened before every device hook was probed, happened unseen. */
		if (!mace_context_users)
			WRITE_ONCE(mace_context_epoch, mace_context_epoch + 1);
		WRITE_ONCE(mace_context_users, mace_context_users + 1);
	}
	return 0;
unwind:
	while (--hook >= 0)
		if (hooks & BIT(hook))
			mace_probe_put(&mace_probes[hook]);
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
			mace_probe_put(&mace_probes[hook]);
	if (hooks & mace_placeless_hooks)
		WRITE_ONCE(mace_context_users, mace_context_users - 1);
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

void __init mace_probes_init(void)
{
	mace_cost_every = roundup_pow_of_two(clamp(mace_cost_every, 1U, 1U << 20));
	mace_cost_mask = mace_cost_every - 1;
	for_each_kernel_tracepoint(mace_find_tracepoint, NULL);
}

/* No session is left. */
void mace_probes_exit(void)
{
	struct mace_probe *probe;

	for (probe = mace_probes; probe < mace_probes + MACE_HOOK_COUNT; probe++) {
		while (probe->registered) {
			mace_probe_unregister(probe);
			if (probe->registered)
				msleep(20);
		}
	}
	/* No probe is registered; those that were may still be running. */
	tracepoint_synchronize_unregister();
	vfree(mace_contexts);
}
