// SPDX-License-Identifier: Apache-2.0
#include "names.h"

#include <stdlib.h>

#include "loops.h"

#define FIRST_SLOTS 64

static uint64_t hash_seed;

void names_seed(uint64_t seed)
{
	hash_seed = seed;
}

/* Two rounds of MurmurHash3's finalizer: every bit of the name and the seed reaches every slot. */
static size_t first_slot(const struct names *names, struct name name)
{
	uint64_t hash = name.low ^ hash_seed;

	hash ^= hash >> 33;
	hash *= 0xff51afd7ed558ccdull;
	hash ^= hash >> 33;
	hash ^= name.high;
	hash *= 0xc4ceb9fe1a85ec53ull;
	hash ^= hash >> 33;
	return hash & (names->slot_count - 1);
}

int names_init(struct names *names)
{
	names->count = 1;
	names->slot_count = FIRST_SLOTS;
	names->names = calloc(FIRST_SLOTS / 2, sizeof(*names->names));
	names->slots = calloc(FIRST_SLOTS, sizeof(*names->slots));
	if (!names->names || !names->slots)
		return -1;
	names->slots[first_slot(names, names->names[0])] = 1;
	return 0;
}

void names_deinit(struct names *names)
{
	free(names->names);
	free(names->slots);
}

/* Return the slot of the name, or the free slot where it belongs. */
static size_t find_slot(const struct names *names, struct name name)
{
	size_t slot = first_slot(names, name);

	while (names->slots[slot]) {
		const struct name *found = &names->names[names->slots[slot] - 1];

		if (found->low == name.low && found->high == name.high)
			break;
		slot = (slot + 1) & (names->slot_count - 1);
	}
	return slot;
}

static int grow(struct names *names)
{
	const size_t slot_count = 2 * names->slot_count;
	struct name *larger = realloc(names->names, slot_count / 2 * sizeof(*larger));
	uint32_t *slots = calloc(slot_count, sizeof(*slots));

	if (larger)
		names->names = larger;
	if (!larger || !slots || slot_count > UINT32_MAX) {
		free(slots);
		return -1;
	}
	free(names->slots);
	names->slots = slots;
	names->slot_count = slot_count;
	for (uint32_t i = 0; i < names->count; i++)
		slots[find_slot(names, names->names[i])] = i + 1;
	return 0;
}

uint32_t names_index(struct names *names, struct name name)
{
	size_t slot = find_slot(names, name);

	if (names->slots[slot])
		return names->slots[slot] - 1;
	if (names->count == names->slot_count / 2) {
		if (grow(names))
			return NAMES_FULL;
		slot = find_slot(names, name);
	}
	names->names[names->count] = name;
	names->slots[slot] = ++names->count;
	return names->count - 1;
}

/* Number the names; return 0, or -1 without memory. */
static int number(struct names *names, const Py_buffer *low, const Py_buffer *high, uint32_t *index)
{
	const uint64_t *lows = low->buf;
	const uint64_t *highs = high->buf;
	const Py_ssize_t count = low->len / (Py_ssize_t)sizeof(*lows);

	if (names_init(names))
		return -1;
	for (Py_ssize_t i = 0; i < count; i++) {
		index[i] = names_index(names, (struct name){ lows[i], highs[i] });
		if (index[i] == NAMES_FULL)
			return -1;
	}
	return 0;
}

PyObject *loops_distinct(PyObject *Py_UNUSED(module), PyObject *args)
{
	Py_buffer low, high, index;
	struct names names = { 0 };
	PyObject *result = NULL;
	PyThreadState *thread;
	int status;

	if (!PyArg_ParseTuple(args, "y*y*w*:distinct", &low, &high, &index))
		return NULL;
	if (low.len % 8 || high.len != low.len || index.len != low.len / 2) {
		PyErr_SetString(PyExc_IndexError, "arrays of different lengths");
		goto out;
	}
	thread = PyEval_SaveThread();
	status = number(&names, &low, &high, index.buf);
	PyEval_RestoreThread(thread);
	if (status)
		PyErr_NoMemory();
	else
		result = PyBytes_FromStringAndSize((const char *)names.names,
						   names.count * (Py_ssize_t)sizeof(struct name));
	names_deinit(&names);
out:
	PyBuffer_Release(&low);
	PyBuffer_Release(&high);
	PyBuffer_Release(&index);
	return result;
}
