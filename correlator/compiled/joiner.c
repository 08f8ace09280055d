// SPDX-License-Identifier: Apache-2.0
/* The module correlator.compiled.joiner and its type; joiner.pyi says what each method takes and returns. */
#include "joiner.h"

#include <stdlib.h>
#include <string.h>

#define COLUMNS 13

static uint64_t hash_seed;

/* --- buffers ------------------------------------------------------------------------------------------------ */

/* Copy a buffer of 8-byte numbers into memory of ours, in place of what was there; return 0 or -1. */
static int copy_numbers(PyObject *given, int64_t **into, uint32_t *count)
{
	Py_buffer buffer;
	int64_t *copy;

	if (PyObject_GetBuffer(given, &buffer, PyBUF_C_CONTIGUOUS))
		return -1;
	copy = malloc((size_t)buffer.len + 1);
	if (!copy || buffer.itemsize != 8 || buffer.len / 8 >= UINT32_MAX / 2) {
		if (!copy)
			PyErr_NoMemory();
		else
			PyErr_SetString(PyExc_IndexError, "not numbers of 8 bytes");
		free(copy);
		PyBuffer_Release(&buffer);
		return -1;
	}
	memcpy(copy, buffer.buf, (size_t)buffer.len);
	free(*into);
	*into = copy;
	*count = (uint32_t)(buffer.len / 8);
	PyBuffer_Release(&buffer);
	return 0;
}

struct held {
	Py_buffer buffers[COLUMNS];
	int count;
};

static void release_columns(struct held *held)
{
	while (held->count)
		PyBuffer_Release(&held->buffers[--held->count]);
}

/* Get the buffers of columns, each of one length; None for an absent one. Return 0 or -1. */
static int get_columns(PyObject *tuple, struct columns *columns, struct held *held)
{
	static const Py_ssize_t sizes[COLUMNS] = { 8, 8, 1, 4, 4, 2, 8, 1, 8, 1, 2, 8, 1 };
	const void *data[COLUMNS] = { NULL };
	const Py_ssize_t given = PyTuple_Size(tuple);
	Py_ssize_t count = -1;

	held->count = 0;
	if (given < 0 || given > COLUMNS) {
		if (given > COLUMNS)
			PyErr_SetString(PyExc_IndexError, "too many columns");
		return -1;
	}
	for (Py_ssize_t i = 0; i < given; i++) {
		PyObject *column = PyTuple_GetItem(tuple, i);
		Py_buffer *buffer = &held->buffers[held->count];

		if (column == Py_None)
			continue;
		if (PyObject_GetBuffer(column, buffer, PyBUF_C_CONTIGUOUS)) {
			release_columns(held);
			return -1;
		}
		held->count++;
		if (count < 0)
			count = buffer->len / sizes[i];
		if (buffer->itemsize != sizes[i] || buffer->len != count * sizes[i]) {
			PyErr_Format(PyExc_IndexError,
				     "column %zd: %zd bytes of %zd each, expected %zd of %zd", i,
				     buffer->len, buffer->itemsize, count * sizes[i], sizes[i]);
			release_columns(held);
			return -1;
		}
		data[i] = buffer->buf;
	}
	for (int i = 0; i < 5; i++) {
		if (!data[i] && count) {
			PyErr_SetString(PyExc_IndexError, "a column is absent");
			release_columns(held);
			return -1;
		}
	}
	*columns = (struct columns){
		data[0],  data[1],
		data[2],  data[3],
		data[4],  data[5],
		data[6],  data[7],
		data[8],  data[9],
		data[10], data[11],
		data[12], (size_t)(count < 0 ? 0 : count),
	};
	return 0;
}

/* --- one call at a time ------------------------------------------------------------------------------------- */

static int enter(struct joiner *j)
{
	if (j->busy || j->failed) {
		PyErr_SetString(PyExc_RuntimeError,
				j->busy ? "the joiner is in use" : "the joiner has failed before");
		return -1;
	}
	j->busy = true;
	j->thread = PyEval_SaveThread();
	return 0;
}

static PyObject *leave(struct joiner *j, int status)
{
	PyEval_RestoreThread(j->thread);
	j->busy = false;
	if (!status)
		Py_RETURN_NONE;
	j->failed = true;
	if (!PyErr_Occurred())
		PyErr_NoMemory();
	return NULL;
}

static bool is_usable(const struct joiner *j)
{
	if (j->busy || j->failed)
		PyErr_SetString(PyExc_RuntimeError,
				j->busy ? "the joiner is in use" : "the joiner has failed before");
	return !j->busy && !j->failed;
}

/* --- methods ------------------------------------------------------------------------------------------------ */

static PyObject *joiner_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(named))
{
	const char *hooks, *traits, *copied;
	Py_ssize_t sizes[3];
	long long timeout, link, offset;
	int want_rows, want_records;
	PyObject *asked[4];
	struct joiner *j;
	allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);

	if (!PyArg_ParseTuple(args, "(y#y#y#)(LLL)(pp)(OOOO)", &hooks, &sizes[0], &traits,
			      &sizes[1], &copied, &sizes[2], &timeout, &link, &offset, &want_rows,
			      &want_records, &asked[0], &asked[1], &asked[2], &asked[3]))
		return NULL;
	if (sizes[0] != 256 || sizes[1] != 256 || sizes[2] != 256) {
		PyErr_SetString(PyExc_IndexError, "a table of bytes does not have 256 elements");
		return NULL;
	}
	j = (struct joiner *)(void *)allocate(type, 0);
	if (!j)
		return NULL;
	memcpy(j->hooks, hooks, 256);
	for (int i = 0; i < 256; i++)
		j->traits[i] = (uint8_t)traits[i] & 3;
	memcpy(j->copied, copied, 256);
	j->judge = Py_NewRef(asked[0]);
	j->start = Py_NewRef(asked[1]);
	j->passes = Py_NewRef(asked[2]);
	j->shape = Py_NewRef(asked[3]);
	j->timeout = timeout;
	j->link = link;
	j->offset = offset;
	j->want_rows = want_rows;
	j->want_records = want_records;
	j->seed = hash_seed;
	j->gap_ts = INT64_MIN;
	j->counts[OLDEST_OPEN] = j->counts[OLDEST_LOOSE] = INT64_MAX;
	if (moves_init(j) || shapes_init(j) || lives_init(j) || windows_init(j)) {
		Py_DECREF(j);
		return PyErr_NoMemory();
	}
	return (PyObject *)j;
}

static int joiner_traverse(PyObject *self, visitproc visit, void *arg)
{
	struct joiner *j = (struct joiner *)(void *)self;

	Py_VISIT(Py_TYPE(self));
	Py_VISIT(j->judge);
	Py_VISIT(j->start);
	Py_VISIT(j->passes);
	Py_VISIT(j->shape);
	return 0;
}

static int joiner_clear(PyObject *self)
{
	struct joiner *j = (struct joiner *)(void *)self;

	Py_CLEAR(j->judge);
	Py_CLEAR(j->start);
	Py_CLEAR(j->passes);
	Py_CLEAR(j->shape);
	return 0;
}

static void joiner_dealloc(PyObject *self)
{
	struct joiner *j = (struct joiner *)(void *)self;
	PyTypeObject *type = Py_TYPE(self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
	void *arrays[] = { j->moves,	   j->only,	    j->starts,	   j->shape_slots,
			   j->shapes,	   j->codes,	    j->shape_rows, j->waits,
			   j->slots,	   j->free_lives,   j->gap_starts, j->gap_ends,
			   j->asked_devs,  j->asked_times,  j->windows,	   j->rows,
			   j->cells,	   j->window_slots, j->loose,	   j->told,
			   j->told_records };

	PyObject_GC_UnTrack(self);
	joiner_clear(self);
	lives_free(j);
	for (size_t i = 0; i < sizeof(arrays) / sizeof(*arrays); i++)
		free(arrays[i]);
	release(self);
	Py_DECREF(type);
}

static PyObject *joiner_forget(PyObject *self, PyObject *only)
{
	struct joiner *j = (struct joiner *)(void *)self;
	uint32_t sightings;
	int32_t *starts;

	if (!is_usable(j))
		return NULL;
	if (copy_numbers(only, &j->only, &sightings))
		return NULL;
	j->sightings = 0;
	starts = realloc(j->starts, ((size_t)sightings + 1) * sizeof(*starts));
	if (!starts)
		return PyErr_NoMemory();
	j->starts = starts;
	j->sightings = sightings;
	moves_forget(j);
	shapes_forget(j);
	Py_RETURN_NONE;
}

static PyObject *joiner_begin(PyObject *self, PyObject *args)
{
	struct joiner *j = (struct joiner *)(void *)self;
	PyObject *gap_starts, *gap_ends, *devs, *times;
	uint32_t starts = 0, ends = 0, dev_count = 0, time_count = 0;

	if (!is_usable(j) ||
	    !PyArg_ParseTuple(args, "OOOO:begin", &gap_starts, &gap_ends, &devs, &times))
		return NULL;
	j->gap_count = j->gap_at = j->asked_count = 0;
	if (copy_numbers(gap_starts, &j->gap_starts, &starts) ||
	    copy_numbers(gap_ends, &j->gap_ends, &ends) ||
	    copy_numbers(devs, &j->asked_devs, &dev_count) ||
	    copy_numbers(times, &j->asked_times, &time_count))
		return NULL;
	if (starts != ends || dev_count != time_count) {
		PyErr_SetString(PyExc_IndexError, "arrays of different lengths");
		return NULL;
	}
	j->gap_count = starts;
	j->asked_count = dev_count;
	Py_RETURN_NONE;
}

static PyObject *joiner_add(PyObject *self, PyObject *columns)
{
	struct joiner *j = (struct joiner *)(void *)self;
	struct columns given;
	struct held held;
	PyObject *result = NULL;

	if (get_columns(columns, &given, &held))
		return NULL;
	if (given.count && !given.reason)
		PyErr_SetString(PyExc_IndexError, "a column is absent");
	else if (!enter(j))
		result = leave(j, lives_take(j, &given));
	release_columns(&held);
	return result;
}

static PyObject *joiner_restore(PyObject *self, PyObject *columns)
{
	struct joiner *j = (struct joiner *)(void *)self;
	struct columns given;
	struct held held;
	PyObject *result = NULL;

	if (get_columns(columns, &given, &held))
		return NULL;
	if (given.count && (!given.number || !given.cross))
		PyErr_SetString(PyExc_IndexError, "a column is absent");
	else if (!enter(j))
		result = leave(j, lives_restore(j, &given));
	release_columns(&held);
	return result;
}

/* Make the open life of a buffer a loose end, for a state that is restored life by life. */
static PyObject *joiner_loosen(PyObject *self, PyObject *args)
{
	struct joiner *j = (struct joiner *)(void *)self;
	struct loose loose = { 0 };
	unsigned long long skb;
	unsigned int end;
	unsigned char grade;
	int head, status;

	if (!is_usable(j) || !PyArg_ParseTuple(args, "KIpb:loosen", &skb, &end, &head, &grade))
		return NULL;
	loose.end = end;
	loose.head = head;
	status = lives_loosen(j, skb, &loose, grade);
	if (status < 0)
		return PyErr_NoMemory();
	if (status) {
		PyErr_SetString(PyExc_ValueError, "no such life, or no such record of it");
		return NULL;
	}
	Py_RETURN_NONE;
}

static PyObject *joiner_end(PyObject *self, PyObject *args)
{
	struct joiner *j = (struct joiner *)(void *)self;
	long long upto, most_open, most_loose;
	PyObject *result;
	int last, status;

	if (!PyArg_ParseTuple(args, "LpLL:end", &upto, &last, &most_open, &most_loose) || enter(j))
		return NULL;
	status = lives_end(j, upto, last, most_open);
	if (!status) {
		const int64_t oldest = j->counts[OLDEST_OPEN];

		j->row_ended = j->row_count;
		status = loose_release(j, last, oldest < upto ? oldest : upto, most_loose);
	}
	j->counts[LOOSE_RECORDS] = j->loose_records;
	j->counts[OLDEST_LOOSE] = loose_oldest(j);
	j->counts[CELLS] = j->cell_count;
	j->counts[LEARNED] =
		(int64_t)j->move_count + j->shape_count + j->code_count + j->shape_row_count;
	result = leave(j, status);
	if (!result)
		return NULL;
	Py_DECREF(result);
	return PyBytes_FromStringAndSize((const char *)j->counts, sizeof(j->counts));
}

static PyObject *joiner_windows(PyObject *self, PyObject *before)
{
	struct joiner *j = (struct joiner *)(void *)self;
	const bool all = before == Py_None;
	long long before_ns = 0;

	if (!all) {
		before_ns = PyLong_AsLongLong(before);
		if (PyErr_Occurred())
			return NULL;
	}
	return is_usable(j) ? windows_take(j, before_ns, all) : NULL;
}

static PyObject *joiner_rows(PyObject *self, PyObject *entries)
{
	struct joiner *j = (struct joiner *)(void *)self;
	PyObject *result = NULL;
	Py_buffer buffer;

	if (!is_usable(j) || PyObject_GetBuffer(entries, &buffer, PyBUF_C_CONTIGUOUS))
		return NULL;
	if (buffer.itemsize != 4)
		PyErr_SetString(PyExc_IndexError, "not numbers of 4 bytes");
	else
		result = rows_take(j, buffer.buf, (size_t)buffer.len / 4);
	PyBuffer_Release(&buffer);
	return result;
}

static PyObject *joiner_measured(PyObject *self, PyObject *Py_UNUSED(none))
{
	struct joiner *j = (struct joiner *)(void *)self;

	return is_usable(j) ? told_take(j) : NULL;
}

static PyObject *joiner_open(PyObject *self, PyObject *Py_UNUSED(none))
{
	struct joiner *j = (struct joiner *)(void *)self;

	return is_usable(j) ? open_columns(j) : NULL;
}

static PyObject *joiner_loose(PyObject *self, PyObject *Py_UNUSED(none))
{
	struct joiner *j = (struct joiner *)(void *)self;

	return is_usable(j) ? loose_columns(j) : NULL;
}

static PyMethodDef joiner_methods[] = {
	{ "forget", joiner_forget, METH_O, NULL },
	{ "begin", joiner_begin, METH_VARARGS, NULL },
	{ "add", joiner_add, METH_O, NULL },
	{ "end", joiner_end, METH_VARARGS, NULL },
	{ "windows", joiner_windows, METH_O, NULL },
	{ "rows", joiner_rows, METH_O, NULL },
	{ "measured", joiner_measured, METH_NOARGS, NULL },
	{ "open", joiner_open, METH_NOARGS, NULL },
	{ "loose", joiner_loose, METH_NOARGS, NULL },
	{ "restore", joiner_restore, METH_O, NULL },
	{ "loosen", joiner_loosen, METH_VARARGS, NULL },
	{ 0 },
};

static PyType_Slot joiner_slots[] = {
	{ Py_tp_new, (void *)joiner_new },	     { Py_tp_dealloc, (void *)joiner_dealloc },
	{ Py_tp_traverse, (void *)joiner_traverse }, { Py_tp_clear, (void *)joiner_clear },
	{ Py_tp_methods, (void *)joiner_methods },   { 0 },
};

static PyType_Spec joiner_spec = {
	.name = "correlator.compiled.joiner.Joiner",
	.basicsize = sizeof(struct joiner),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.slots = joiner_slots,
};

static int module_exec(PyObject *module)
{
	/* Python's hashes of bytes are seeded at random in each process (PYTHONHASHSEED). */
	PyObject *text = PyBytes_FromString("kernel buffers");
	PyObject *type = PyType_FromSpec(&joiner_spec);
	Py_hash_t seed = text ? PyObject_Hash(text) : -1;
	int status = -1;

	if (seed != -1 && type)
		status = PyModule_AddObjectRef(module, "Joiner", type);
	hash_seed = (uint64_t)seed * GOLDEN;
	Py_XDECREF(text);
	Py_XDECREF(type);
	return status;
}

static PyModuleDef_Slot module_slots[] = {
	{ Py_mod_exec, (void *)module_exec },
	{ 0 },
};

static struct PyModuleDef module = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "correlator.compiled.joiner",
	.m_slots = module_slots,
};

PyMODINIT_FUNC PyInit_joiner(void);

PyMODINIT_FUNC PyInit_joiner(void)
{
	return PyModuleDef_Init(&module);
}
