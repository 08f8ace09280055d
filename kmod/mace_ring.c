// SPDX-License-Identifier: GPL-2.0-only
/*
 * The ring: whole sub-buffers from probes to a reader.
 *
 * A ring is filled on its own CPU only, with interrupts off, so that nothing can come between:
 * by probes (tracepoints of the network are not reached in NMIs), and for a reader who flushes by
 * a function that the CPU is called to run, a few times a second and for a few instructions. A CPU
 * that is offline runs no probe, and is kept so meanwhile. A reader who does not flush calls
 * nobody: what is full is published by @head, what is free by @tail.
 *
 * Memory is single pages, charged to the memory cgroup of who opened the session, mapped into the
 * kernel, and read-only into the reader. Only a sub-buffer's header and records are ever written
 * there.
 */
#include <linux/cpu.h>
#include <linux/gfp.h>
#include <linux/irqflags.h>
#include <linux/jiffies.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/string.h>
#include <linux/timekeeping.h>
#include <linux/topology.h>
#include <linux/vmalloc.h>

#include "mace_ring.h"

/* Charged, and refused rather than taken from others by force. */
#define MACE_RING_GFP (GFP_KERNEL_ACCOUNT | __GFP_ZERO | __GFP_NORETRY | __GFP_NOWARN)

static struct mace_subbuf *mace_ring_subbuf(const struct mace_ring *ring, u32 at)
{
	return ring->memory + (size_t)at * ring->subbuf_bytes;
}

/**
 * mace_ring_make() - a ring of @subbufs times @subbuf_bytes, empty
 * @cpu: whose it will be; its memory is near
 * @subbuf_bytes: a multiple of the page size
 * @subbufs: at least 2
 *
 * Context: may sleep. Return: the ring, or an error pointer.
 */
struct mace_ring *mace_ring_make(u32 cpu, u32 subbuf_bytes, u32 subbufs)
{
	int node = cpu_to_node(cpu);
	struct mace_ring *ring;
	unsigned long i;
	int error = -ENOMEM;

	ring = kzalloc_node(sizeof(*ring), GFP_KERNEL_ACCOUNT, node);
	if (!ring)
		return ERR_PTR(-ENOMEM);
	ring->cpu = cpu;
	ring->subbuf_bytes = subbuf_bytes;
	ring->subbufs = subbufs;
	ring->capacity = (subbuf_bytes - sizeof(struct mace_subbuf)) / sizeof(struct mace_record);
	ring->page_count = ((size_t)subbuf_bytes * subbufs) >> PAGE_SHIFT;
	ring->pages = kvcalloc(ring->page_count, sizeof(*ring->pages), GFP_KERNEL_ACCOUNT);
	if (!ring->pages)
		goto fail;
	for (i = 0; i < ring->page_count; i++) {
		if (fatal_signal_pending(current)) {
			error = -EINTR;
			goto fail;
		}
		ring->pages[i] = alloc_pages_node(node, MACE_RING_GFP, 0);
		if (!ring->pages[i])
			goto fail;
		cond_resched();
	}
	ring->memory = vmap(ring->pages, ring->page_count, VM_MAP, PAGE_KERNEL);
	if (!ring->memory)
		goto fail;
	return ring;
fail:
	mace_ring_free(ring);
	return ERR_PTR(error);
}

/**
 * mace_ring_free() - undo mace_ring_make(), of a half-made ring too
 * @ring: no probe and no reader can reach it any more
 *
 * Context: may sleep. No reader has it mapped any more: a mapping keeps the session's file open.
 */
void mace_ring_free(struct mace_ring *ring)
{
	unsigned long i;

	if (ring->memory)
		vunmap(ring->memory);
	for (i = 0; ring->pages && i < ring->page_count && ring->pages[i]; i++)
		__free_page(ring->pages[i]);
	kvfree(ring->pages);
	kfree(ring);
}

/**
 * mace_ring_open_subbuf() - begin the next filling, or lose a record
 * @ring: of this CPU, not filling
 * @hook: of the record that is to be written
 * @ts_ns: its time
 *
 * Context: interrupts off. Return: whether there is room; if not, the record is counted as lost.
 */
bool mace_ring_open_subbuf(struct mace_ring *ring, enum mace_hook hook, u64 ts_ns)
{
	struct mace_subbuf *subbuf = mace_ring_subbuf(ring, ring->at);

	/* Pairs with mace_ring_commit(): the reader is done with what it has released. */
	if (ring->head - smp_load_acquire(&ring->tail) == ring->subbufs) {
		ring->lost[hook]++;
		if (!ring->lost_pending++)
			ring->lost_from_ns = ts_ns;
		return false;
	}
	memset(subbuf, 0, sizeof(*subbuf));
	subbuf->sequence = ring->head;
	subbuf->cpu = ring->cpu;
	subbuf->lost = ring->lost_pending;
	subbuf->lost_from_ns = ring->lost_from_ns;
	ring->lost_pending = 0;
	ring->lost_from_ns = 0;
	ring->next = (struct mace_record *)(subbuf + 1);
	ring->end = ring->next + ring->capacity;
	WRITE_ONCE(ring->filling, true);
	return true;
}

/**
 * mace_ring_close_subbuf() - end the filling, full or not
 * @ring: of this CPU, filling
 *
 * Context: interrupts off. Return: full sub-buffers that wait to be handed over.
 */
u32 mace_ring_close_subbuf(struct mace_ring *ring)
{
	struct mace_subbuf *subbuf = mace_ring_subbuf(ring, ring->at);

	subbuf->records = ring->next - (struct mace_record *)(subbuf + 1);
	ring->end = ring->next;
	WRITE_ONCE(ring->filling, false);
	if (++ring->at == ring->subbufs)
		ring->at = 0;
	/* Pairs with mace_ring_take(): the sub-buffer is complete. */
	smp_store_release(&ring->head, ring->head + 1);
	return ring->head - READ_ONCE(ring->handed);
}

/* Run @function on the ring's CPU with interrupts off. */
static void mace_ring_call(const struct mace_ring *ring, smp_call_func_t function, void *argument)
{
	unsigned long irq;

	cpus_read_lock();
	if (smp_call_function_single(ring->cpu, function, argument, 1)) {
		/* It is offline, so that nobody but us is at its ring. */
		local_irq_save(irq);
		function(argument);
		local_irq_restore(irq);
	}
	cpus_read_unlock();
}

struct mace_ring_flushing {
	struct mace_ring *ring;
	u64 now_ns;
	u64 head;
};

static void mace_ring_flush_here(void *argument)
{
	struct mace_ring_flushing *flushing = argument;
	struct mace_ring *ring = flushing->ring;

	if (ring->filling)
		mace_ring_close_subbuf(ring);
	/* The clock may have stepped back a little, and may again: no record is older than told. */
	ring->last_ns = max(ring->last_ns, ktime_get_mono_fast_ns());
	flushing->now_ns = ring->last_ns;
	flushing->head = ring->head;
}

/**
 * mace_ring_take() - what a reader would have if it released sub-buffers now
 * @ring: any CPU's
 * @take: see there; its results are set
 *
 * Nothing is released or handed over before mace_ring_commit().
 *
 * Context: may sleep; one caller at a time, up to mace_ring_commit(). Return: 0, or -EINVAL if more
 * is released than was handed over.
 */
int mace_ring_take(struct mace_ring *ring, struct mace_take *take)
{
	struct mace_ring_flushing flushing = { .ring = ring };
	u64 tail = ring->tail + take->release;

	if (take->release > ring->handed - ring->tail)
		return -EINVAL;
	if (take->flags & MACE_TAKE_FLUSH) {
		mace_ring_call(ring, mace_ring_flush_here, &flushing);
		ring->called = jiffies;
	} else {
		flushing.now_ns = ktime_get_mono_fast_ns();
		/* Pairs with mace_ring_close_subbuf(). */
		flushing.head = smp_load_acquire(&ring->head);
	}
	take->now_ns = flushing.now_ns;
	take->ready = flushing.head - tail;
	div_u64_rem(tail, ring->subbufs, &take->first);
	return 0;
}

/**
 * mace_ring_commit() - release and hand over what mace_ring_take() has told
 * @ring: the same
 * @take: the same
 */
void mace_ring_commit(struct mace_ring *ring, const struct mace_take *take)
{
	u64 tail = ring->tail + take->release;

	WRITE_ONCE(ring->handed, tail + take->ready);
	/* Pairs with mace_ring_open_subbuf(). */
	smp_store_release(&ring->tail, tail);
}

/**
 * mace_ring_stats() - add this ring's counts to @stats
 * @ring: any CPU's
 * @stats: counts are added; each is one of a moment ago
 */
void mace_ring_stats(const struct mace_ring *ring, struct mace_stats *stats)
{
	int hook;

	for (hook = 0; hook < MACE_HOOK_SLOTS; hook++) {
		stats->written[hook] += READ_ONCE(ring->written[hook]);
		stats->lost[hook] += READ_ONCE(ring->lost[hook]);
	}
}

/**
 * mace_ring_full() - sub-buffers that are full and not handed over
 * @ring: any CPU's
 *
 * Return: their number, a moment ago.
 */
u32 mace_ring_full(const struct mace_ring *ring)
{
	/* In this order: a hand-over between the two reads makes it too large, never negative. */
	u64 handed = READ_ONCE(ring->handed);

	return READ_ONCE(ring->head) - handed;
}

/**
 * mace_ring_has_records() - whether there is anything to hand over
 * @ring: any CPU's
 *
 * Return: whether there was, a moment ago.
 */
bool mace_ring_has_records(const struct mace_ring *ring)
{
	return mace_ring_full(ring) || READ_ONCE(ring->filling);
}
