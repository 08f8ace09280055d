// SPDX-License-Identifier: Apache-2.0
/* Tables for Python: rows in order of time, and the records of lives. A column is a bytearray. */
#include <stdlib.h>
#include <string.h>

#include "joiner.h"

#define DIGIT_BITS 11
#define DIGITS (1u << DIGIT_BITS)
#define PASSES 3 /* for 32 bits of time */

struct ranked {
	int64_t utc;
	uint32_t at;
};

static int by_utc(const void *a, const void *b)
{
	const struct ranked *one = a, *other = b;

	if (one->utc != other->utc)
		return one->utc < other->utc ? -1 : 1;
	return one->at < other->at ? -1 : one->at > other->at;
}

/* Fill the lower halves of `order` with the indices of rows that are more than four seconds apart; return 0 or -1. */
static int order_apart(const struct row *rows, uint32_t count, uint64_t *order)
{
	struct ranked *ranked = malloc(count * sizeof(*ranked));

	if (!ranked)
		return -1;
	for (uint32_t i = 0; i < count; i++)
		ranked[i] = (struct ranked){ rows[i].utc, i };
	qsort(ranked, count, sizeof(*ranked), by_utc);
	for (uint32_t i = 0; i < count; i++)
		order[i] = ranked[i].at;
	free(ranked);
	return 0;
}

/*
 * Order rows by time, equal times as they came: a radix sort (Knuth, TAOCP 3, 5.2.5). The lower half of an element is
 * a row's index, the upper half its time since the earliest. Returns NULL without memory.
 */
static uint64_t *in_order(const struct row *rows, uint32_t count)
{
	uint64_t *order = malloc(((size_t)count + 1) * sizeof(*order));
	uint64_t *next = malloc(((size_t)count + 1) * sizeof(*next));
	uint32_t begins[PASSES][DIGITS] = { 0 };
	int64_t low = INT64_MAX, high = INT64_MIN;
	uint64_t span;

	if (!order || !next)
		goto failed;
	for (uint32_t i = 0; i < count; i++) {
		low = rows[i].utc < low ? rows[i].utc : low;
		high = rows[i].utc > high ? rows[i].utc : high;
	}
	span = count ? (uint64_t)minus(high, low) : 0;
	if (span > UINT32_MAX) {
		if (order_apart(rows, count, order))
			goto failed;
		free(next);
		return order;
	}
	for (uint32_t i = 0; i < count; i++) {
		const uint64_t above = (uint64_t)minus(rows[i].utc, low);

		order[i] = above << 32 | i;
		for (int pass = 0; pass < PASSES; pass++)
			begins[pass][above >> pass * DIGIT_BITS & (DIGITS - 1)]++;
	}
	for (int pass = 0; pass < PASSES && span >> pass * DIGIT_BITS; pass++) {
		const int shift = 32 + pass * DIGIT_BITS;
		uint32_t *begin = begins[pass];
		uint64_t *swapped = order;
		uint32_t sum = 0;

		for (uint32_t digit = 0; digit < DIGITS; digit++) {
			const uint32_t here = begin[digit];

			begin[digit] = sum;
			sum += here;
		}
		for (uint32_t i = 0; i < count; i++)
			next[begin[order[i] >> shift & (DIGITS - 1)]++] = order[i];
		order = next;
		next = swapped;
	}
	free(next);
	return order;
failed:
	free(order);
	free(next);
	return NULL;
}

/* Make columns for `count` rows; the element sizes end with 0. Returns a tuple. */
static PyObject *columns_of(const size_t *sizes, size_t count, void **data)
{
	Py_ssize_t length = 0;
	PyObject *tuple;

	while (sizes[length])
		length++;
	tuple = PyTuple_New(length);
	for (Py_ssize_t i = 0; tuple && i < length; i++) {
		PyObject *column =
			PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(sizes[i] * count));

		if (!column || PyTuple_SetItem(tuple, i, column)) {
			Py_DECREF(tuple);
			return NULL;
		}
		data[i] = PyByteArray_AsString(column);
	}
	return tuple;
}

/*
 * Return the columns of contracts.schema.Delays: lives that have ended, then those that had waited. Forget the rows.
 * `entries` has the stored entry of each that an answer about a shape has named.
 */
PyObject *rows_take(struct joiner *j, const int32_t *entries, size_t entry_count)
{
	static const size_t sizes[] = { 8, 8, 4, 1, 1, 1, 8, 4, 1, 1, 2, 1, 0 };
	const uint32_t count = j->row_count;
	const uint32_t ended = j->row_ended;
	void *data[12];
	PyObject *tuple;
	uint64_t *order, *released;

	for (uint32_t i = 0; i < count; i++) {
		if (j->rows[i].entry >= entry_count) {
			PyErr_Format(PyExc_IndexError, "a row of entry %u, of %zu",
				     (unsigned int)j->rows[i].entry, entry_count);
			return NULL;
		}
	}
	tuple = columns_of(sizes, count, data);
	order = tuple ? in_order(j->rows, ended) : NULL;
	released = tuple ? in_order(j->rows + ended, count - ended) : NULL;
	if (!order || !released) {
		free(order);
		free(released);
		Py_XDECREF(tuple);
		return tuple ? PyErr_NoMemory() : NULL;
	}
	for (uint32_t i = 0; i < count; i++) {
		const uint32_t at = (uint32_t)(i < ended ? order[i] : released[i - ended]);
		const struct row *row = &j->rows[i < ended ? at : ended + at];

		((int64_t *)data[0])[i] = row->utc;
		((uint64_t *)data[1])[i] = row->packet;
		((int32_t *)data[2])[i] = entries[row->entry];
		((uint8_t *)data[3])[i] = row->direction;
		((uint8_t *)data[4])[i] = row->segment;
		((uint8_t *)data[5])[i] = row->position;
		((int64_t *)data[6])[i] = row->delay;
		((uint32_t *)data[7])[i] = row->length;
		((uint8_t *)data[8])[i] = row->grade;
		((uint8_t *)data[9])[i] = row->outcome;
		((uint16_t *)data[10])[i] = row->reason;
		((uint8_t *)data[11])[i] = row->waited;
	}
	free(order);
	free(released);
	j->row_count = j->row_ended = 0;
	return tuple;
}

/* The columns of records: ts, place, length, cpu, trait, proto, key, flow, number, cross. */
#define RECORD_COLUMNS 10
static const size_t record_sizes[] = { 8, 8, 4, 2, 1, 1, 8, 8, 8, 1, 0 };

static void put_records(void *const *data, size_t at, const struct record *records, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++, at++) {
		const struct record *record = &records[i];

		((int64_t *)data[0])[at] = record->ts;
		((int64_t *)data[1])[at] = record->place;
		((uint32_t *)data[2])[at] = record->length;
		((uint16_t *)data[3])[at] = record->cpu;
		((uint8_t *)data[4])[at] = record->trait;
		((uint8_t *)data[5])[at] = record->proto;
		((uint64_t *)data[6])[at] = record->key;
		((uint64_t *)data[7])[at] = record->flow;
		((int64_t *)data[8])[at] = number_of(record);
		((uint8_t *)data[9])[at] = record->code & 1;
	}
}

/* Join two tuples of columns, of which the second may be absent. */
static PyObject *both(PyObject *records, PyObject *lives)
{
	PyObject *result = records && lives ? PyTuple_Pack(2, records, lives) : NULL;

	Py_XDECREF(records);
	Py_XDECREF(lives);
	return result;
}

/* Return the records of lives whose rows Python has got, and (shape, packet, size, length, grade, waited) of each. */
PyObject *told_take(struct joiner *j)
{
	static const size_t sizes[] = { 4, 8, 8, 4, 1, 1, 0 };
	void *data[RECORD_COLUMNS], *of_life[6];
	PyObject *records = columns_of(record_sizes, j->told_record_count, data);
	PyObject *lives = columns_of(sizes, j->told_count, of_life);

	if (records && lives) {
		put_records(data, 0, j->told_records, j->told_record_count);
		for (uint32_t i = 0; i < j->told_count; i++) {
			const struct told *told = &j->told[i];

			((uint32_t *)of_life[0])[i] = told->shape;
			((uint64_t *)of_life[1])[i] = told->packet;
			((int64_t *)of_life[2])[i] = told->count;
			((uint32_t *)of_life[3])[i] = told->length;
			((uint8_t *)of_life[4])[i] = told->grade;
			((uint8_t *)of_life[5])[i] = told->waited;
		}
		j->told_count = j->told_record_count = 0;
	}
	return both(records, lives);
}

/* Return the records of open lives, and (skb, size) of each. */
PyObject *open_columns(const struct joiner *j)
{
	static const size_t sizes[] = { 8, 8, 0 };
	void *data[RECORD_COLUMNS], *of_life[2];
	PyObject *records, *lives;
	size_t count = 0, total = 0, at = 0, n = 0;

	for (uint32_t i = 1; i <= j->life_count; i++) {
		if (j->lives[i].flags & LIFE_LOOSE)
			continue;
		count += j->lives[i].count > 0;
		total += j->lives[i].count;
	}
	records = columns_of(record_sizes, total, data);
	lives = columns_of(sizes, count, of_life);
	for (uint32_t i = 1; records && lives && i <= j->life_count; i++) {
		const struct life *life = &j->lives[i];

		if (!life->count || life->flags & LIFE_LOOSE)
			continue;
		put_records(data, at, life->records, life->count);
		at += life->count;
		((uint64_t *)of_life[0])[n] = life->skb;
		((int64_t *)of_life[1])[n++] = life->count;
	}
	return both(records, lives);
}

/* Return the records of loose ends, and (skb, size, head, end, grade) of each. */
PyObject *loose_columns(const struct joiner *j)
{
	static const size_t sizes[] = { 8, 8, 1, 8, 1, 0 };
	void *data[RECORD_COLUMNS], *of_life[5];
	PyObject *records = columns_of(record_sizes, (size_t)j->loose_records, data);
	PyObject *lives = columns_of(sizes, j->loose_count, of_life);
	size_t at = 0;

	for (uint32_t i = 0; records && lives && i < j->loose_count; i++) {
		const struct life *life = &j->lives[j->loose[i].life];

		put_records(data, at, life->records, life->count);
		at += life->count;
		((uint64_t *)of_life[0])[i] = life->skb;
		((int64_t *)of_life[1])[i] = life->count;
		((uint8_t *)of_life[2])[i] = j->loose[i].head;
		((int64_t *)of_life[3])[i] = j->loose[i].end;
		((uint8_t *)of_life[4])[i] = life->grade;
	}
	return both(records, lives);
}
