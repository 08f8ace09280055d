/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Records to lives to delays, one record after the other. joiner.pyi says what Python passes and gets.
 *
 * Nothing here knows what a hook, a device or a packet is. Three learned tables hold what Python has answered: whether
 * one record can follow another (moves.c), which delays lie in a life of some shape (shapes.c), and whether a packet
 * passes from one device to another (moves.c). Each case is asked once. A function that fails returns -1 or NULL; the
 * exception is set, or else memory is exhausted. A joiner that has failed is of no further use but to be freed.
 */
#ifndef MACE_JOINER_H
#define MACE_JOINER_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GOLDEN 0x9e3779b97f4a7c15ull /* 2^64 / golden ratio (Knuth, TAOCP 3, 6.4) */
#define NONE UINT32_MAX

/* Bits of a move's verdict, as in correlator/identity.py. */
#define JOIN 1
#define CROSS 2
#define SAME_LENGTH 4
#define WHOLE_COPY 8

/* Bits of what is known of each hook number, as in correlator/answers.py. */
#define HOOK_DEVICE 1 /* a record names a device */
#define HOOK_RECEIVES 2 /* a life that starts there may start at one device only */
#define HOOK_ENDS 4 /* the buffer's end */
#define HOOK_REASON 8 /* `reason` takes the place of the length */
#define HOOK_MARKER 16 /* no record */

/* Bit of a record's trait, as in correlator/content.py: its key can join two buffers. */
#define TRAIT_JOINS 1

/* Device numbers, as in correlator/hops.py; records hold them plus 2. */
#define UNKNOWN (-1)
#define DISAGREE (-2)

#define PLACE_BITS 28 /* hook and sighting (identity.place) */
#define SIGHTING_BITS 20

/* contracts/schema.py: Grade */
#define GRADE_BUFFER 1
#define GRADE_CONTENT 2
#define GRADE_EXACT 3

#define OUTCOME_DROPPED 2 /* contracts/schema.py: Outcome */

/* contracts/histogram.py */
#define SUB_BITS 7
#define MAX_DELAY_NS (((int64_t)1 << 40) - 1)
#define BINS ((40 - SUB_BITS + 1) << SUB_BITS)
#define BIN_BITS 13

#define SECOND_NS 1000000000ll

/* Counts since the beginning, and what is held; the order is that of correlator/lives.py. */
enum {
	RECORDS,
	MATCHED,
	UNMATCHED,
	AMBIGUOUS,
	EXPIRED,
	DROPPED,
	LEFT,
	TOLD_APART,
	SEVERAL_DEVICES,
	GRADED_BUFFER,
	GRADED_CONTENT,
	GRADED_EXACT,
	WAITED,
	SEVERAL_PACKETS,
	COUNTS,
	OPEN_RECORDS = COUNTS,
	LOOSE_RECORDS,
	OLDEST_OPEN,
	OLDEST_LOOSE,
	CELLS,
	LEARNED,
	NUMBERS,
};

struct record {
	int64_t ts;
	uint32_t code; /* device number plus 2, hook, and whether it is the first on its device */
	uint32_t place;
	uint32_t length; /* or the reason of a drop */
	uint16_t cpu;
	uint8_t trait;
	uint8_t proto;
	uint64_t key;
	uint64_t flow;
};

/* Flags of a life. */
#define LIFE_UNSURE 1 /* the sighting of its last record can be several devices */
#define LIFE_START 2 /* so can that of its first, and a life starts at few of them */
#define LIFE_OTHER 4 /* its key has changed where it may */
#define LIFE_OF_CONTENT 8 /* the source uses the key as the buffer */
#define LIFE_LOOSE 16 /* it has ended, and may continue in another buffer */

/* What a record asks for is in one line of the cache. */
struct life {
	int64_t last_ts;
	int64_t first_ts;
	struct record *records;
	uint64_t key; /* the last known */
	uint64_t skb;
	uint32_t count; /* 0: not in use */
	uint32_t room;
	uint32_t last_place;
	uint32_t last_length;
	uint32_t keyed; /* records with a key */
	uint8_t trait; /* of the last record */
	uint8_t flags;
	uint8_t grade; /* of a loose end; 0 before */
};

#define ROOMS 32

struct slot {
	uint64_t skb;
	uint32_t life; /* 0: none */
};

struct move {
	uint64_t key; /* from a place to a place; UINT64_MAX: none */
	int32_t from; /* the device number that the move alone determines, or -1 */
	int32_t to;
	uint16_t changes; /* by two bits of either record's traits: whether the key may change */
	uint8_t verdict;
};

/* A delay of each life of a shape: between two of its records. */
struct shape_row {
	int64_t start; /* of the window that was counted in last, ns */
	uint32_t window; /* its index, or NONE */
	uint32_t begin;
	uint32_t end;
	uint32_t entry;
	uint8_t direction;
	uint8_t segment;
	uint8_t position;
};

#define SHAPE_DROPPED 1
#define SHAPE_UNCLEAR 2
#define SHAPE_TAIL 4
#define SHAPE_HEAD 8

struct shape {
	uint64_t hash;
	uint32_t count; /* records of a life */
	uint32_t codes; /* index of the first of them in `codes` */
	uint32_t number; /* Python's */
	uint32_t rows;
	uint32_t row_count;
	uint32_t
		waits; /* index in `waits` of records before which the packet may have waited for an address */
	uint32_t wait_count;
	uint32_t end; /* of a tail: its last record on a device; of a head: its first */
	uint8_t flags;
	uint8_t outcome;
};

/* A row of contracts.schema.Delays. */
struct row {
	int64_t utc;
	int64_t delay;
	uint64_t packet;
	uint32_t length;
	uint32_t entry;
	uint16_t reason;
	uint8_t direction;
	uint8_t segment;
	uint8_t position;
	uint8_t grade;
	uint8_t outcome;
	uint8_t waited;
};

struct window {
	int64_t start; /* ns of UTC */
	int64_t count;
	int64_t sum;
	int64_t low;
	int64_t high;
	uint32_t code; /* entry, direction and segment */
	uint32_t cells;
};

struct cell {
	uint64_t key; /* index of the window and bin, plus 1; 0: none */
	int64_t count;
};

/* A life that has ended and may continue in another buffer, or may be such a continuation (correlator/links.py). */
struct loose {
	uint64_t key;
	int64_t at;
	uint32_t life;
	uint32_t end;
	uint32_t shape; /* index of the life's shape in `shapes`, ... */
	uint32_t learned; /* ... as it was learned then; 0: not known */
	bool head;
};

/* A life whose records Python asks for. */
struct told {
	uint64_t packet;
	uint32_t shape;
	uint32_t count;
	uint32_t length;
	uint8_t grade;
	uint8_t waited;
};

struct joiner {
	PyObject ob_base;
	PyObject *judge, *start, *passes, *shape; /* asked of Python */
	PyThreadState *thread; /* ours while the GIL is released */
	bool busy, failed;
	bool want_rows, want_records;
	int64_t timeout, link, offset;
	uint64_t seed; /* of hashes: no stream can be made whose buffers collide */
	uint8_t hooks[256], traits[256], copied[256];

	/* moves.c */
	struct move *moves;
	uint32_t move_mask, move_count;
	int64_t *only; /* device number of each sighting, or -1 */
	int32_t *starts; /* the device at which a life starts, by sighting; UNASKED */
	uint32_t sightings;

	/* shapes.c */
	uint32_t *shape_slots, shape_mask;
	struct shape *shapes;
	uint32_t shape_count, shape_room;
	uint32_t learned; /* times that the shapes were forgotten */
	uint32_t *codes, code_count, code_room;
	struct shape_row *shape_rows;
	uint32_t shape_row_count, shape_row_room;
	uint32_t *waits, wait_count, wait_room;

	/* lives.c */
	struct slot *slots;
	uint32_t slot_mask, slot_count;
	struct life *lives; /* the first is not used */
	uint32_t life_count, life_room;
	uint32_t *free_lives, free_count;
	struct record *rooms[ROOMS]; /* of the first records of lives, in stretches that double */
	int64_t *gap_starts, *gap_ends; /* disjoint, in order */
	uint32_t gap_count, gap_at;
	int64_t gap_ts;
	int64_t *asked_devs, *asked_times; /* in order of device and time */
	uint32_t asked_count;

	/* windows.c */
	struct window *windows;
	uint32_t window_count, window_room;
	uint32_t *window_slots, window_mask;
	struct cell *cells;
	uint32_t cell_mask, cell_count;

	/* ends.c */
	struct row *rows;
	uint32_t row_count, row_room;
	uint32_t row_ended; /* rows before those of lives that had waited for another buffer's */
	struct loose *loose;
	uint32_t loose_count, loose_room;
	int64_t loose_records;
	struct told *told;
	uint32_t told_count, told_room;
	struct record *told_records;
	uint32_t told_record_count, told_record_room;

	int64_t counts[NUMBERS];
};

/* Columns of records; optional ones are NULL. */
struct columns {
	const int64_t *ts;
	const uint64_t *skb;
	const uint8_t *hook;
	const uint32_t *dev;
	const uint32_t *length;
	const uint16_t *reason;
	const uint64_t *key;
	const uint8_t *trait;
	const uint64_t *flow;
	const uint8_t *proto;
	const uint16_t *cpu;
	const int64_t *number; /* of records that are joined already */
	const uint8_t *cross;
	size_t count;
};

/* Times are subtracted and added as numpy does it: what a damaged stream makes overflow, wraps. */
static inline int64_t minus(int64_t a, int64_t b)
{
	return (int64_t)((uint64_t)a - (uint64_t)b);
}

static inline int64_t plus(int64_t a, int64_t b)
{
	return (int64_t)((uint64_t)a + (uint64_t)b);
}

static inline uint32_t hashed(const struct joiner *j, uint64_t key)
{
	return (uint32_t)((key ^ j->seed) * (j->seed | 1) * GOLDEN >> 32);
}

static inline uint32_t hook_of(const struct record *record)
{
	return record->code >> 1 & 0x7f;
}

static inline int64_t number_of(const struct record *record)
{
	return (int64_t)(record->code >> 8) - 2;
}

static inline void set_number(struct record *record, int64_t number)
{
	record->code = (record->code & 0xff) | (uint32_t)(number + 2) << 8;
}

/* Make room for `more` elements behind `count`; return 0 or -1. */
int grow(void **array, uint32_t *room, size_t size, uint64_t count, uint64_t more);
#define GROW(array, count, room, more)          \
	((uint64_t)(count) + (more) <= (room) ? \
		 0 :                            \
		 grow((void **)&(array), &(room), sizeof(*(array)), (count), (more)))

/* moves.c */
int moves_init(struct joiner *j);
void moves_forget(struct joiner *j);
const struct move *move_asked(struct joiner *j, uint64_t key);
int start_asked(struct joiner *j, uint32_t sighting, int64_t *number);
int passes_asked(struct joiner *j, int64_t from, int64_t to);

/* shapes.c */
int shapes_init(struct joiner *j);
void shapes_forget(struct joiner *j);
struct shape *shape_of(struct joiner *j, const struct life *life);

/* lives.c */
int lives_init(struct joiner *j);
void lives_free(struct joiner *j);
uint32_t life_new(struct joiner *j);
void life_free(struct joiner *j, uint32_t which);
int life_append(struct life *life, const struct record *record);
int lives_take(struct joiner *j, const struct columns *columns);
int lives_restore(struct joiner *j, const struct columns *columns);
int lives_loosen(struct joiner *j, uint64_t skb, const struct loose *as, uint8_t grade);
int lives_end(struct joiner *j, int64_t upto, bool last, int64_t most);
bool spans_gap(const struct joiner *j, int64_t after, int64_t before);

/* windows.c */
int windows_init(struct joiner *j);
int window_of(struct joiner *j, struct shape_row *row, int64_t utc);
int cell_add(struct joiner *j, uint32_t window, uint32_t bin, int64_t count);
PyObject *windows_take(struct joiner *j, int64_t before, bool all);

/* ends.c */
int life_ended(struct joiner *j, uint32_t which, bool freed, bool expired, bool left);
int tell_start(struct joiner *j, struct life *life);
int loose_add(struct joiner *j, uint32_t which, uint32_t end, bool head, const struct shape *shape);
int loose_release(struct joiner *j, bool last, int64_t settled, int64_t most);
int64_t loose_oldest(const struct joiner *j);

/* tables.c */
PyObject *rows_take(struct joiner *j, const int32_t *entries, size_t entry_count);
PyObject *told_take(struct joiner *j);
PyObject *open_columns(const struct joiner *j);
PyObject *loose_columns(const struct joiner *j);

#endif
