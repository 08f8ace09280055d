/* SPDX-License-Identifier: GPL-2.0-only */
/* One CPU's ring of one session. */
#ifndef _MACE_RING_H
#define _MACE_RING_H

#include <linux/mm_types.h>
#include <linux/spinlock.h>

#include "uapi/mace.h"

/**
 * struct mace_ring - sub-buffers, filled by the CPU's probes and handed over to the session's
 * reader
 *
 * Fillings are numbered from 0: filling n is in sub-buffer n modulo @subbufs. Of them, [@tail,
 * @handed) are with the reader, [@handed, @head) are full, and @head is being filled if @filling,
 * else it is next.
 *
 * @lock: all that changes. Taken by probes, which have interrupts off, and by readers, for a few
 *	instructions
 * @pages: the ring's memory, @page_count of them
 * @page_count: pages of the ring
 * @memory: the same, mapped into the kernel
 * @cpu: whose ring it is
 * @subbuf_bytes: size of a sub-buffer
 * @subbufs: how many there are
 * @capacity: records in a sub-buffer
 * @at: sub-buffer of @head
 * @fill: records in it, if @filling
 * @next: where the next one goes, if @filling
 * @filling: whether @head has been opened
 * @head: see above
 * @handed: see above
 * @tail: see above
 * @last_ns: time of the last record
 * @lost_pending: lost since the last record that was written
 * @lost_from_ns: time of the first of these
 * @written: records written, by hook
 * @lost: records lost, by hook
 */
struct mace_ring {
	raw_spinlock_t lock;
	struct page **pages;
	unsigned long page_count;
	void *memory;
	u32 cpu;
	u32 subbuf_bytes;
	u32 subbufs;
	u32 capacity;
	u32 at;
	u32 fill;
	bool filling;
	struct mace_record *next;
	u64 head;
	u64 handed;
	u64 tail;
	u64 last_ns;
	u64 lost_pending;
	u64 lost_from_ns;
	u64 written[MACE_HOOK_SLOTS];
	u64 lost[MACE_HOOK_SLOTS];
};

struct mace_ring *mace_ring_make(u32 cpu, u32 subbuf_bytes, u32 subbufs);
void mace_ring_free(struct mace_ring *ring);

u32 mace_ring_write(struct mace_ring *ring, const struct mace_record *record);
int mace_ring_take(struct mace_ring *ring, struct mace_take *take);
void mace_ring_stats(struct mace_ring *ring, struct mace_stats *stats);

/* Both without the lock: a hint to whoever waits. */
u32 mace_ring_full(const struct mace_ring *ring);
bool mace_ring_has_records(const struct mace_ring *ring);

#endif
