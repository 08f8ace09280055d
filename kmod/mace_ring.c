// SPDX-License-Identifier: GPL-2.0-only
/*
 * The ring: whole sub-buffers from probes to a reader.
 *
 * A spinlock of the ring's own, and no lock-free scheme: only this CPU's probes and this session's
 * reader take it, the reader a few times a second and for a few instructions. A probe has
 * interrupts off, so that nothing on its CPU can come between (tracepoints of the network are not
 * reached in NMIs).
 *
 * Memory is single pages, charged to the memory cgroup of who opened the session, mapped into the
 * kernel, and read-only into the reader. Only a sub-buffer's header and records are ever written
 * there.
 */
#include <linux/cpu.h>
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
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
	raw_spin_lock_init(&ring->lock);
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
 * Context: may sleep. Pages that a reader has still mapped live until it unmaps them.
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

static void mace_ring_open_subbuf(struct mace_ring *ring)
{
	struct mace_subbuf *subbuf = mace_ring_subbuf(ring, ring->at);

	memset(subbuf, 0, sizeof(*subbuf));
	subbuf->sequence = ring->head;
	subbuf->cpu = ring->cpu;
	subbuf->lost = ring->lost_pending;
	subbuf->lost_from_ns = ring->lost_from_ns;
	ring->lost_pending = 0;
	ring->lost_from_ns = 0;
	ring->fill = 0;
	ring->next = (struct mace_record *)(subbuf + 1);
	WRITE_ONCE(ring->filling, true);
}

static void mace_ring_close_subbuf(struct mace_ring *ring)
{
	mace_ring_subbuf(ring, ring->at)->records = ring->fill;
	WRITE_ONCE(ring->filling, false);
	if (++ring->at == ring->subbufs)
		ring->at = 0;
	WRITE_ONCE(ring->head, ring->head + 1);
}

/**
 * mace_ring_write() - a record into the ring, or into the count of those lost
 * @ring: of this CPU
 * @record: with all but its time in order: a clock that went back a little is held
 *
 * Context: interrupts off. Return: full sub-buffers that wait, if this record made one full, else
 * 0.
 */
u32 mace_ring_write(struct mace_ring *ring, const struct mace_record *record)
{
	struct mace_record *slot;
	u32 full = 0;

	raw_spin_lock(&ring->lock);
	if (!ring->filling) {
		if (ring->head - ring->tail == ring->subbufs) {
			ring->lost[record->hook]++;
			if (!ring->lost_pending++)
				ring->lost_from_ns = record->ts_ns;
			goto out;
		}
		mace_ring_open_subbuf(ring);
	}
	slot = ring->next++;
	*slot = *record;
	/* The clock's fast accessor may step back a little when it is adjusted (timekeeping.c). */
	if (slot->ts_ns < ring->last_ns)
		slot->ts_ns = ring->last_ns;
	ring->last_ns = slot->ts_ns;
	ring->written[record->hook]++;
	ring->fill++;
	if (ring->fill == ring->capacity) {
		mace_ring_close_subbuf(ring);
		full = ring->head - ring->handed;
	}
out:
	raw_spin_unlock(&ring->lock);
	return full;
}

/**
 * mace_ring_take() - release sub-buffers, and hand over those that are full
 * @ring: any CPU's
 * @take: see there
 *
 * Context: any but NMI. Return: 0, or -EINVAL if more is released than was handed over.
 */
int mace_ring_take(struct mace_ring *ring, struct mace_take *take)
{
	unsigned long irq;
	int error = 0;
	u32 first;

	raw_spin_lock_irqsave(&ring->lock, irq);
	if (take->release > ring->handed - ring->tail) {
		error = -EINVAL;
		goto out;
	}
	ring->tail += take->release;
	if ((take->flags & MACE_TAKE_FLUSH) && ring->filling)
		mace_ring_close_subbuf(ring);
	take->now_ns = ktime_get_mono_fast_ns();
	WRITE_ONCE(ring->handed, ring->head);
	take->ready = ring->handed - ring->tail;
	/* ready <= subbufs; @at follows the last one that is ready. */
	first = ring->at + ring->subbufs - take->ready;
	take->first = first >= ring->subbufs ? first - ring->subbufs : first;
out:
	raw_spin_unlock_irqrestore(&ring->lock, irq);
	return error;
}

/**
 * mace_ring_stats() - add this ring's counts to @stats
 * @ring: any CPU's
 * @stats: counts are added
 *
 * Context: any but NMI.
 */
void mace_ring_stats(struct mace_ring *ring, struct mace_stats *stats)
{
	unsigned long irq;
	int hook;

	raw_spin_lock_irqsave(&ring->lock, irq);
	for (hook = 0; hook < MACE_HOOK_SLOTS; hook++) {
		stats->written[hook] += ring->written[hook];
		stats->lost[hook] += ring->lost[hook];
	}
	raw_spin_unlock_irqrestore(&ring->lock, irq);
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
