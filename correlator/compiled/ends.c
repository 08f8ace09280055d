// SPDX-License-Identifier: Apache-2.0
/* The ends of lives: counts, windows and rows by their shape, and lives that wait for another buffer's. */
#include <stdlib.h>
#include <string.h>

#include "joiner.h"

/* Resolve the device at which a life starts, unless its beginning may have been lost; return 0 or -1. */
int tell_start(struct joiner *j, struct life *life)
{
	struct record *first = life->records;
	int64_t number;

	life->flags &= (uint8_t)~LIFE_START;
	if (number_of(first) != UNKNOWN || spans_gap(j, minus(first->ts, j->timeout), first->ts))
		return 0;
	if (start_asked(j, first->place & ((1u << SIGHTING_BITS) - 1), &number))
		return -1;
	set_number(first, number);
	return 0;
}

static uint8_t grade_of(const struct life *life)
{
	if (life->grade)
		return life->grade;
	if (life->keyed < 2 || life->flags & LIFE_OTHER)
		return GRADE_BUFFER;
	return life->flags & LIFE_OF_CONTENT ? GRADE_CONTENT : GRADE_EXACT;
}

/* An identifier of the life that depends on its first record only (correlator.records.named). */
static uint64_t packet_of(const struct life *life)
{
	uint64_t packet = life->skb ^ (uint64_t)life->first_ts * GOLDEN;

	packet ^= packet >> 32;
	return packet * 0xd6e8feb86659fd93ull;
}

/* --- waiting for a neighbour's address (correlator/neighbours.py) --------------------------------------------- */

/* Return the index of the first time of a device that is greater than `after`. */
static uint32_t first_after(const struct joiner *j, int64_t dev, int64_t after)
{
	uint32_t low = 0, high = j->asked_count;

	while (low < high) {
		const uint32_t middle = (low + high) / 2;
		const int64_t other = j->asked_devs[middle];

		if (other > dev || (other == dev && j->asked_times[middle] > after))
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

/* Return whether a request left by the device and an answer arrived there later, both between two times. */
static bool asked_between(const struct joiner *j, int64_t dev, int64_t after, int64_t before)
{
	const uint32_t request = first_after(j, dev, after);
	uint32_t answer;

	if (request == j->asked_count || j->asked_devs[request] != dev)
		return false;
	answer = first_after(j, ~dev, j->asked_times[request]);
	return answer < j->asked_count && j->asked_devs[answer] == ~dev &&
	       j->asked_times[answer] < before;
}

static bool has_waited(const struct joiner *j, const struct life *life, const struct shape *shape)
{
	if (!j->asked_count)
		return false;
	for (uint32_t i = 0; i < shape->wait_count; i++) {
		const struct record *queued = &life->records[j->waits[shape->waits + i]];
		const int64_t dev = queued->place & ((1u << SIGHTING_BITS) - 1);

		if (asked_between(j, dev, queued[-1].ts, queued->ts))
			return true;
	}
	return false;
}

/* --- one life ------------------------------------------------------------------------------------------------- */

/* Count a delay in its window; return 0 or -1. */
static inline int count_delay(struct joiner *j, struct shape_row *row, int64_t utc, int64_t delay)
{
	const int64_t value = delay < 0 ? 0 : delay > MAX_DELAY_NS ? MAX_DELAY_NS : delay;
	uint32_t bin = (uint32_t)value;
	struct window *window;

	if (value >= 1 << SUB_BITS) {
		const uint32_t octave = 63 - SUB_BITS - (uint32_t)__builtin_clzll((uint64_t)value);

		bin = (octave << SUB_BITS) + (uint32_t)(value >> octave);
	}
	if ((row->window == NONE || (uint64_t)minus(utc, row->start) >= SECOND_NS) &&
	    window_of(j, row, utc))
		return -1;
	if (cell_add(j, row->window, bin, 1))
		return -1;
	window = &j->windows[row->window];
	window->count++;
	window->sum = plus(window->sum, delay);
	window->low = delay < window->low ? delay : window->low;
	window->high = delay > window->high ? delay : window->high;
	return 0;
}

/* Keep a life's records for Python (crossings and stages). */
static int tell_records(struct joiner *j, const struct life *life, const struct shape *shape,
			uint8_t grade, bool waited)
{
	if (GROW(j->told, j->told_count, j->told_room, 1) ||
	    GROW(j->told_records, j->told_record_count, j->told_record_room, life->count))
		return -1;
	j->told[j->told_count++] = (struct told){
		.packet = packet_of(life),
		.shape = shape->number,
		.count = life->count,
		.length = life->records->length,
		.grade = grade,
		.waited = waited,
	};
	memcpy(j->told_records + j->told_record_count, life->records,
	       life->count * sizeof(*life->records));
	j->told_record_count += life->count;
	return 0;
}

/* Count a life of two records or more, its delays, and its rows. */
static int measure(struct joiner *j, const struct life *life, const struct shape *shape)
{
	const struct record *records = life->records;
	const uint8_t grade = grade_of(life);
	bool waited;
	struct row row;

	if (shape->flags & SHAPE_DROPPED)
		j->counts[DROPPED] += life->count;
	else if (shape->flags & SHAPE_UNCLEAR)
		j->counts[AMBIGUOUS] += life->count;
	else
		j->counts[MATCHED] += life->count;
	if (shape->flags & SHAPE_UNCLEAR)
		j->counts[SEVERAL_DEVICES]++;
	if (!shape->row_count)
		return 0;
	waited = has_waited(j, life, shape);
	j->counts[GRADED_BUFFER - GRADE_BUFFER + grade]++;
	j->counts[WAITED] += waited;
	if (j->want_records && tell_records(j, life, shape, grade, waited))
		return -1;
	if (j->want_rows && GROW(j->rows, j->row_count, j->row_room, shape->row_count))
		return -1;
	row = (struct row){
		.packet = packet_of(life),
		.length = records->length,
		.reason = shape->outcome == OUTCOME_DROPPED ?
				  (uint16_t)records[life->count - 1].length :
				  0,
		.grade = grade,
		.outcome = shape->outcome,
		.waited = waited,
	};
	for (uint32_t i = 0; i < shape->row_count; i++) {
		struct shape_row *of = &j->shape_rows[shape->rows + i];

		row.utc = plus(records[of->begin].ts, j->offset);
		row.delay = minus(records[of->end].ts, records[of->begin].ts);
		if (!waited && count_delay(j, of, row.utc, row.delay))
			return -1;
		if (j->want_rows) {
			row.entry = of->entry;
			row.direction = of->direction;
			row.segment = of->segment;
			row.position = of->position;
			j->rows[j->row_count++] = row;
		}
	}
	return 0;
}

/*
 * End a life: the buffer was `freed`, or it was too long ago for a partner (`expired`), or the stream has ended
 * (`left`), or another life follows.
 */
int life_ended(struct joiner *j, uint32_t which, bool freed, bool expired, bool left)
{
	struct life *life = &j->lives[which];
	const struct shape *shape;
	const struct record *end;

	if (life->count == 1) {
		j->counts[freed ? UNMATCHED : expired ? EXPIRED : left ? LEFT : UNMATCHED]++;
		life_free(j, which);
		return 0;
	}
	if (life->flags & LIFE_START && tell_start(j, life))
		return -1;
	shape = shape_of(j, life);
	if (!shape)
		return -1;
	end = &life->records[shape->end];
	if (shape->flags & (SHAPE_TAIL | SHAPE_HEAD) && end->key && end->trait & TRAIT_JOINS)
		return loose_add(j, which, shape->end, shape->flags & SHAPE_HEAD, shape);
	if (measure(j, life, shape))
		return -1;
	life_free(j, which);
	return 0;
}

/* --- lives of several buffers (correlator/links.py) ------------------------------------------------------------ */

/* Let a life wait, whose shape may be known. */
int loose_add(struct joiner *j, uint32_t which, uint32_t end, bool head, const struct shape *shape)
{
	struct life *life = &j->lives[which];

	if (GROW(j->loose, j->loose_count, j->loose_room, 1))
		return -1;
	life->grade = grade_of(life);
	life->flags |= LIFE_LOOSE;
	j->loose[j->loose_count++] = (struct loose){
		.key = life->records[end].key,
		.at = life->records[end].ts,
		.life = which,
		.end = end,
		.shape = shape ? (uint32_t)(shape - j->shapes) : 0,
		.learned = shape ? j->learned : 0,
		.head = head,
	};
	j->loose_records += life->count;
	return 0;
}

static int by_key(const void *a, const void *b)
{
	const struct loose *one = a, *other = b;

	if (one->key != other->key)
		return one->key < other->key ? -1 : 1;
	if (one->at != other->at)
		return one->at < other->at ? -1 : 1;
	return one->head - other->head;
}

static int by_time(const void *a, const void *b)
{
	const struct loose *one = a, *other = b;

	if (one->at != other->at)
		return one->at < other->at ? -1 : 1;
	return one->life < other->life ? -1 : 1;
}

/*
 * Bring lives of one key together, in order of time: by a hash into as many stretches as there are lives, most of which
 * hold one life or none.
 */
static int in_groups(struct joiner *j)
{
	const uint32_t count = j->loose_count;
	const unsigned int shift = count < 2 ? 31 : (unsigned int)__builtin_clz(count - 1);
	const size_t stretches = (size_t)1 << (32 - shift);
	struct loose *sorted = malloc(count * sizeof(*sorted));
	uint32_t *ends = calloc(stretches, sizeof(*ends));
	uint32_t begin = 0;

	if (!sorted || !ends) {
		free(sorted);
		free(ends);
		return -1;
	}
	for (uint32_t i = 0; i < count; i++)
		ends[hashed(j, j->loose[i].key) >> shift]++;
	for (size_t i = 0; i < stretches; i++) {
		begin += ends[i];
		ends[i] = begin - ends[i];
	}
	for (uint32_t i = 0; i < count; i++)
		sorted[ends[hashed(j, j->loose[i].key) >> shift]++] = j->loose[i];
	begin = 0;
	for (size_t i = 0; i < stretches; i++) {
		if (ends[i] - begin > 1)
			qsort(sorted + begin, ends[i] - begin, sizeof(*sorted), by_key);
		begin = ends[i];
	}
	memcpy(j->loose, sorted, count * sizeof(*sorted));
	free(sorted);
	free(ends);
	return 0;
}

/* Measure a life that waits no longer. */
static int let_go(struct joiner *j, const struct loose *loose)
{
	const struct life *life = &j->lives[loose->life];
	const bool known = loose->learned && loose->learned == j->learned;
	const struct shape *shape = known ? &j->shapes[loose->shape] : shape_of(j, life);

	j->loose_records -= life->count;
	if (!shape || measure(j, life, shape))
		return -1;
	life_free(j, loose->life);
	return 0;
}

/* Join a tail and its head, without the tail's records behind its last device. */
static int join(struct joiner *j, const struct loose *tail, const struct loose *head)
{
	struct life *life = &j->lives[tail->life];
	struct life *rest = &j->lives[head->life];
	struct loose joined = *tail;

	j->counts[MATCHED] += life->count - (tail->end + 1);
	j->loose_records -= life->count - (tail->end + 1);
	life->count = tail->end + 1;
	for (uint32_t i = 0; i < rest->count; i++) {
		if (life_append(life, &rest->records[i]))
			return -1;
	}
	life->grade = GRADE_CONTENT;
	life_free(j, head->life);
	joined.learned = 0;
	return let_go(j, &joined);
}

/* Return 1 if the two are of one packet, 0 if not, -1 on failure. */
static int fits(struct joiner *j, const struct loose *tail, const struct loose *head)
{
	const int64_t from = number_of(&j->lives[tail->life].records[tail->end]);
	const int64_t to = number_of(&j->lives[head->life].records[head->end]);

	if (from < 0 || to < 0 || spans_gap(j, tail->at, head->at))
		return 0;
	return passes_asked(j, from, to);
}

/* Decide about the lives of one key and time, which are in order; return 0 or -1. */
static int decide(struct joiner *j, const struct loose *group, uint32_t count)
{
	uint32_t heads = 0;

	for (uint32_t i = 0; i < count; i++)
		heads += group[i].head;
	if (count == 2 && heads == 1 && group[1].head) {
		const int joined = fits(j, &group[0], &group[1]);

		if (joined < 0)
			return -1;
		if (joined)
			return join(j, &group[0], &group[1]);
	}
	if (count > 2 && heads)
		j->counts[SEVERAL_PACKETS] += count - heads;
	for (uint32_t i = 0; i < count; i++) {
		if (let_go(j, &group[i]))
			return -1;
	}
	return 0;
}

/* Release the oldest without joining them, so that at most `most` records wait. */
static int release_oldest(struct joiner *j, int64_t most)
{
	uint32_t gone = 0;

	qsort(j->loose, j->loose_count, sizeof(*j->loose), by_time);
	while (gone < j->loose_count && j->loose_records > most) {
		if (let_go(j, &j->loose[gone++]))
			return -1;
	}
	j->loose_count -= gone;
	memmove(j->loose, j->loose + gone, j->loose_count * sizeof(*j->loose));
	return 0;
}

/* Decide about the lives to which no further one can be added: none begins before `settled`, or at all. */
int loose_release(struct joiner *j, bool last, int64_t settled, int64_t most)
{
	const uint32_t count = j->loose_count;
	int64_t earliest = INT64_MAX;
	uint32_t kept = 0;

	for (uint32_t i = 0; i < count; i++)
		earliest = j->loose[i].at < earliest ? j->loose[i].at : earliest;
	if (!count || (!last && plus(earliest, j->link) >= settled && j->loose_records <= most))
		return 0;
	if (in_groups(j))
		return -1;
	for (uint32_t begin = 0, end; begin < count; begin = end) {
		const struct loose *group = &j->loose[begin];

		end = begin + 1;
		while (end < count && j->loose[end].key == group->key &&
		       minus(j->loose[end].at, j->loose[end - 1].at) <= j->link)
			end++;
		if (last || plus(j->loose[end - 1].at, j->link) < settled) {
			if (decide(j, group, end - begin))
				return -1;
			continue;
		}
		memmove(&j->loose[kept], group, (end - begin) * sizeof(*group));
		kept += end - begin;
	}
	j->loose_count = kept;
	return j->loose_records > most ? release_oldest(j, most) : 0;
}

int64_t loose_oldest(const struct joiner *j)
{
	int64_t oldest = INT64_MAX;

	for (uint32_t i = 0; i < j->loose_count; i++) {
		const int64_t first = j->lives[j->loose[i].life].first_ts;

		oldest = first < oldest ? first : oldest;
	}
	return oldest;
}
