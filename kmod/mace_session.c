// SPDX-License-Identifier: GPL-2.0-only
/*
 * Sessions: rights, filters, rings, and the list of those that run.
 *
 * Locks, in the order in which they are taken:
 *
 *	session->lock		the state of one session; held by its calls from user space
 *	cpus_read_lock()	which CPUs are online, and so have a ring
 *	mace_running_lock	mace_running, and the users of each probe
 *	mace_open_lock		mace_open, and the memory of each session's rings
 *
 * Probes walk mace_running under RCU and take no lock. A session is taken out of the
 * list, and a grace period passes, before anything of it is freed.
 *
 * Rights. A session belongs to the network namespace that its opener was in at open(), as a socket
 * does. It may see every namespace if that one is the first and its opener has CAP_SYS_ADMIN over
 * the machine: the host's root. Any other opener needs CAP_NET_RAW over its namespace, as for a
 * packet socket, and sees what is at devices of this namespace. Rights are those of the open file,
 * whoever has it now.
 *
 * Quotas. Sessions of all but the host's root have a limit for each namespace, in number and in
 * memory, and leave a part of the whole to the host's root, whatever namespaces they make.
 */
#include <linux/atomic.h>
#include <linux/capability.h>
#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/cpumask.h>
#include <linux/err.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/nospec.h>
#include <linux/nsproxy.h>
#include <linux/rculist.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <net/net_namespace.h>
#include <net/netns/generic.h>

#include "mace_packet.h"
#include "mace_probes.h"
#include "mace_session.h"

#define MACE_SUBBUF_BYTES_MAX (4U << 20)
#define MACE_FLUSH_MS_MAX 10000U

struct hlist_head mace_running = HLIST_HEAD_INIT;
unsigned int mace_max_ring_mib = 64;
unsigned int mace_max_sessions = 16;
unsigned int mace_max_netns_sessions = 4;
unsigned int mace_host_sessions = 4;
/* 0: mace_default_limits() */
unsigned int mace_max_total_mib;
unsigned int mace_max_netns_mib;
unsigned int mace_host_mib;

static DEFINE_MUTEX(mace_running_lock);
static DEFINE_MUTEX(mace_open_lock);
static LIST_HEAD(mace_open);
static int mace_cpu_state;

/* --- network namespaces ----------------------------------------------------------- */

unsigned int mace_net_id __read_mostly;
static atomic_t mace_last_serial = ATOMIC_INIT(0);

static int __net_init mace_netns_init(struct net *net)
{
	struct mace_netns *netns = net_generic(net, mace_net_id);

	netns->serial = atomic_inc_return(&mace_last_serial);
	/* Both are set before any module is asked. */
	netns->names = (u64)MACE_NETNS_COOKIE(net) << 32 | net->ns.inum;
	return 0;
}

static void __net_exit mace_netns_exit(struct net *net)
{
	u32 serial = mace_netns_serial(net);
	struct mace_session *each;

	mutex_lock(&mace_open_lock);
	list_for_each_entry(each, &mace_open, link) {
		if (each->own_serial == serial) {
			WRITE_ONCE(each->gone, true);
			wake_up_interruptible(&each->wait);
		}
	}
	mutex_unlock(&mace_open_lock);
}

static struct pernet_operations mace_netns_operations = {
	.init = mace_netns_init,
	.exit = mace_netns_exit,
	.id = &mace_net_id,
	.size = sizeof(struct mace_netns),
};

/* --- quotas ----------------------------------------------------------------------- */

/* What all sessions hold, those of others than the host's root, and those of one namespace. */
struct mace_held {
	unsigned int sessions;
	unsigned int others_sessions;
	unsigned int netns_sessions;
	u64 pages;
	u64 others_pages;
	u64 netns_pages;
};

static void mace_hold(struct mace_held *held, u32 serial)
{
	const struct mace_session *each;

	lockdep_assert_held(&mace_open_lock);
	memset(held, 0, sizeof(*held));
	list_for_each_entry(each, &mace_open, link) {
		held->sessions++;
		held->pages += each->pages;
		if (each->all)
			continue;
		held->others_sessions++;
		held->others_pages += each->pages;
		if (each->own_serial != serial)
			continue;
		held->netns_sessions++;
		held->netns_pages += each->pages;
	}
}

/* Whether @more fits into @limit less @reserve. */
static bool mace_fits(u64 more, u64 limit, u64 reserve)
{
	return limit > reserve && more <= limit - reserve;
}

static bool mace_may_open(const struct mace_session *session)
{
	unsigned int limit = READ_ONCE(mace_max_sessions);
	struct mace_held held;

	mace_hold(&held, session->own_serial);
	return held.sessions < limit &&
	       (session->all ||
		(mace_fits(held.others_sessions + 1, limit, READ_ONCE(mace_host_sessions)) &&
		 held.netns_sessions < READ_ONCE(mace_max_netns_sessions)));
}

static u64 mace_mib_pages(unsigned int mib)
{
	return (u64)mib << (20 - PAGE_SHIFT);
}

static bool mace_may_have(const struct mace_session *session, unsigned long pages)
{
	u64 limit = mace_mib_pages(READ_ONCE(mace_max_total_mib));
	struct mace_held held;

	mace_hold(&held, session->own_serial);
	return held.pages + pages <= limit &&
	       (session->all ||
		(mace_fits(held.others_pages + pages, limit,
			   mace_mib_pages(READ_ONCE(mace_host_mib))) &&
		 held.netns_pages + pages <= mace_mib_pages(READ_ONCE(mace_max_netns_mib))));
}

/*
 * Four sessions with rings of 8 MiB, as the collector's are by default, for as many CPUs as there
 * can be; a namespace may have one of them, and one is the host's.
 */
static void __init mace_default_limits(void)
{
	if (!mace_max_total_mib)
		mace_max_total_mib = max(1024U, 4 * 8 * num_possible_cpus());
	if (!mace_max_netns_mib)
		mace_max_netns_mib = mace_max_total_mib / 4;
	if (!mace_host_mib)
		mace_host_mib = mace_max_total_mib / 4;
}

/* --- rings ------------------------------------------------------------------------ */

static int mace_session_add_ring(struct mace_session *session, unsigned int cpu)
{
	struct mem_cgroup *memcg;
	struct mace_ring *ring;

	lockdep_assert_held(&mace_open_lock);
	if (!mace_may_have(session, session->ring_pages))
		return -ENOMEM;
	memcg = mace_charge_to(session->memcg);
	ring = mace_ring_make(cpu, session->subbuf_bytes, session->subbufs);
	mace_charge_to(memcg);
	if (IS_ERR(ring))
		return PTR_ERR(ring);
	session->pages += session->ring_pages;
	/* Pairs with mace_session_ring(). */
	smp_store_release(&session->rings[cpu], ring);
	return 0;
}

/*
 * A CPU is about to come online: every session with rings gets one for it, if there is memory.
 * Without memory to read packets in, the CPU stays offline.
 */
static int mace_cpu_prepare(unsigned int cpu)
{
	struct mace_session *each;
	int error = 0;

	mutex_lock(&mace_open_lock);
	list_for_each_entry(each, &mace_open, link) {
		if (!each->ring_pages)
			continue;
		error = mace_packet_prepare(cpu);
		if (error)
			break;
		if (!each->rings[cpu])
			mace_session_add_ring(each, cpu);
	}
	mutex_unlock(&mace_open_lock);
	return error;
}

static void mace_session_unmake_rings(struct mace_session *session)
{
	unsigned int cpu;

	mutex_lock(&mace_open_lock);
	session->ring_pages = 0;
	session->pages = 0;
	mutex_unlock(&mace_open_lock);
	for (cpu = 0; cpu < nr_cpu_ids; cpu++) {
		if (session->rings[cpu])
			mace_ring_free(session->rings[cpu]);
		session->rings[cpu] = NULL;
	}
}

/**
 * mace_session_ring() - the ring of a CPU
 * @session: any
 * @cpu: any number, also one of user space's
 *
 * Return: it, or NULL if there is none.
 */
struct mace_ring *mace_session_ring(const struct mace_session *session, u32 cpu)
{
	if (cpu >= nr_cpu_ids)
		return NULL;
	/* Pairs with mace_session_add_ring(). */
	return smp_load_acquire(&session->rings[array_index_nospec(cpu, nr_cpu_ids)]);
}

/* --- the module comes and goes ---------------------------------------------------- */

int __init mace_sessions_init(void)
{
	int error;

	mace_default_limits();
	error = register_pernet_subsys(&mace_netns_operations);
	if (error)
		return error;
	mace_cpu_state = cpuhp_setup_state_nocalls(CPUHP_BP_PREPARE_DYN, "mace:prepare",
						   mace_cpu_prepare, NULL);
	if (mace_cpu_state < 0) {
		unregister_pernet_subsys(&mace_netns_operations);
		return mace_cpu_state;
	}
	return 0;
}

void mace_sessions_exit(void)
{
	cpuhp_remove_state_nocalls(mace_cpu_state);
	unregister_pernet_subsys(&mace_netns_operations);
}

/* --- open and close --------------------------------------------------------------- */

static void mace_session_wake(struct irq_work *work)
{
	struct mace_session *session = container_of(work, struct mace_session, wake);

	wake_up_interruptible(&session->wait);
}

static void mace_session_flush(struct work_struct *work)
{
	struct mace_session *session =
		container_of(to_delayed_work(work), struct mace_session, flush);
	struct mace_ring *ring;
	unsigned int cpu;

	for (cpu = 0; cpu < nr_cpu_ids; cpu++) {
		ring = mace_session_ring(session, cpu);
		if (ring && mace_ring_has_records(ring)) {
			WRITE_ONCE(session->flush_due, true);
			wake_up_interruptible(&session->wait);
			break;
		}
	}
	schedule_delayed_work(&session->flush, msecs_to_jiffies(session->flush_ms));
}

/**
 * mace_session_open() - a session for the calling task
 *
 * Context: may sleep. Return: it, or an error pointer: -EPERM, -EBUSY (too many), -ENOMEM.
 */
struct mace_session *mace_session_open(void)
{
	struct net *net = current->nsproxy->net_ns;
	struct mace_session *session;
	bool all = net_eq(net, &init_net) && capable(CAP_SYS_ADMIN);

	if (!all && !ns_capable(net->user_ns, CAP_NET_RAW))
		return ERR_PTR(-EPERM);
	session = kzalloc(sizeof(*session), GFP_KERNEL_ACCOUNT);
	if (!session)
		return ERR_PTR(-ENOMEM);
	session->rings = kcalloc(nr_cpu_ids, sizeof(*session->rings), GFP_KERNEL_ACCOUNT);
	if (!session->rings) {
		kfree(session);
		return ERR_PTR(-ENOMEM);
	}
	mutex_init(&session->lock);
	init_waitqueue_head(&session->wait);
	init_irq_work(&session->wake, mace_session_wake);
	INIT_DELAYED_WORK(&session->flush, mace_session_flush);
	session->all = all;
	session->own_serial = mace_netns_serial(net);
	session->own_inode = net->ns.inum;

	mutex_lock(&mace_open_lock);
	if (!mace_may_open(session)) {
		mutex_unlock(&mace_open_lock);
		kfree(session->rings);
		kfree(session);
		return ERR_PTR(-EBUSY);
	}
	session->memcg = get_mem_cgroup_from_mm(current->mm);
	list_add(&session->link, &mace_open);
	mutex_unlock(&mace_open_lock);
	return session;
}

/**
 * mace_session_close() - stop it and free all of it
 * @session: nobody else has it any more
 *
 * Context: may sleep.
 */
void mace_session_close(struct mace_session *session)
{
	mutex_lock(&session->lock);
	mace_session_stop(session);
	mutex_unlock(&session->lock);

	mutex_lock(&mace_open_lock);
	list_del(&session->link);
	mutex_unlock(&mace_open_lock);

	mace_session_unmake_rings(session);
	mem_cgroup_put(session->memcg);
	kfree(rcu_dereference_protected(session->listed, true));
	kfree(session->rings);
	mutex_destroy(&session->lock);
	kfree(session);
}

/* --- setup ------------------------------------------------------------------------ */

/* The serial of the namespace behind a file descriptor, or why this session may not see it. */
static s64 mace_session_netns(const struct mace_session *session, int fd)
{
	struct net *net;
	u32 serial;

	if (fd == -1)
		return session->own_serial;
	net = get_net_ns_by_fd(fd);
	if (IS_ERR(net))
		return PTR_ERR(net);
	serial = mace_netns_serial(net);
	put_net(net);
	if (!session->all && serial != session->own_serial)
		return -EPERM;
	return serial;
}

static int mace_session_filter(struct mace_session *session, const struct mace_filter *filter)
{
	u32 available = mace_probes_available();
	s64 serial;
	u32 i;

	if (filter->netns_count > MACE_MAX_NETNS || filter->device_count > MACE_MAX_DEVICES ||
	    filter->sample_shift > MACE_MAX_SAMPLE_SHIFT)
		return -EINVAL;
	if (filter->hooks & ~available)
		return -EOPNOTSUPP;
	session->hooks = filter->hooks ?: available;
	session->watched = mace_probes_watched(session->hooks);
	session->sample_mask = (1ULL << filter->sample_shift) - 1;
	memcpy(session->l4_protos, filter->l4_protos, sizeof(session->l4_protos));
	session->l4_filtered = memchr_inv(filter->l4_protos, 0, sizeof(filter->l4_protos));
	for (i = 0; i < filter->netns_count; i++) {
		serial = mace_session_netns(session, filter->netns_fd[i]);
		if (serial < 0)
			return serial;
		session->serials[i] = serial;
	}
	session->serial_count = filter->netns_count;
	if (!session->all && !session->serial_count) {
		session->serials[0] = session->own_serial;
		session->serial_count = 1;
	}
	for (i = 0; i < filter->device_count; i++) {
		serial = mace_session_netns(session, filter->device[i].netns_fd);
		if (serial < 0)
			return serial;
		if (!filter->device[i].ifindex)
			return -EINVAL;
		session->places[i].serial = serial;
		session->places[i].ifindex = filter->device[i].ifindex;
	}
	session->place_count = filter->device_count;
	session->filters = (session->serial_count || session->place_count ? MACE_FILTER_PLACE : 0) |
			   (session->l4_filtered || session->sample_mask ? MACE_FILTER_CONTENT : 0);
	session->unfiltered = session->filters ? 0 : session->hooks;
	return 0;
}

static int mace_session_rings(struct mace_session *session, struct mace_setup *setup)
{
	unsigned int cpu;
	int error = 0;

	session->subbuf_bytes = setup->subbuf_bytes;
	session->subbufs = setup->subbufs;
	setup->cpu_count = 0;
	/* From here on mace_cpu_prepare() sees to CPUs that come. */
	cpus_read_lock();
	for_each_online_cpu(cpu) {
		mutex_lock(&mace_open_lock);
		session->ring_pages = setup->ring_bytes >> PAGE_SHIFT;
		error = mace_packet_prepare(cpu);
		if (!error)
			error = mace_session_add_ring(session, cpu);
		mutex_unlock(&mace_open_lock);
		if (error)
			break;
		setup->cpu_count++;
	}
	cpus_read_unlock();
	return error;
}

/**
 * mace_session_setup() - filter and rings, up to mace_session_commit()
 * @session: @session->lock is held
 * @setup: what the caller asked for; its results are set
 *
 * Context: may sleep. Return: 0, or -EPROTO (another ABI), -EBUSY (done before), -EINVAL, -EPERM
 * (a namespace that the session may not see), -EOPNOTSUPP (a hook or cookies, that this kernel has
 * not), -EBADF, -ENOMEM. After an error it may be tried again.
 */
int mace_session_setup(struct mace_session *session, struct mace_setup *setup)
{
	u64 ring_bytes = (u64)setup->subbuf_bytes * setup->subbufs;
	int error;

	if (setup->abi_major != MACE_ABI_MAJOR)
		return -EPROTO;
	if (session->ready)
		return -EBUSY;
	if (setup->flags & ~MACE_SETUP_COOKIES || setup->pad2 || setup->pad3 || setup->ring_bytes ||
	    setup->cpu_count)
		return -EINVAL;
	if (!is_power_of_2(setup->subbuf_bytes) || setup->subbuf_bytes < PAGE_SIZE ||
	    setup->subbuf_bytes > MACE_SUBBUF_BYTES_MAX || setup->subbufs < 2 ||
	    ring_bytes > (u64)READ_ONCE(mace_max_ring_mib) << 20)
		return -EINVAL;
	if (!setup->watermark || setup->watermark > setup->subbufs)
		return -EINVAL;
	if (!setup->flush_ms || setup->flush_ms > MACE_FLUSH_MS_MAX)
		return -EINVAL;
	if (setup->flags & MACE_SETUP_COOKIES && !MACE_COOKIES)
		return -EOPNOTSUPP;
	error = mace_session_filter(session, &setup->filter);
	if (error)
		return error;
	setup->ring_bytes = ring_bytes;
	session->name_shift = setup->flags & MACE_SETUP_COOKIES ? 32 : 0;
	session->watermark = setup->watermark;
	session->flush_ms = setup->flush_ms;
	error = mace_session_rings(session, setup);
	if (error)
		mace_session_unmake_rings(session);
	return error;
}

/**
 * mace_session_commit() - end a mace_session_setup() that succeeded
 * @session: @session->lock is held
 * @told: whether the caller has its results; if not, all is as before
 *
 * Context: may sleep.
 */
void mace_session_commit(struct mace_session *session, bool told)
{
	if (!told) {
		mace_session_unmake_rings(session);
		return;
	}
	/* Pairs with mace_session_ready(). */
	smp_store_release(&session->ready, true);
}

/**
 * mace_session_list() - record at these places only, from now on
 * @session: @session->lock is held
 * @places: the caller's
 *
 * A session that may see its own namespace only still does: its filter of SETUP holds too.
 *
 * Context: may sleep. Return: 0, -EINVAL (before SETUP, or no places), -ENOMEM.
 */
int mace_session_list(struct mace_session *session, const struct mace_places *places)
{
	struct mace_listed *listed, *before;
	u32 i;

	if (!session->ready || places->netns_count > MACE_MAX_NETNS ||
	    places->device_count > MACE_MAX_DEVICES)
		return -EINVAL;
	for (i = 0; i < places->netns_count; i++)
		if (!places->netns[i])
			return -EINVAL;
	for (i = 0; i < places->device_count; i++)
		if (!places->device[i].netns || !places->device[i].ifindex)
			return -EINVAL;
	listed = kzalloc(sizeof(*listed), GFP_KERNEL_ACCOUNT);
	if (!listed)
		return -ENOMEM;
	listed->places = *places;
	before = rcu_dereference_protected(session->listed, lockdep_is_held(&session->lock));
	rcu_assign_pointer(session->listed, listed);
	WRITE_ONCE(session->filters, session->filters | MACE_FILTER_PLACE);
	WRITE_ONCE(session->unfiltered, 0);
	if (before)
		kfree_rcu(before, rcu);
	return 0;
}

/* --- running ---------------------------------------------------------------------- */

/**
 * mace_session_start() - record from now on
 * @session: @session->lock is held
 *
 * Context: may sleep. Return: 0, -EINVAL before SETUP, -EBUSY if it runs, or what registering a
 * probe returned.
 */
int mace_session_start(struct mace_session *session)
{
	int error;

	if (!session->ready)
		return -EINVAL;
	if (session->running)
		return -EBUSY;
	mutex_lock(&mace_running_lock);
	error = mace_probes_get(session->watched);
	if (!error) {
		hlist_add_head_rcu(&session->node, &mace_running);
		session->running = true;
	}
	mutex_unlock(&mace_running_lock);
	if (!error)
		schedule_delayed_work(&session->flush, msecs_to_jiffies(session->flush_ms));
	return error;
}

/**
 * mace_session_stop() - record no more; nothing is written after it returns
 * @session: @session->lock is held
 *
 * Context: may sleep.
 */
void mace_session_stop(struct mace_session *session)
{
	if (!session->running)
		return;
	mutex_lock(&mace_running_lock);
	hlist_del_rcu(&session->node);
	session->running = false;
	mace_probes_put(session->watched);
	mutex_unlock(&mace_running_lock);
	synchronize_rcu();
	irq_work_sync(&session->wake);
	cancel_delayed_work_sync(&session->flush);
}

/**
 * mace_session_stats() - what was written and lost
 * @session: @session->lock is held
 * @stats: cpu says of which CPU; the counts are set
 *
 * Return: 0, -EINVAL before SETUP, -ENXIO for a CPU without a ring.
 */
int mace_session_stats(struct mace_session *session, struct mace_stats *stats)
{
	struct mace_ring *ring = mace_session_ring(session, stats->cpu);
	bool all = stats->cpu == MACE_ALL_CPUS;
	unsigned int cpu;
	int hook;

	if (!session->ready)
		return -EINVAL;
	if (!all && !ring)
		return -ENXIO;
	memset(stats->written, 0, sizeof(stats->written));
	memset(stats->lost, 0, sizeof(stats->lost));
	if (!all) {
		mace_ring_stats(ring, stats);
		return 0;
	}
	for (cpu = 0; cpu < nr_cpu_ids; cpu++) {
		ring = mace_session_ring(session, cpu);
		if (ring)
			mace_ring_stats(ring, stats);
	}
	for (hook = 0; hook < MACE_HOOK_SLOTS; hook++)
		stats->lost[hook] += atomic64_read(&session->lost[hook]);
	return 0;
}

/**
 * mace_session_ready() - whether it has rings
 * @session: any, also without its lock
 *
 * Return: whether SETUP was done; then the rings stay until the session is closed.
 */
bool mace_session_ready(const struct mace_session *session)
{
	/* Pairs with mace_session_setup(): the rings are there. */
	return smp_load_acquire(&session->ready);
}

/**
 * mace_session_readable() - whether it is worth a reader's while
 * @session: any
 *
 * Return: whether a ring has as many full sub-buffers as wished for, or records have waited long
 * enough.
 */
bool mace_session_readable(const struct mace_session *session)
{
	struct mace_ring *ring;
	unsigned int cpu;

	if (!mace_session_ready(session))
		return false;
	if (READ_ONCE(session->flush_due))
		return true;
	for (cpu = 0; cpu < nr_cpu_ids; cpu++) {
		ring = mace_session_ring(session, cpu);
		if (ring && mace_ring_full(ring) >= session->watermark)
			return true;
	}
	return false;
}
