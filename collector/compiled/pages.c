// SPDX-License-Identifier: Apache-2.0
/*
 * Pages of the kernel's trace ring, event by event, into columns of records.
 *
 * collector/pages/decoding.py says what a page holds. Nothing on a page is trusted: the walk never
 * leaves the bytes that the page says it uses, and those lie within the page; a field is read only
 * once the event is known to be long enough for its format.
 */
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "loops.h"
#include "names.h"

#define COMMIT_BYTES 0x3fffffffu /* the other two bits are about lost events */

/* enum ring_buffer_type (include/linux/ring_buffer.h); types 1 to 28 are lengths in words */
#define TYPE_LONG 0
#define TYPE_DATA_MAX 28
#define TYPE_PADDING 29
#define TYPE_TIME_EXTEND 30
#define TYPE_TIME_STAMP 31

#define DELTA_BITS 27
#define STAMP_BITS 59 /* 32 + 27 (ABS_TS_MASK in kernel/trace/ring_buffer.c) */

#define NAME_MAX_BYTES 16 /* IFNAMSIZ (include/uapi/linux/if.h), with the final NUL */
#define HOOKS 256 /* values of `hook_of_id`, and so formats */
#define IDS 65536 /* values of common_type, an unsigned short */

enum fault {
	FAULT_NONE,
	FAULT_USED,
	FAULT_OVER,
	FAULT_LENGTH,
	FAULT_SHORT,
	FAULT_NAME,
	FAULT_ROOM,
	FAULT_MEMORY,
};

static const char *const faults[] = {
	[FAULT_USED] = "holds no such number of bytes",
	[FAULT_OVER] = "has an event that reaches over its end",
	[FAULT_LENGTH] = "has an event of no valid length",
	[FAULT_SHORT] = "has an event that is shorter than its format",
	[FAULT_NAME] = "has a device name of more than 16 bytes or outside its event",
};

/* An integer field of at most 4 bytes: the word of the event that contains it, or -1 for none. */
struct value {
	int32_t word;
	uint32_t shift;
	uint32_t mask;
};

/* Where the fields of one hook's events are; FORMAT in collector/pages/decoding.py. */
struct format {
	int32_t skb; /* word of the buffer's address */
	int32_t name; /* word of the name's place (__data_loc), or -1 */
	int32_t len; /* word, or -1 */
	uint32_t size; /* bytes that an event has at least, up to the end of its last used field */
	uint32_t header; /* bytes of link-layer header in `len`, unless `network_offset` says */
	struct value network_offset;
	struct value gso_segs;
	struct value reason;
};

struct stretch {
	int64_t cpu;
	int64_t pages;
	int64_t skip; /* bytes of the first page's data that were decoded before */
};

struct layout {
	Py_ssize_t page_size;
	Py_ssize_t timestamp;
	Py_ssize_t commit;
	Py_ssize_t data;
};

/* The pages of a call, and how far they have been walked. */
struct pages {
	Py_buffer buffer;
	Py_buffer stretches;
	Py_buffer first; /* index of each page's first event, and the number of events */
	struct layout layout;
	Py_ssize_t count;
	int64_t cpu; /* of the page being read */
};

struct event {
	const uint8_t *payload;
	uint32_t size; /* bytes of the payload, whole words */
	uint64_t ts_ns;
};

struct walk {
	const uint8_t *at;
	const uint8_t *end;
	const uint8_t *from; /* events before this were decoded before */
	uint64_t page_ns;
	uint64_t now_ns;
	enum fault fault;
};

static uint32_t load32(const uint8_t *at)
{
	uint32_t word;

	memcpy(&word, at, sizeof(word));
	return word;
}

static uint64_t load64(const uint8_t *at)
{
	uint64_t words;

	memcpy(&words, at, sizeof(words));
	return words;
}

/* --- the walk --------------------------------------------------------------------- */

static void walk_begin(struct walk *walk, const struct layout *layout, const uint8_t *page,
		       int64_t skip)
{
	const uint32_t used = load32(page + layout->commit) & COMMIT_BYTES;

	walk->page_ns = load64(page + layout->timestamp);
	walk->now_ns = walk->page_ns;
	walk->at = page + layout->data;
	walk->end = walk->at;
	walk->from = walk->at + skip;
	walk->fault = FAULT_NONE;
	if (used > (size_t)(layout->page_size - layout->data) || used % 4)
		walk->fault = FAULT_USED;
	else
		walk->end += used;
}

/* Set the time to that of a time stamp, whose upper bits are the page's (rb_fix_abs_ts). */
static void walk_stamp(struct walk *walk, uint64_t stamp_ns)
{
	walk->now_ns = stamp_ns | (walk->page_ns >> STAMP_BITS << STAMP_BITS);
	if (walk->now_ns < walk->page_ns && walk->page_ns >> STAMP_BITS)
		walk->now_ns += 1ull << STAMP_BITS;
}

static bool walk_stops(struct walk *walk, enum fault fault)
{
	walk->fault = fault;
	return false;
}

/*
 * Find the next event with data; return false at the page's end, and with `fault` set.
 *
 * Padding in the midst of a page is an event that was discarded: its time counts.
 */
static bool walk_next(struct walk *walk, struct event *event)
{
	while (walk->at < walk->end) {
		const uint8_t *const header = walk->at;
		const uint32_t left = (uint32_t)(walk->end - header); /* at least a word */
		const uint32_t head = load32(header);
		const uint32_t type = head & 31;
		const uint32_t delta = head >> 5;
		uint32_t length;

		if (type == TYPE_PADDING && !delta)
			return false;
		if (type != TYPE_LONG && type <= TYPE_DATA_MAX) {
			length = 4 * type;
			if (length > left - 4)
				return walk_stops(walk, FAULT_OVER);
			walk->at += 4 + length;
			walk->now_ns += delta;
			*event = (struct event){ header + 4, length, walk->now_ns };
		} else if (type >= TYPE_TIME_EXTEND) {
			if (left < 8)
				return walk_stops(walk, FAULT_OVER);
			walk->at += 8;
			if (type == TYPE_TIME_EXTEND)
				walk->now_ns += delta | (uint64_t)load32(header + 4) << DELTA_BITS;
			else
				walk_stamp(walk, delta | (uint64_t)load32(header + 4)
								 << DELTA_BITS);
			continue;
		} else {
			length = left < 8 ? 0 : load32(header + 4);
			if (length < 4 || length % 4 || length > left - 4)
				return walk_stops(walk, FAULT_LENGTH);
			walk->at += 4 + length;
			walk->now_ns += delta;
			if (type == TYPE_PADDING)
				continue;
			*event = (struct event){ header + 8, length - 4, walk->now_ns };
		}
		if (header >= walk->from)
			return true;
	}
	return false;
}

/* What is done with the events of a page: the first member of a struct that has its results. */
struct reader {
	enum fault (*read_page)(struct reader *reader, struct walk *walk);
	size_t events; /* so far */
};

static enum fault read_pages(struct pages *pages, struct reader *reader)
{
	const struct stretch *stretch = pages->stretches.buf;
	const struct stretch *const end =
		stretch + pages->stretches.len / (Py_ssize_t)sizeof(*stretch);
	const uint8_t *page = pages->buffer.buf;
	int64_t *first = pages->first.buf;

	for (; stretch < end; stretch++) {
		pages->cpu = stretch->cpu;
		for (int64_t i = 0; i < stretch->pages; i++) {
			struct walk walk;
			enum fault fault;

			*first++ = (int64_t)reader->events;
			walk_begin(&walk, &pages->layout, page, i ? 0 : stretch->skip);
			fault = walk.fault ? walk.fault : reader->read_page(reader, &walk);
			if (fault)
				return fault;
			page += pages->layout.page_size;
		}
	}
	*first = (int64_t)reader->events;
	return FAULT_NONE;
}

/* --- arguments -------------------------------------------------------------------- */

static bool layout_is_valid(const struct layout *layout)
{
	const Py_ssize_t size = layout->page_size;

	return size >= 8 && layout->timestamp >= 0 && layout->timestamp <= size - 8 &&
	       layout->commit >= 0 && layout->commit <= size - 4 && layout->data >= 0 &&
	       layout->data <= size;
}

/* Check the stretches, and count their pages; return 0, or -1 with an exception set. */
static int pages_check(struct pages *pages)
{
	const struct stretch *const stretches = pages->stretches.buf;
	const Py_ssize_t count = pages->stretches.len / (Py_ssize_t)sizeof(*stretches);
	const struct layout *const layout = &pages->layout;
	Py_ssize_t room;

	if (!layout_is_valid(layout) || pages->stretches.len % (Py_ssize_t)sizeof(*stretches)) {
		PyErr_SetString(PyExc_IndexError, "no such layout of pages");
		return -1;
	}
	room = pages->buffer.len / layout->page_size;
	for (Py_ssize_t i = 0; i < count; i++) {
		const struct stretch *const stretch = &stretches[i];

		if (stretch->pages < 0 || stretch->pages > room - pages->count ||
		    stretch->skip < 0 || stretch->skip > layout->page_size - layout->data ||
		    stretch->cpu < 0 || stretch->cpu > UINT16_MAX) {
			PyErr_SetString(PyExc_IndexError, "a stretch outside the buffer");
			return -1;
		}
		pages->count += (Py_ssize_t)stretch->pages;
	}
	if (pages->first.len != (pages->count + 1) * 8) {
		PyErr_SetString(PyExc_IndexError, "first: expected one more than pages");
		return -1;
	}
	return 0;
}

static void pages_release(struct pages *pages)
{
	PyBuffer_Release(&pages->buffer);
	PyBuffer_Release(&pages->stretches);
	PyBuffer_Release(&pages->first);
}

/* Raise the fault of the page at which reading stopped. */
static void raise_fault(const struct pages *pages, enum fault fault)
{
	const struct layout *const layout = &pages->layout;

	if (fault == FAULT_MEMORY)
		PyErr_NoMemory();
	else if (fault == FAULT_ROOM)
		PyErr_SetString(PyExc_IndexError, "columns without room for all events");
	else
		PyErr_Format(PyExc_ValueError,
			     "ring of CPU %d: a page %s; expected up to %zd bytes of whole events "
			     "in the format that the kernel describes",
			     (int)pages->cpu, faults[fault], layout->page_size - layout->data);
}

/* --- locate ----------------------------------------------------------------------- */

struct locating {
	struct reader reader;
	const uint8_t *buffer;
	int64_t *at;
	int64_t *ts_ns;
	uint32_t *size;
	size_t room;
};

static enum fault locate_page(struct reader *reader, struct walk *walk)
{
	struct locating *const to = (struct locating *)reader;
	struct event event;

	while (walk_next(walk, &event)) {
		if (reader->events == to->room)
			return FAULT_ROOM;
		to->at[reader->events] = (event.payload - to->buffer) / 4;
		to->ts_ns[reader->events] = (int64_t)event.ts_ns;
		to->size[reader->events] = event.size;
		reader->events++;
	}
	return walk->fault;
}

PyObject *loops_locate(PyObject *Py_UNUSED(module), PyObject *args)
{
	struct pages pages = { 0 };
	struct layout *const layout = &pages.layout;
	struct locating to = { .reader = { .read_page = locate_page } };
	Py_buffer at, ts_ns, size;
	PyObject *result = NULL;
	PyThreadState *thread;
	enum fault fault;

	if (!PyArg_ParseTuple(args, "y*(nnnn)y*w*(w*w*w*):locate", &pages.buffer,
			      &layout->page_size, &layout->timestamp, &layout->commit,
			      &layout->data, &pages.stretches, &pages.first, &at, &ts_ns, &size))
		return NULL;
	if (pages_check(&pages))
		goto out;
	if (ts_ns.len != at.len || size.len != at.len / 2) {
		PyErr_SetString(PyExc_IndexError, "columns of different lengths");
		goto out;
	}
	to.buffer = pages.buffer.buf;
	to.at = at.buf;
	to.ts_ns = ts_ns.buf;
	to.size = size.buf;
	to.room = (size_t)at.len / sizeof(*to.at);
	thread = PyEval_SaveThread();
	fault = read_pages(&pages, &to.reader);
	PyEval_RestoreThread(thread);
	if (fault)
		raise_fault(&pages, fault);
	else
		result = PyLong_FromSize_t(to.reader.events);
out:
	pages_release(&pages);
	PyBuffer_Release(&at);
	PyBuffer_Release(&ts_ns);
	PyBuffer_Release(&size);
	return result;
}

/* --- decode ----------------------------------------------------------------------- */

struct columns {
	Py_buffer ts_ns;
	Py_buffer skb_id;
	Py_buffer dev;
	Py_buffer l3_len;
	Py_buffer cpu;
	Py_buffer drop_reason;
	Py_buffer gso_segs;
	Py_buffer hook;
};

struct decoding {
	struct reader reader;
	const struct pages *pages;
	const uint8_t *hook_of_id;
	const struct format *formats;
	uint64_t key[3];
	struct columns columns;
	struct names names;
	size_t room;
	size_t skipped;
};

static uint32_t value_of(const struct value *value, const uint8_t *payload)
{
	return load32(payload + 4 * value->word) >> value->shift & value->mask;
}

/* A bijection on 64 bits, so that no two buffers share an id: PageDecoder.skb_ids. */
static uint64_t id_of(const uint64_t key[3], uint64_t address)
{
	address ^= key[0];
	address *= key[1];
	address ^= address >> 32;
	address *= key[2];
	return address ^ address >> 32;
}

/* Return the length without the link-layer header. */
static uint32_t l3_len_of(const struct format *format, const uint8_t *payload)
{
	const uint32_t length = format->len < 0 ? 0 : load32(payload + 4 * format->len);
	uint32_t header = format->header;

	if (format->network_offset.word >= 0) {
		const int32_t offset = (int32_t)value_of(&format->network_offset, payload);

		if (offset > 0)
			header = (uint32_t)offset;
	}
	return header < length ? length - header : 0;
}

/*
 * Read the device's name, or an empty one for a hook without a device; return whether it is valid.
 *
 * The name's last 8 letters are loaded as one word that ends with them: what lies before them is the
 * event's too, but the event may end right behind them.
 */
static bool name_of(const struct format *format, const struct event *event, struct name *name)
{
	uint32_t place, offset, length, letters;
	const uint8_t *text;

	*name = (struct name){ 0 };
	if (format->name < 0)
		return true;
	place = load32(event->payload + 4 * format->name);
	offset = place & 0xffff;
	length = place >> 16;
	if (length > NAME_MAX_BYTES || offset + length > event->size)
		return false;
	text = event->payload + offset;
	letters = length ? length - 1 : 0; /* without the final NUL */
	if (letters > 8) {
		name->low = load64(text);
		name->high = load64(text + letters - 8) >> 8 * (16 - letters);
	} else if (letters && offset + letters >= 8) {
		name->low = load64(text + letters - 8) >> 8 * (8 - letters);
	} else {
		memcpy(&name->low, text, letters);
	}
	return true;
}

static enum fault decode_event(struct decoding *to, const struct event *event, uint8_t hook)
{
	const struct format *const format = &to->formats[hook];
	const uint8_t *const payload = event->payload;
	const size_t at = to->reader.events;
	struct name name;
	uint32_t dev;

	if (event->size < format->size)
		return FAULT_SHORT;
	if (!name_of(format, event, &name))
		return FAULT_NAME;
	if (at == to->room)
		return FAULT_ROOM;
	dev = names_index(&to->names, name);
	if (dev == NAMES_FULL)
		return FAULT_MEMORY;
	((int64_t *)to->columns.ts_ns.buf)[at] = (int64_t)event->ts_ns;
	((uint64_t *)to->columns.skb_id.buf)[at] =
		id_of(to->key, load64(payload + 4 * format->skb));
	((uint32_t *)to->columns.dev.buf)[at] = dev;
	((uint32_t *)to->columns.l3_len.buf)[at] = l3_len_of(format, payload);
	((uint16_t *)to->columns.cpu.buf)[at] = (uint16_t)to->pages->cpu;
	((uint16_t *)to->columns.drop_reason.buf)[at] =
		format->reason.word < 0 ? 0 : (uint16_t)value_of(&format->reason, payload);
	((uint16_t *)to->columns.gso_segs.buf)[at] =
		format->gso_segs.word < 0 ? 0 : (uint16_t)value_of(&format->gso_segs, payload);
	((uint8_t *)to->columns.hook.buf)[at] = hook;
	to->reader.events++;
	return FAULT_NONE;
}

static enum fault decode_page(struct reader *reader, struct walk *walk)
{
	struct decoding *const to = (struct decoding *)reader;
	struct event event;

	while (walk_next(walk, &event)) {
		/* An event without data has no id, and so no hook. */
		const uint16_t id = event.size ? (uint16_t)load32(event.payload) : 0;
		const uint8_t hook = event.size ? to->hook_of_id[id] : 0;
		enum fault fault;

		if (!hook) {
			to->skipped++;
			continue;
		}
		fault = decode_event(to, &event, hook);
		if (fault)
			return fault;
	}
	return walk->fault;
}

/* Events are whole words, so that an event of `size` bytes has each word that begins before `size`. */
static bool word_is_inside(int32_t word, uint32_t words, uint32_t size)
{
	return word < 0 || (uint32_t)word + words <= size / 4 + (size % 4 != 0);
}

static bool format_is_valid(const struct format *format)
{
	const uint32_t size = format->size;

	return size <= INT32_MAX && format->skb >= 0 && word_is_inside(format->skb, 2, size) &&
	       word_is_inside(format->name, 1, size) && word_is_inside(format->len, 1, size) &&
	       word_is_inside(format->network_offset.word, 1, size) &&
	       word_is_inside(format->gso_segs.word, 1, size) &&
	       word_is_inside(format->reason.word, 1, size) && format->network_offset.shift < 32 &&
	       format->gso_segs.shift < 32 && format->reason.shift < 32;
}

/* Check that no table leads outside an event; return 0, or -1 with an exception set. */
static int tables_check(const Py_buffer *hook_of_id, const Py_buffer *formats)
{
	const struct format *const format = formats->buf;

	if (hook_of_id->len != IDS || formats->len != HOOKS * (Py_ssize_t)sizeof(*format)) {
		PyErr_SetString(PyExc_IndexError, "tables of other sizes");
		return -1;
	}
	for (int hook = 0; hook < HOOKS; hook++) {
		if (!format_is_valid(&format[hook])) {
			PyErr_SetString(PyExc_IndexError, "a field outside its event");
			return -1;
		}
	}
	return 0;
}

/* Find the room of the columns; return 0, or -1 with an exception set. */
static int columns_check(struct decoding *to)
{
	const struct columns *const columns = &to->columns;
	const Py_ssize_t room = columns->hook.len;

	if (columns->ts_ns.len != 8 * room || columns->skb_id.len != 8 * room ||
	    columns->dev.len != 4 * room || columns->l3_len.len != 4 * room ||
	    columns->cpu.len != 2 * room || columns->drop_reason.len != 2 * room ||
	    columns->gso_segs.len != 2 * room) {
		PyErr_SetString(PyExc_IndexError, "columns of different lengths");
		return -1;
	}
	to->room = (size_t)room;
	return 0;
}

static void columns_release(struct columns *columns)
{
	PyBuffer_Release(&columns->ts_ns);
	PyBuffer_Release(&columns->skb_id);
	PyBuffer_Release(&columns->dev);
	PyBuffer_Release(&columns->l3_len);
	PyBuffer_Release(&columns->cpu);
	PyBuffer_Release(&columns->drop_reason);
	PyBuffer_Release(&columns->gso_segs);
	PyBuffer_Release(&columns->hook);
}

static PyObject *decoded(const struct decoding *to)
{
	return Py_BuildValue("(nny#)", (Py_ssize_t)to->reader.events, (Py_ssize_t)to->skipped,
			     (const char *)to->names.names,
			     to->names.count * (Py_ssize_t)sizeof(struct name));
}

PyObject *loops_decode(PyObject *Py_UNUSED(module), PyObject *args)
{
	struct pages pages = { 0 };
	struct layout *const layout = &pages.layout;
	struct decoding to = { .reader = { .read_page = decode_page }, .pages = &pages };
	struct columns *const columns = &to.columns;
	unsigned long long key[3];
	Py_buffer hook_of_id, formats;
	PyObject *result = NULL;
	PyThreadState *thread;
	enum fault fault;

	if (!PyArg_ParseTuple(args, "y*(nnnn)y*w*y*y*(KKK)(w*w*w*w*w*w*w*w*):decode", &pages.buffer,
			      &layout->page_size, &layout->timestamp, &layout->commit,
			      &layout->data, &pages.stretches, &pages.first, &hook_of_id, &formats,
			      &key[0], &key[1], &key[2], &columns->ts_ns, &columns->skb_id,
			      &columns->dev, &columns->l3_len, &columns->cpu, &columns->drop_reason,
			      &columns->gso_segs, &columns->hook))
		return NULL;
	if (pages_check(&pages) || tables_check(&hook_of_id, &formats) || columns_check(&to))
		goto out;
	to.hook_of_id = hook_of_id.buf;
	to.formats = formats.buf;
	for (int i = 0; i < 3; i++)
		to.key[i] = key[i];
	thread = PyEval_SaveThread();
	fault = names_init(&to.names) ? FAULT_MEMORY : read_pages(&pages, &to.reader);
	PyEval_RestoreThread(thread);
	if (fault)
		raise_fault(&pages, fault);
	else
		result = decoded(&to);
	names_deinit(&to.names);
out:
	pages_release(&pages);
	PyBuffer_Release(&hook_of_id);
	PyBuffer_Release(&formats);
	columns_release(columns);
	return result;
}
