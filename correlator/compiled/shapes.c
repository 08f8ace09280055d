// SPDX-License-Identifier: Apache-2.0
/* What Python has answered about lives of each shape: the hooks that they passed, at which devices, in which order. */
#include <stdlib.h>
#include <string.h>

#include "joiner.h"

#define FIRST_SHAPES 64
#define HEADER 6 /* numbers before the rows of an answer (correlator/answers.py) */
#define ROW 6 /* numbers of a row */

int shapes_init(struct joiner *j)
{
	j->shape_slots = calloc(FIRST_SHAPES, sizeof(*j->shape_slots));
	j->shape_mask = FIRST_SHAPES - 1;
	return j->shape_slots ? 0 : -1;
}

void shapes_forget(struct joiner *j)
{
	memset(j->shape_slots, 0, ((size_t)j->shape_mask + 1) * sizeof(*j->shape_slots));
	j->learned++;
	j->shape_count = j->code_count = j->shape_row_count = j->wait_count = 0;
}

static int make_room(struct joiner *j)
{
	const size_t size = (size_t)j->shape_mask + 1;
	uint32_t *slots;

	if (j->shape_count < size / 2)
		return 0;
	slots = calloc(2 * size, sizeof(*slots));
	if (!slots || size > UINT32_MAX / 4) {
		free(slots);
		return -1;
	}
	free(j->shape_slots);
	j->shape_slots = slots;
	j->shape_mask = (uint32_t)(2 * size - 1);
	for (uint32_t i = 0; i < j->shape_count; i++) {
		uint32_t at = (uint32_t)(j->shapes[i].hash >> 32) & j->shape_mask;

		while (slots[at])
			at = (at + 1) & j->shape_mask;
		slots[at] = i + 1;
	}
	return 0;
}

/* Enter an answer, whose every number is checked; return 0, or -1 with or without an exception. */
static int enter(struct joiner *j, struct shape *shape, const uint32_t *told, size_t size)
{
	const uint32_t count = shape->count;

	if (size < HEADER)
		goto invalid;
	shape->number = told[0];
	shape->flags = (uint8_t)told[1];
	shape->outcome = (uint8_t)told[2];
	shape->end = told[3];
	shape->row_count = told[4];
	shape->wait_count = told[5];
	if (shape->end >= count || size != HEADER + ROW * (size_t)told[4] + told[5])
		goto invalid;
	if (GROW(j->shape_rows, j->shape_row_count, j->shape_row_room, shape->row_count) ||
	    GROW(j->waits, j->wait_count, j->wait_room, shape->wait_count))
		return -1;
	shape->rows = j->shape_row_count;
	shape->waits = j->wait_count;
	told += HEADER;
	for (uint32_t i = 0; i < shape->row_count; i++, told += ROW) {
		if (told[0] >= count || told[1] >= count || told[2] >= 1u << 27 || told[3] > 3 ||
		    told[4] > 7 || told[5] > 255)
			goto invalid;
		j->shape_rows[shape->rows + i] = (struct shape_row){
			.window = NONE,
			.begin = told[0],
			.end = told[1],
			.entry = told[2],
			.direction = (uint8_t)told[3],
			.segment = (uint8_t)told[4],
			.position = (uint8_t)told[5],
		};
	}
	for (uint32_t i = 0; i < shape->wait_count; i++) {
		if (told[i] == 0 || told[i] >= count)
			goto invalid;
		j->waits[shape->waits + i] = told[i];
	}
	j->shape_row_count += shape->row_count;
	j->wait_count += shape->wait_count;
	return 0;
invalid:
	PyErr_SetString(PyExc_ValueError, "an invalid answer about a shape");
	return -1;
}

static struct shape *ask(struct joiner *j, const struct life *life, uint64_t hash)
{
	struct shape shape = { .hash = hash, .count = life->count, .codes = j->code_count };
	const char *bytes = (const char *)(j->codes + j->code_count);
	PyObject *answer;
	char *told;
	Py_ssize_t size;
	uint32_t at;
	int status = -1;

	PyEval_RestoreThread(j->thread);
	answer = PyObject_CallFunction(j->shape, "y#", bytes, (Py_ssize_t)life->count * 4);
	if (answer && !PyBytes_AsStringAndSize(answer, &told, &size)) {
		uint32_t *numbers = malloc((size_t)size + 1);

		if (numbers) {
			memcpy(numbers, told, (size_t)size);
			status = enter(j, &shape, numbers, (size_t)size / 4);
			free(numbers);
		}
	}
	Py_XDECREF(answer);
	j->thread = PyEval_SaveThread();
	if (status || GROW(j->shapes, j->shape_count, j->shape_room, 1) || make_room(j))
		return NULL;
	at = (uint32_t)(hash >> 32) & j->shape_mask;
	while (j->shape_slots[at])
		at = (at + 1) & j->shape_mask;
	j->code_count += life->count;
	j->shapes[j->shape_count] = shape;
	j->shape_slots[at] = ++j->shape_count;
	return &j->shapes[j->shape_count - 1];
}

/* Return the shape of a life; NULL on failure. The pointer is valid until the next call. */
struct shape *shape_of(struct joiner *j, const struct life *life)
{
	const struct record *records = life->records;
	const uint32_t count = life->count;
	uint64_t hash = j->seed ^ count;
	uint32_t at, found;

	for (uint32_t i = 0; i < count; i++)
		hash = (hash ^ records[i].code) * GOLDEN;
	hash ^= hash >> 29;
	hash *= 0xbf58476d1ce4e5b9ull; /* SplitMix64's */
	at = (uint32_t)(hash >> 32) & j->shape_mask;
	for (; (found = j->shape_slots[at]); at = (at + 1) & j->shape_mask) {
		struct shape *shape = &j->shapes[found - 1];
		const uint32_t *codes = j->codes + shape->codes;
		uint32_t i = 0;

		if (shape->hash != hash || shape->count != count)
			continue;
		while (i < count && codes[i] == records[i].code)
			i++;
		if (i == count)
			return shape;
	}
	if (GROW(j->codes, j->code_count, j->code_room, count))
		return NULL;
	for (uint32_t i = 0; i < count; i++)
		j->codes[j->code_count + i] = records[i].code;
	return ask(j, life, hash);
}
