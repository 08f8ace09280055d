// SPDX-License-Identifier: Apache-2.0
/* The open lives of buffers: an open hash table by buffer, and one record after the other into it. */
#include <stdlib.h>
#include <string.h>

#include "joiner.h"

#define FIRST_SLOTS 128
#define FIRST_LIVES 64u
#define FIRST_ROOM 12 /* records; most packets have fewer */
#define MOST_ROOM (1u << 28)
#define LINE 64 /* bytes of a line of the cache */
#define AHEAD 8 /* records that the table is asked for ahead of time */

int grow(void **array, uint32_t *room, size_t size, uint64_t count, uint64_t more)
{
	uint64_t larger = *room ? *room : 64;
	void *grown;

	while (larger < count + more)
		larger *= 2;
	if (larger > UINT32_MAX / 2)
		return -1;
	grown = realloc(*array, (size_t)larger * size);
	if (!grown)
		return -1;
	*array = grown;
	*room = (uint32_t)larger;
	return 0;
}

int lives_init(struct joiner *j)
{
	j->slots = calloc(FIRST_SLOTS, sizeof(*j->slots));
	j->slot_mask = FIRST_SLOTS - 1;
	return j->slots ? 0 : -1;
}

/* --- the table ---------------------------------------------------------------------------------------------- */

static uint32_t find(const struct joiner *j, uint64_t skb)
{
	uint32_t at = hashed(j, skb) & j->slot_mask;

	while (j->slots[at].life && j->slots[at].skb != skb)
		at = (at + 1) & j->slot_mask;
	return at;
}

static int make_room(struct joiner *j)
{
	const size_t size = (size_t)j->slot_mask + 1;
	struct slot *old = j->slots;
	struct slot *slots;

	if (j->slot_count < size / 2)
		return 0;
	slots = calloc(2 * size, sizeof(*slots));
	if (!slots || size > UINT32_MAX / 4) {
		free(slots);
		return -1;
	}
	j->slots = slots;
	j->slot_mask = (uint32_t)(2 * size - 1);
	for (size_t i = 0; i < size; i++) {
		if (old[i].life)
			slots[find(j, old[i].skb)] = old[i];
	}
	free(old);
	return 0;
}

/* Linear probing without tombstones (Knuth, TAOCP 3, 6.4, algorithm R). */
static void remove_at(struct joiner *j, uint32_t at)
{
	uint32_t hole = at;

	j->slot_count--;
	for (;;) {
		uint32_t home;

		at = (at + 1) & j->slot_mask;
		if (!j->slots[at].life)
			break;
		home = hashed(j, j->slots[at].skb) & j->slot_mask;
		if (((at - home) & j->slot_mask) >= ((at - hole) & j->slot_mask)) {
			j->slots[hole] = j->slots[at];
			hole = at;
		}
	}
	j->slots[hole].life = 0;
}

/* --- lives and their records -------------------------------------------------------------------------------- */

/* The first records of a life have a place of their own, in stretches of 64, 64, 128, 256, ... lives. */
static uint32_t stretch_of(uint32_t which)
{
	return which < FIRST_LIVES ? 0 : 32 - (uint32_t)__builtin_clz(which / FIRST_LIVES);
}

static struct record *first_room(const struct joiner *j, uint32_t which)
{
	const uint32_t stretch = stretch_of(which);
	const uint32_t first = stretch ? FIRST_LIVES << (stretch - 1) : 0;

	return j->rooms[stretch] + (size_t)(which - first) * FIRST_ROOM;
}

static int more_lives(struct joiner *j)
{
	const uint32_t old = j->life_room;
	const uint32_t room = old ? 2 * old : FIRST_LIVES;
	struct record **stretch = &j->rooms[stretch_of(old)];
	struct life *lives;
	uint32_t *free_lives;

	if (room > UINT32_MAX / 4)
		return -1;
	free_lives = realloc(j->free_lives, room * sizeof(*free_lives));
	if (!free_lives)
		return -1;
	j->free_lives = free_lives;
	if (!*stretch)
		*stretch = malloc((size_t)(room - old) * FIRST_ROOM * sizeof(**stretch));
	if (!*stretch)
		return -1;
	lives = aligned_alloc(LINE, room * sizeof(*lives));
	if (!lives)
		return -1;
	memset(lives, 0, room * sizeof(*lives));
	if (j->lives)
		memcpy(lives, j->lives, old * sizeof(*lives));
	free(j->lives);
	j->lives = lives;
	j->life_room = room;
	return 0;
}

/* Return an index of `lives`, or 0 without memory. */
uint32_t life_new(struct joiner *j)
{
	uint32_t which;

	if (!j->free_count && j->life_count + 1 >= j->life_room && more_lives(j))
		return 0;
	if (j->free_count > AHEAD) {
		const uint32_t later = j->free_lives[j->free_count - AHEAD];

		__builtin_prefetch(&j->lives[later], 1);
		__builtin_prefetch(first_room(j, later), 1);
	}
	which = j->free_count ? j->free_lives[--j->free_count] : ++j->life_count;
	j->lives[which] = (struct life){ .records = first_room(j, which), .room = FIRST_ROOM };
	return which;
}

void life_free(struct joiner *j, uint32_t which)
{
	struct life *life = &j->lives[which];

	if (life->room > FIRST_ROOM)
		free(life->records);
	life->count = life->room = 0;
	j->free_lives[j->free_count++] = which;
}

void lives_free(struct joiner *j)
{
	for (uint32_t i = 1; i <= j->life_count; i++) {
		if (j->lives[i].room > FIRST_ROOM)
			free(j->lives[i].records);
	}
	free(j->lives);
	for (int i = 0; i < ROOMS; i++)
		free(j->rooms[i]);
}

static int longer(struct life *life)
{
	const size_t size = life->room * sizeof(*life->records);
	const bool is_first = life->room == FIRST_ROOM;
	struct record *records;

	if (life->room >= MOST_ROOM)
		return -1;
	records = realloc(is_first ? NULL : life->records, 2 * size);
	if (!records)
		return -1;
	if (is_first)
		memcpy(records, life->records, size);
	life->records = records;
	life->room *= 2;
	return 0;
}

int life_append(struct life *life, const struct record *record)
{
	if (life->count == life->room && longer(life))
		return -1;
	life->records[life->count++] = *record;
	return 0;
}

/* --- lost records ------------------------------------------------------------------------------------------- */

/* Return whether records were lost between two times. */
bool spans_gap(const struct joiner *j, int64_t after, int64_t before)
{
	uint32_t low = 0,
		 high = j->gap_count; /* of the gaps that end later than `after`, the first */

	while (low < high) {
		const uint32_t middle = (low + high) / 2;

		if (j->gap_ends[middle] > after)
			high = middle;
		else
			low = middle + 1;
	}
	return low < j->gap_count && j->gap_starts[low] < before;
}

/* The same where `now` does not descend: of the gaps that begin before, the last also ends last. */
static inline bool lost_since(struct joiner *j, int64_t after, int64_t now)
{
	if (now < j->gap_ts)
		j->gap_at = 0;
	j->gap_ts = now;
	while (j->gap_at < j->gap_count && j->gap_starts[j->gap_at] < now)
		j->gap_at++;
	return j->gap_at && j->gap_ends[j->gap_at - 1] > after;
}

/* --- one record --------------------------------------------------------------------------------------------- */

/* Whether the key may change in this move: asked of Python for all pairs of traits at once. */
static bool may_change(const struct joiner *j, const struct move *move, uint8_t then, uint8_t now)
{
	return move->changes >> (j->traits[then] << 2 | j->traits[now]) & 1;
}

/* Return whether the record belongs to the life, as far as moves and times show. */
static inline bool follows(struct joiner *j, const struct life *life, const struct move *move,
			   int64_t ts, uint32_t length)
{
	if (!(move->verdict & JOIN) || minus(ts, life->last_ts) > j->timeout)
		return false;
	if (move->verdict & (SAME_LENGTH | WHOLE_COPY)) {
		const int64_t less = (int64_t)life->last_length - length;

		if (move->verdict & SAME_LENGTH ? less != 0 :
						  less < 0 || less > 255 || !j->copied[less])
			return false;
	}
	return !lost_since(j, life->last_ts, ts);
}

/* A move may determine the device of the record before: enter it, or that two moves disagree. */
static inline void tell_last(struct life *life, int64_t number)
{
	struct record *last = &life->records[life->count - 1];
	const int64_t known = number_of(last);

	if (number >= 0)
		set_number(last, known == UNKNOWN || known == number ? number : DISAGREE);
}

static inline __attribute__((always_inline)) int take(struct joiner *j, const struct columns *c,
						      const bool keyed, const bool more)
{
	for (size_t i = 0; i < c->count; i++) {
		const uint64_t skb = c->skb[i];
		const uint8_t hook = c->hook[i], kind = j->hooks[hook];
		const uint32_t sighting = kind & HOOK_DEVICE ? c->dev[i] : 0;
		const uint32_t place = (uint32_t)hook << SIGHTING_BITS | sighting;
		const uint64_t key = keyed ? c->key[i] : 0;
		struct record record = {
			.ts = c->ts[i],
			.place = place,
			.length = kind & HOOK_REASON ? c->reason[i] : c->length[i],
			.trait = keyed ? c->trait[i] : 0,
			.key = key,
		};
		int64_t number = j->only[sighting];
		bool joined = false, other = false, crosses = true;
		const bool unsure = number == UNKNOWN;
		struct life *life = NULL;
		uint32_t at, which;

		if (kind & HOOK_MARKER)
			continue;
		j->counts[RECORDS]++;
		if (i + AHEAD < c->count)
			__builtin_prefetch(&j->slots[hashed(j, c->skb[i + AHEAD]) & j->slot_mask]);
		at = find(j, skb);
		which = j->slots[at].life;
		if (which) {
			const uint64_t move_key =
				(uint64_t)j->lives[which].last_place << PLACE_BITS | place;
			uint32_t slot = hashed(j, move_key) & j->move_mask;
			const struct move *move;

			life = &j->lives[which];
			while (j->moves[slot].key != move_key && j->moves[slot].key != UINT64_MAX)
				slot = (slot + 1) & j->move_mask;
			move = &j->moves[slot];
			if (move->key != move_key)
				move = move_asked(j, move_key);
			if (!move)
				return -1;
			joined = follows(j, life, move, record.ts, c->length[i]);
			if (keyed && joined && key && life->key && key != life->key) {
				joined = other = may_change(j, move, life->trait, record.trait);
				j->counts[TOLD_APART] += !other;
			}
			if (joined) {
				if (life->flags & LIFE_UNSURE)
					tell_last(life, move->from);
				if (number == UNKNOWN)
					number = move->to;
				crosses = move->verdict & CROSS;
			}
		}
		if (!joined) {
			if (which) {
				const bool late = minus(record.ts, life->last_ts) > j->timeout;

				if (life_ended(j, which, false, late, false))
					return -1;
			} else {
				if (make_room(j))
					return -1;
				at = find(j, skb);
				j->slot_count++;
			}
			j->slots[at] = (struct slot){ .skb = skb };
			which = life_new(j);
			if (!which)
				return -1;
			j->slots[at].life = which;
			life = &j->lives[which];
			life->skb = skb;
			life->first_ts = record.ts;
			if (key && key == skb)
				life->flags |= LIFE_OF_CONTENT;
			if (number == UNKNOWN && kind & HOOK_RECEIVES)
				life->flags |= LIFE_START;
		}
		if (more) {
			record.flow = c->flow ? c->flow[i] : 0;
			record.proto = c->proto ? c->proto[i] : 0;
			record.cpu = c->cpu ? c->cpu[i] : 0;
		}
		record.code = (uint32_t)(number + 2) << 8 | (hook & 0x7fu) << 1 | crosses;
		if (life_append(life, &record))
			return -1;
		life->last_ts = record.ts;
		life->last_place = place;
		life->last_length = c->length[i];
		life->flags = (uint8_t)((life->flags & ~LIFE_UNSURE) | (unsure ? LIFE_UNSURE : 0));
		if (keyed) {
			life->trait = record.trait;
			if (key) {
				life->key = key;
				life->keyed++;
			}
			if (other)
				life->flags |= LIFE_OTHER;
		}
		if (kind & HOOK_ENDS) {
			remove_at(j, at);
			if (life_ended(j, which, true, false, false))
				return -1;
		}
	}
	return 0;
}

/* Return the largest sighting of a record that names a device. */
static uint32_t largest_sighting(const struct joiner *j, const struct columns *c)
{
	uint32_t largest = 0;

	for (size_t i = 0; i < c->count; i++)
		largest = c->dev[i] > largest ? c->dev[i] : largest;
	if (largest < j->sightings)
		return largest;
	/* Rare: at a hook without a device the number may be anything. */
	largest = 0;
	for (size_t i = 0; i < c->count; i++) {
		if (j->hooks[c->hook[i]] & HOOK_DEVICE && c->dev[i] > largest)
			largest = c->dev[i];
	}
	return largest;
}

int lives_take(struct joiner *j, const struct columns *columns)
{
	const bool more = columns->flow || columns->proto || columns->cpu;

	if (largest_sighting(j, columns) >= j->sightings) {
		PyEval_RestoreThread(j->thread);
		PyErr_SetString(PyExc_IndexError,
				"a record names a sighting that the topology does not list");
		j->thread = PyEval_SaveThread();
		return -1;
	}
	/* The loop is made four times, each with what it needs. */
	if (columns->key && columns->trait)
		return more ? take(j, columns, true, true) : take(j, columns, true, false);
	return more ? take(j, columns, false, true) : take(j, columns, false, false);
}

/* Take records of open lives from a state: all records of a buffer are of one life. */
int lives_restore(struct joiner *j, const struct columns *c)
{
	for (size_t i = 0; i < c->count; i++) {
		const uint32_t place = (uint32_t)c->hook[i] << SIGHTING_BITS |
				       (c->dev[i] & ((1u << SIGHTING_BITS) - 1));
		const uint64_t key = c->key ? c->key[i] : 0;
		const struct record record = {
			.ts = c->ts[i],
			.code = (uint32_t)(c->number[i] + 2) << 8 | (c->hook[i] & 0x7fu) << 1 |
				(c->cross[i] != 0),
			.place = place,
			.length = c->length[i],
			.cpu = c->cpu ? c->cpu[i] : 0,
			.trait = c->trait ? c->trait[i] : 0,
			.proto = c->proto ? c->proto[i] : 0,
			.key = key,
			.flow = c->flow ? c->flow[i] : 0,
		};
		uint32_t at;
		struct life *life;

		if (make_room(j))
			return -1;
		at = find(j, c->skb[i]);
		if (!j->slots[at].life) {
			const uint32_t which = life_new(j);

			if (!which)
				return -1;
			j->slot_count++;
			j->slots[at] = (struct slot){ .skb = c->skb[i], .life = which };
			life = &j->lives[which];
			life->skb = c->skb[i];
			life->first_ts = record.ts;
			life->flags = key && key == life->skb ? LIFE_OF_CONTENT : 0;
		}
		life = &j->lives[j->slots[at].life];
		if (life_append(life, &record))
			return -1;
		if (key && life->key && key != life->key)
			life->flags |= LIFE_OTHER;
		if (key) {
			life->key = key;
			life->keyed++;
		}
		life->last_ts = record.ts;
		life->last_place = place;
		life->last_length = record.length;
		life->trait = record.trait;
		life->flags = (uint8_t)((life->flags & ~LIFE_UNSURE) |
					(c->number[i] == UNKNOWN ? LIFE_UNSURE : 0));
	}
	return 0;
}

/* Take the open life of a buffer out of the table, as a loose end; return 1 if there is no such life, or -1. */
int lives_loosen(struct joiner *j, uint64_t skb, const struct loose *as, uint8_t grade)
{
	const uint32_t at = find(j, skb), which = j->slots[at].life;

	if (!which || as->end >= j->lives[which].count || grade < GRADE_BUFFER ||
	    grade > GRADE_EXACT)
		return 1;
	remove_at(j, at);
	j->lives[which].grade = grade;
	return loose_add(j, which, as->end, as->head, NULL);
}

/* --- the end of a slice ------------------------------------------------------------------------------------- */

struct idle {
	int64_t last_ts;
	uint32_t life;
};

static int by_last(const void *a, const void *b)
{
	const struct idle *one = a, *other = b;

	if (one->last_ts != other->last_ts)
		return one->last_ts < other->last_ts ? -1 : 1;
	return one->life < other->life ? -1 : 1;
}

static int end_open(struct joiner *j, uint32_t which, bool expired, bool left)
{
	remove_at(j, find(j, j->lives[which].skb));
	return life_ended(j, which, false, expired, left);
}

/* End those lives that were idle longest, so that at most so many records stay open. */
static int evict(struct joiner *j, int64_t excess)
{
	struct idle *idle = malloc((j->life_count + 1) * sizeof(*idle));
	size_t count = 0;
	int status = 0;

	if (!idle)
		return -1;
	for (uint32_t i = 1; i <= j->life_count; i++) {
		if (j->lives[i].count && !(j->lives[i].flags & LIFE_LOOSE))
			idle[count++] = (struct idle){ j->lives[i].last_ts, i };
	}
	qsort(idle, count, sizeof(*idle), by_last);
	for (size_t i = 0; i < count && excess > 0 && !status; i++) {
		excess -= j->lives[idle[i].life].count;
		j->counts[OPEN_RECORDS] -= j->lives[idle[i].life].count;
		status = end_open(j, idle[i].life, true, false);
	}
	free(idle);
	return status;
}

/* End lives that are idle, or all; at most `most` records stay open. */
int lives_end(struct joiner *j, int64_t upto, bool last, int64_t most)
{
	const int64_t idle_before = minus(upto, j->timeout);
	int64_t oldest = INT64_MAX;

	j->counts[OPEN_RECORDS] = 0;
	for (uint32_t i = 1; i <= j->life_count; i++) {
		struct life *life = &j->lives[i];
		bool idle;

		if (i + AHEAD <= j->life_count && life[AHEAD].last_ts < idle_before) {
			__builtin_prefetch(life[AHEAD].records);
			__builtin_prefetch(&j->slots[hashed(j, life[AHEAD].skb) & j->slot_mask]);
		}
		if (!life->count || life->flags & LIFE_LOOSE)
			continue;
		if (life->flags & LIFE_START && tell_start(j, life))
			return -1;
		idle = life->last_ts < idle_before;
		if (idle || last) {
			if (end_open(j, i, idle, last))
				return -1;
			continue;
		}
		/* What this slice has told is no longer in question, as for a life that a checkpoint restores. */
		if (life->flags & LIFE_UNSURE &&
		    number_of(&life->records[life->count - 1]) != UNKNOWN)
			life->flags &= (uint8_t)~LIFE_UNSURE;
		j->counts[OPEN_RECORDS] += life->count;
		oldest = life->first_ts < oldest ? life->first_ts : oldest;
	}
	if (j->counts[OPEN_RECORDS] > most) {
		if (evict(j, j->counts[OPEN_RECORDS] - most))
			return -1;
		oldest = INT64_MAX;
		for (uint32_t i = 1; i <= j->life_count; i++) {
			const struct life *life = &j->lives[i];

			if (life->count && !(life->flags & LIFE_LOOSE) && life->first_ts < oldest)
				oldest = life->first_ts;
		}
	}
	j->counts[OLDEST_OPEN] = oldest;
	return 0;
}
