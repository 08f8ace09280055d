/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * One CPU's ring of one session.
 *
 * No lock: what fills a ring runs on its CPU with interrupts off. Probes do so by nature; a reader
 * has the CPU called to close the sub-buffer that is being filled. What a reader alone changes
 * (@handed, @tail) is its session's, under the session's lock.
 */
#ifndef _MACE_RING_H
#define _MACE_RING_H

#include <linux/compiler.h>
#include <linux/mm_types.h>

#include "uapi/mace.h"

/**
 * struct mace_ring - sub-buffers, filled by the CPU's probes and handed over to the session's
 * reader
 *
 * Fillings are numbered from 0: filling n is in sub-buffer n modulo @subbufs. Of them, [@tail,
 * @handed) are with the reader, [@handed, @head) are full, and @head is being filled if @filling,
 * else it is next.
 *
 * @pages: the ring's memory, @page_count of them
 * @page_count: pages of the ring
 * @memory: the same, mapped into the kernel
 * @cpu: whose ring it is
 * @subbuf_bytes: size of a sub-buffer
 * @subbufs: how many there are
 * @capacity: records in a sub-buffer
 * @at: sub-buffer of @head
 * @next: where the next record goes
 * @end: where that sub-buffer ends; equal to @next if not @filling
 * @filling: whether @head has been opened
 * @head: see above
 * @handed: see above
 * @tail: see above
 * @last_ns: the latest time that was told: of a record, or to a reader who flushed
 * @called: when a reader had the CPU called last, jiffies
 * @lost_pending: lost since the last record that was written
 * @lost_from_ns: time of the first of these
 * @written: records written, by hook
 * @lost: records lost, by hook
 */
struct mace_ring {
	struct page **pages;
	unsigned long page_count;
	void *memory;
	u32 cpu;
	u32 subbuf_bytes;
	u32 subbufs;
	u32 capacity;
	u32 at;
	bool filling;
	struct mace_record *next;
	struct mace_record *end;
	u64 head;
	u64 handed;
	u64 tail;
	u64 last_ns;
	unsigned long called;
	u64 lost_pending;
	u64 lost_from_ns;
	u64 written[MACE_HOOK_SLOTS];
	u64 lost[MACE_HOOK_SLOTS];
};

struct mace_ring *mace_ring_make(u32 cpu, u32 subbuf_bytes, u32 subbufs);
void mace_ring_free(struct mace_ring *ring);

int mace_ring_take(struct mace_ring *ring, struct mace_take *take);
void mace_ring_commit(struct mace_ring *ring, const struct mace_take *take);
void mace_ring_stats(const struct mace_ring *ring, struct mace_stats *stats);

/* Both from any CPU: a hint to whoever waits. */
u32 mace_ring_full(const struct mace_ring *ring);
bool mace_ring_has_records(const struct mace_ring *ring);

/* What writing does only now and then. */
bool mace_ring_open_subbuf(struct mace_ring *ring, enum mace_hook hook, u64 ts_ns);
u32 mace_ring_close_subbuf(struct mace_ring *ring);

/**
 * mace_ring_has_room() - whether there is room for a record; if not, it is counted as lost
 * @ring: of this CPU
 * @hook: the record's, where the compiler may know it
 * @ts_ns: its time
 *
 * Context: interrupts off. Return: whether the record is to be written to @ring->next, all but its
 * ts_ns; then mace_ring_written().
 */
static __always_inline bool mace_ring_has_room(struct mace_ring *ring, enum mace_hook hook,
					       u64 ts_ns)
{
	return likely(ring->next != ring->end) || mace_ring_open_subbuf(ring, hook, ts_ns);
}

/**
 * mace_ring_written() - a record is in its place
 * @ring: of this CPU
 * @hook: the record's
 * @slot: where it is
 * @ts_ns: its time: a clock that went back a little is held
 *
 * Context: interrupts off. Return: whether the sub-buffer is full now: mace_ring_close_subbuf().
 */
static __always_inline bool mace_ring_written(struct mace_ring *ring, enum mace_hook hook,
					      struct mace_record *slot, u64 ts_ns)
{
	/* The clock's fast accessor may step back a little when it is adjusted (timekeeping.c). */
	if (unlikely(ts_ns < ring->last_ns))
		ts_ns = ring->last_ns;
	slot->ts_ns = ts_ns;
	ring->last_ns = ts_ns;
	ring->written[hook]++;
	ring->next = slot + 1;
	return slot + 1 == ring->end;
}

#endif
