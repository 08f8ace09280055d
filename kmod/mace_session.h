/* SPDX-License-Identifier: GPL-2.0-only */
/* Sessions: who reads what. One for every open file of /dev/mace. */
#ifndef _MACE_SESSION_H
#define _MACE_SESSION_H

#include <linux/irq_work.h>
#include <linux/list.h>
#include <linux/memcontrol.h>
#include <linux/mutex.h>
#include <linux/rcupdate.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <net/net_namespace.h>
#include <net/netns/generic.h>

#include "mace_compat.h"
#include "mace_ring.h"

/**
 * struct mace_netns - what we know of a network namespace
 *
 * @serial: unlike an inode never given out again (2^32 namespaces at 1000 a second are 49 days of
 *	nothing else);
 *	never 0
 * @names: how records name it: its inode, and in the upper half the lower one of its cookie, which
 *	is all of it for the first 2^32 namespaces of a boot; 0 where the kernel has none
 */
struct mace_netns {
	u32 serial;
	u64 names;
};

/**
 * struct mace_place - a device as filters know it
 *
 * @serial: its namespace
 * @ifindex: its index there
 */
struct mace_place {
	u32 serial;
	u32 ifindex;
};

/**
 * struct mace_listed - the places of a MACE_IOC_PLACES, until the next one
 *
 * @places: the call's
 * @rcu: frees it when no probe reads it any more
 */
struct mace_listed {
	struct mace_places places;
	struct rcu_head rcu;
};

/* Bits of mace_session.filters. */
#define MACE_FILTER_PLACE 0x1 /* namespaces or devices */
#define MACE_FILTER_CONTENT 0x2 /* protocols or a sample */

/**
 * struct mace_session - one reader
 *
 * What probes read (@hooks to @rings) does not change while the session is in the list of running
 * ones, but for @listed and what it changes in @filters and @unfiltered.
 *
 * @node: in the list of running sessions; RCU
 * @link: in the list of open sessions
 * @lock: state, and all calls from user space but poll() and mmap()
 * @ready: whether SETUP was done
 * @running: whether @node is in the list
 * @all: whether it may see every network namespace
 * @gone: whether its own namespace has died
 * @own_serial: namespace of the opener
 * @own_inode: its inode
 * @hooks: bit n: hook n
 * @watched: bit n: hook n; those, and the ones that say where a buffer is
 * @unfiltered: bit n: hook n; those of @hooks of which it gets every packet
 * @name_shift: records name namespaces by this half of mace_netns.names: 0 the inode, 32 the cookie
 * @filters: MACE_FILTER_*: what of the filters below there is
 * @sample_mask: the bits of packet_key that must be 0
 * @serial_count: namespaces in @serials; 0: all
 * @serials: namespaces to be seen
 * @place_count: devices in @places; 0: all
 * @places: devices to be seen
 * @listed: places of which one must hold too; NULL: all. Replaced under @lock, read under RCU
 * @l4_filtered: whether @l4_protos counts
 * @l4_protos: bit map of IP protocols
 * @subbuf_bytes: size of a sub-buffer
 * @subbufs: sub-buffers of a ring
 * @ring_pages: memory of one ring
 * @pages: memory of all @rings; mace_open_lock
 * @memcg: the opener's memory cgroup, charged for rings
 * @rings: by CPU number, for mace_session_ring(); NULL for a CPU that has not been online since
 *	SETUP, or for which there was no memory
 * @lost: records of CPUs without a ring, by hook
 * @watermark: full sub-buffers that make it readable
 * @flush_ms: or records that have waited this long
 * @flush_due: whether they have
 * @wait: readers in poll()
 * @wake: wakes them from a probe's context
 * @flush: looks every @flush_ms whether records wait
 */
struct mace_session {
	struct hlist_node node;
	struct list_head link;
	struct mutex lock; /* state, and all calls of user space but poll() and mmap() */
	bool ready;
	bool running;
	bool all;
	bool gone;
	u32 own_serial;
	u32 own_inode;
	u32 hooks;
	u32 watched;
	u32 unfiltered;
	u32 name_shift;
	u32 filters;
	u64 sample_mask;
	u32 serial_count;
	u32 serials[MACE_MAX_NETNS];
	u32 place_count;
	struct mace_place places[MACE_MAX_DEVICES];
	struct mace_listed __rcu *listed;
	bool l4_filtered;
	u64 l4_protos[4];
	u32 subbuf_bytes;
	u32 subbufs;
	unsigned long ring_pages;
	unsigned long pages;
	struct mem_cgroup *memcg;
	struct mace_ring **rings;
	atomic64_t lost[MACE_HOOK_SLOTS];
	u32 watermark;
	u32 flush_ms;
	bool flush_due;
	wait_queue_head_t wait;
	struct irq_work wake;
	struct delayed_work flush;
};

extern unsigned int mace_net_id;
extern struct hlist_head mace_running;
extern unsigned int mace_max_ring_mib;
extern unsigned int mace_max_total_mib;
extern unsigned int mace_max_sessions;
extern unsigned int mace_max_netns_mib;
extern unsigned int mace_max_netns_sessions;
extern unsigned int mace_host_mib;
extern unsigned int mace_host_sessions;

/**
 * mace_netns_of() - what we know of a namespace
 * @net: any that is alive
 *
 * Context: a reader of RCU's, or one who holds @net. Return: it, not NULL.
 */
static inline const struct mace_netns *mace_netns_of(const struct net *net)
{
	/* As net_generic(), without its lock. */
	return rcu_dereference_raw(net->gen)->ptr[mace_net_id];
}

/**
 * mace_netns_serial() - number of a namespace, never given to another one
 * @net: any that is alive
 *
 * Context: as mace_netns_of(). Return: the number, not 0.
 */
static inline u32 mace_netns_serial(const struct net *net)
{
	return mace_netns_of(net)->serial;
}

struct mace_session *mace_session_open(void);
void mace_session_close(struct mace_session *session);
int mace_session_setup(struct mace_session *session, struct mace_setup *setup);
void mace_session_commit(struct mace_session *session, bool told);
int mace_session_list(struct mace_session *session, const struct mace_places *places);
int mace_session_start(struct mace_session *session);
void mace_session_stop(struct mace_session *session);
int mace_session_stats(struct mace_session *session, struct mace_stats *stats);
struct mace_ring *mace_session_ring(const struct mace_session *session, u32 cpu);
bool mace_session_ready(const struct mace_session *session);
bool mace_session_readable(const struct mace_session *session);

int mace_sessions_init(void);
void mace_sessions_exit(void);

#endif
