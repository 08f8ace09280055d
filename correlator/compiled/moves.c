// SPDX-License-Identifier: Apache-2.0
/* What Python has answered about moves: an open hash table that doubles when it is half full. */
#include <stdlib.h>
#include <string.h>

#include "joiner.h"

#define FIRST_MOVES 128
#define UNASKED (-3)
#define PASSES \
	((uint64_t)1 << 63) /* in a key: not a move of records, but from one device to another */

int moves_init(struct joiner *j)
{
	j->moves = malloc(FIRST_MOVES * sizeof(*j->moves));
	if (!j->moves)
		return -1;
	j->move_mask = FIRST_MOVES - 1;
	moves_forget(j);
	return 0;
}

void moves_forget(struct joiner *j)
{
	memset(j->moves, 0xff, ((size_t)j->move_mask + 1) * sizeof(*j->moves));
	j->move_count = 0;
	for (uint32_t i = 0; i < j->sightings; i++)
		j->starts[i] = UNASKED;
}

/* Return where the move is, or where it belongs. */
static struct move *find(const struct joiner *j, uint64_t key)
{
	uint32_t at = hashed(j, key) & j->move_mask;

	while (j->moves[at].key != key && j->moves[at].key != UINT64_MAX)
		at = (at + 1) & j->move_mask;
	return &j->moves[at];
}

static int make_room(struct joiner *j)
{
	const size_t size = (size_t)j->move_mask + 1;
	struct move *old = j->moves;
	struct move *moves;

	if (j->move_count < size / 2)
		return 0;
	moves = malloc(2 * size * sizeof(*moves));
	if (!moves || size > UINT32_MAX / 4) {
		free(moves);
		return -1;
	}
	memset(moves, 0xff, 2 * size * sizeof(*moves));
	j->moves = moves;
	j->move_mask = (uint32_t)(2 * size - 1);
	for (size_t i = 0; i < size; i++) {
		if (old[i].key != UINT64_MAX)
			*find(j, old[i].key) = old[i];
	}
	free(old);
	return 0;
}

/* Return a move that is known, or ask; NULL on failure. */
const struct move *move_asked(struct joiner *j, uint64_t key)
{
	const unsigned long from = (unsigned long)(key >> PLACE_BITS);
	const unsigned long to = (unsigned long)(key & (((uint64_t)1 << PLACE_BITS) - 1));
	struct move move = { .key = key };
	unsigned char verdict;
	unsigned short changes;
	PyObject *answer;
	int status = -1;

	PyEval_RestoreThread(j->thread);
	answer = PyObject_CallFunction(j->judge, "kk", from, to);
	if (answer && !PyTuple_Check(answer)) {
		PyErr_SetString(PyExc_TypeError, "the verdict on a move is no tuple");
	} else if (answer && PyArg_ParseTuple(answer, "biiH:judge", &verdict, &move.from, &move.to,
					      &changes)) {
		move.verdict = verdict;
		move.changes = changes;
		status = 0;
	}
	Py_XDECREF(answer);
	j->thread = PyEval_SaveThread();
	if (status || make_room(j))
		return NULL;
	j->move_count++;
	struct move *found = find(j, key);
	*found = move;
	return found;
}

/* Ask, once, at which device a life starts whose first record has this sighting. */
int start_asked(struct joiner *j, uint32_t sighting, int64_t *number)
{
	PyObject *answer;
	long told = -1;

	*number = UNKNOWN;
	if (sighting >= j->sightings)
		return 0; /* a later topology does not list it */
	if (j->starts[sighting] == UNASKED) {
		PyEval_RestoreThread(j->thread);
		answer = PyObject_CallFunction(j->start, "k", (unsigned long)sighting);
		if (answer)
			told = PyLong_AsLong(answer);
		Py_XDECREF(answer);
		if (!PyErr_Occurred() && (told < -1 || told >= (1 << 24) - 2))
			PyErr_SetString(PyExc_ValueError, "a start at no device");
		const bool failed = PyErr_Occurred() != NULL;
		j->thread = PyEval_SaveThread();
		if (failed)
			return -1;
		j->starts[sighting] = (int32_t)told;
	}
	*number = j->starts[sighting];
	return 0;
}

/* Ask, once, whether a packet passes from a device to another inside the host: 1, 0, or -1 on failure. */
int passes_asked(struct joiner *j, int64_t from, int64_t to)
{
	const uint64_t key = PASSES | (uint64_t)from << 24 | (uint64_t)to;
	struct move *found = find(j, key);
	PyObject *answer;
	int passes = -1;

	if (found->key == key)
		return found->verdict;
	PyEval_RestoreThread(j->thread);
	answer = PyObject_CallFunction(j->passes, "LL", (long long)from, (long long)to);
	if (answer)
		passes = PyObject_IsTrue(answer);
	Py_XDECREF(answer);
	j->thread = PyEval_SaveThread();
	if (passes < 0 || make_room(j))
		return -1;
	j->move_count++;
	*find(j, key) = (struct move){ .key = key, .verdict = (uint8_t)passes };
	return passes;
}
