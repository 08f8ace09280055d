// SPDX-License-Identifier: Apache-2.0
/* Open windows of a second: a window has its sums, and a cell for each bin that occurs (correlator/windows.py). */
#include <stdlib.h>
#include <string.h>

#include "joiner.h"

#define FIRST_CELLS 256
#define FIRST_WINDOWS 64

int windows_init(struct joiner *j)
{
	j->cells = calloc(FIRST_CELLS, sizeof(*j->cells));
	j->cell_mask = FIRST_CELLS - 1;
	j->window_slots = calloc(FIRST_WINDOWS, sizeof(*j->window_slots));
	j->window_mask = FIRST_WINDOWS - 1;
	return j->cells && j->window_slots ? 0 : -1;
}

/* --- windows ------------------------------------------------------------------------------------------------ */

static uint32_t find_window(const struct joiner *j, int64_t start, uint32_t code)
{
	uint32_t at = hashed(j, (uint64_t)start + (uint64_t)code * GOLDEN) & j->window_mask;
	uint32_t found;

	while ((found = j->window_slots[at])) {
		const struct window *window = &j->windows[found - 1];

		if (window->start == start && window->code == code)
			break;
		at = (at + 1) & j->window_mask;
	}
	return at;
}

static void number_windows(struct joiner *j)
{
	memset(j->window_slots, 0, ((size_t)j->window_mask + 1) * sizeof(*j->window_slots));
	for (uint32_t i = 0; i < j->window_count; i++)
		j->window_slots[find_window(j, j->windows[i].start, j->windows[i].code)] = i + 1;
}

/* Point the row of a shape to the window of a time; return 0 or -1. */
int window_of(struct joiner *j, struct shape_row *row, int64_t utc)
{
	const int64_t within = utc % SECOND_NS;
	const int64_t start = minus(utc, within < 0 ? within + SECOND_NS : within);
	const uint32_t code = row->entry << 5 | (uint32_t)row->direction << 3 | row->segment;
	uint32_t at = find_window(j, start, code);

	if (!j->window_slots[at]) {
		if (j->window_count >= (j->window_mask + 1) / 2) {
			const size_t size = 2 * ((size_t)j->window_mask + 1);
			uint32_t *slots;

			if (size > UINT32_MAX / 4)
				return -1;
			slots = calloc(size, sizeof(*slots));
			if (!slots)
				return -1;
			free(j->window_slots);
			j->window_slots = slots;
			j->window_mask = (uint32_t)(size - 1);
			number_windows(j);
			at = find_window(j, start, code);
		}
		if (GROW(j->windows, j->window_count, j->window_room, 1))
			return -1;
		j->windows[j->window_count] = (struct window){
			.start = start,
			.low = INT64_MAX,
			.high = INT64_MIN,
			.code = code,
		};
		j->window_slots[at] = ++j->window_count;
	}
	row->start = start;
	row->window = j->window_slots[at] - 1;
	return 0;
}

/* --- cells -------------------------------------------------------------------------------------------------- */

static int more_cells(struct joiner *j)
{
	const size_t size = (size_t)j->cell_mask + 1;
	struct cell *old = j->cells;
	struct cell *cells;

	if (size > UINT32_MAX / 4)
		return -1;
	cells = calloc(2 * size, sizeof(*cells));
	if (!cells)
		return -1;
	j->cells = cells;
	j->cell_mask = (uint32_t)(2 * size - 1);
	for (size_t i = 0; i < size; i++) {
		uint32_t at = hashed(j, old[i].key) & j->cell_mask;

		if (!old[i].key)
			continue;
		while (cells[at].key)
			at = (at + 1) & j->cell_mask;
		cells[at] = old[i];
	}
	free(old);
	return 0;
}

int cell_add(struct joiner *j, uint32_t window, uint32_t bin, int64_t count)
{
	const uint64_t key = ((uint64_t)window << BIN_BITS | bin) + 1;
	uint32_t at = hashed(j, key) & j->cell_mask;

	while (j->cells[at].key != key) {
		if (!j->cells[at].key) {
			if (j->cell_count >= (j->cell_mask + 1) / 2) {
				if (more_cells(j))
					return -1;
				return cell_add(j, window, bin, count);
			}
			j->cells[at].key = key;
			j->cell_count++;
			j->windows[window].cells++;
			break;
		}
		at = (at + 1) & j->cell_mask;
	}
	j->cells[at].count += count;
	return 0;
}

/* --- closing ------------------------------------------------------------------------------------------------ */

static int by_start(const void *a, const void *b)
{
	const struct window *one = a, *other = b;

	if (one->start != other->start)
		return one->start < other->start ? -1 : 1;
	return one->code < other->code ? -1 : one->code > other->code;
}

/* What closing needs beside the tables. */
struct closing {
	struct window *ready; /* windows to return, in order */
	uint32_t
		*to; /* of each window: its place in `ready` or, with KEPT, among those that stay */
	size_t *begins; /* of each ready window: its first cell */
	struct cell *cells; /* those of ready windows, by window; keys are bins */
	struct cell *kept;
	uint32_t ready_count;
	size_t cell_count, kept_count;
};

#define KEPT 0x80000000u

static bool is_ready(const struct window *window, int64_t before, bool all)
{
	return all || (before >= INT64_MIN + SECOND_NS && window->start <= before - SECOND_NS);
}

static int allocate(struct joiner *j, struct closing *c)
{
	c->ready = calloc((size_t)j->window_count + 1, sizeof(*c->ready));
	c->to = calloc((size_t)j->window_count + 1, sizeof(*c->to));
	c->begins = calloc((size_t)c->ready_count + 1, sizeof(*c->begins));
	c->cells = calloc(c->cell_count + 1, sizeof(*c->cells));
	c->kept = calloc(c->kept_count + 1, sizeof(*c->kept));
	return c->ready && c->to && c->begins && c->cells && c->kept ? 0 : -1;
}

static void release(struct closing *c)
{
	free(c->ready);
	free(c->to);
	free(c->begins);
	free(c->cells);
	free(c->kept);
}

/* Divide windows and cells into those that are returned and those that stay. */
static void divide(struct joiner *j, struct closing *c, int64_t before, bool all)
{
	uint32_t ready = 0, kept = 0;
	size_t at = 0;

	for (uint32_t i = 0; i < j->window_count; i++) {
		if (is_ready(&j->windows[i], before, all)) {
			c->ready[ready] = j->windows[i];
			c->ready[ready++].count =
				i; /* its number, until the windows are in order */
		}
	}
	qsort(c->ready, ready, sizeof(*c->ready), by_start);
	for (uint32_t i = 0; i < ready; i++) {
		const uint32_t number = (uint32_t)c->ready[i].count;

		c->ready[i].count = j->windows[number].count;
		c->to[number] = i;
		c->begins[i] = at;
		at += c->ready[i].cells;
	}
	for (uint32_t i = 0; i < j->window_count; i++) {
		if (!is_ready(&j->windows[i], before, all)) {
			c->to[i] = kept | KEPT;
			j->windows[kept++] = j->windows[i];
		}
	}
	c->kept_count = 0;
	for (size_t i = 0; i <= j->cell_mask; i++) {
		struct cell cell = j->cells[i];
		uint32_t to;

		if (!cell.key)
			continue;
		to = c->to[(cell.key - 1) >> BIN_BITS];
		cell.key = (cell.key - 1) & ((1u << BIN_BITS) - 1);
		if (to & KEPT) {
			cell.key |= (uint64_t)(to & ~KEPT) << BIN_BITS;
			c->kept[c->kept_count++] = cell;
		} else {
			c->cells[c->begins[to]++] = cell;
		}
		j->cells[i] = (struct cell){ 0 };
	}
	j->window_count = kept;
	j->cell_count = (uint32_t)c->kept_count;
	for (size_t i = 0; i < c->kept_count; i++) {
		const uint64_t key = c->kept[i].key + 1;
		uint32_t at_cell = hashed(j, key) & j->cell_mask;

		while (j->cells[at_cell].key)
			at_cell = (at_cell + 1) & j->cell_mask;
		j->cells[at_cell] = (struct cell){ key, c->kept[i].count };
	}
	number_windows(j);
	for (uint32_t i = 0; i < j->shape_row_count; i++)
		j->shape_rows[i].window = NONE;
}

/* Fill the tables of `_Pending` in correlator/windows.py. */
static void fill(const struct closing *c, int64_t *windows, int64_t *cells)
{
	static const size_t rows = 6;
	const size_t count = c->ready_count, total = c->cell_count;
	int64_t of_bin[BINS] = { 0 };
	size_t first = 0, to = 0;

	for (size_t i = 0; i < count; i++) {
		const struct window *window = &c->ready[i];
		const int64_t column[] = { window->start, window->code, window->count,
					   window->sum,	  window->low,	window->high };
		size_t low = BINS, high = 0;

		for (size_t row = 0; row < rows; row++)
			windows[row * count + i] = column[row];
		for (; first < c->begins[i]; first++) {
			const size_t bin = c->cells[first].key;

			of_bin[bin] = c->cells[first].count;
			low = bin < low ? bin : low;
			high = bin > high ? bin : high;
		}
		for (size_t bin = low; bin <= high && bin < BINS; bin++) {
			if (!of_bin[bin])
				continue;
			cells[to] = window->start;
			cells[total + to] = window->code;
			cells[2 * total + to] = (int64_t)bin;
			cells[3 * total + to++] = of_bin[bin];
			of_bin[bin] = 0;
		}
	}
}

/* Return the windows that end at or before a time, or all, and forget them. */
PyObject *windows_take(struct joiner *j, int64_t before, bool all)
{
	struct closing c = { 0 };
	PyObject *windows, *cells, *result = NULL;
	size_t ready_cells = 0;

	for (uint32_t i = 0; i < j->window_count; i++) {
		if (is_ready(&j->windows[i], before, all)) {
			c.ready_count++;
			ready_cells += j->windows[i].cells;
		}
	}
	c.cell_count = ready_cells;
	c.kept_count = j->cell_count - ready_cells;
	windows = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(6 * 8 * (size_t)c.ready_count));
	cells = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(4 * 8 * c.cell_count));
	if (!windows || !cells)
		goto out;
	if (c.ready_count) {
		if (allocate(j, &c)) {
			PyErr_NoMemory();
			goto out;
		}
		divide(j, &c, before, all);
		fill(&c, (int64_t *)(void *)PyByteArray_AsString(windows),
		     (int64_t *)(void *)PyByteArray_AsString(cells));
	}
	result = PyTuple_Pack(2, windows, cells);
out:
	Py_XDECREF(windows);
	Py_XDECREF(cells);
	release(&c);
	return result;
}
