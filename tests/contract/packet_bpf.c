/* bpf/mace_packet.h in user space, for test_packet_bpf.py: puts an Ethernet frame into a buffer and reads it. */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FRAME_MAX 16384

/* A buffer: the kernel's struct has no meaning here. */
struct sk_buff {
	const uint8_t *bytes;
	int len;
	int linear;
};

static const uint8_t *readable, *readable_end;
/* Whether the kernel can load bytes in place. */
int direct;
/* Whether the kernel can read a buffer's pages. */
int paged;
/* Whether the program that reads may use that. */
int pages = 1;
/* Number of reads outside the buffer's linear part. */
int violations;
/* After that many reads another program interrupts the one that reads, and reads @interrupting. */
int reads_until_interrupt;
static struct sk_buff interrupting;

static void interrupt(void);

static bool is_readable(const void *from, uint32_t len)
{
	if (reads_until_interrupt && !--reads_until_interrupt)
		interrupt();
	if ((const uint8_t *)from >= readable && (const uint8_t *)from + len <= readable_end)
		return true;
	violations++;
	return false;
}

static long bpf_probe_read_kernel(void *to, uint32_t len, const void *from)
{
	if (!is_readable(from, len))
		return -1;
	memcpy(to, from, len);
	return 0;
}

#include "mace_packet.h"

static bool mace_is_direct(void)
{
	return direct;
}

static const void *mace_in_place(u64 at, u32 len)
{
	static const u8 nothing[FRAME_MAX];

	return is_readable((const void *)at, len) ? (const void *)at : nothing;
}

static bool mace_is_paged_readable(void)
{
	return paged;
}

static long mace_copy_paged(const struct sk_buff *frame, int offset, void *to)
{

	if (reads_until_interrupt && !--reads_until_interrupt)
		interrupt();
	if (offset < 0 || offset + MACE_PAYLOAD_BYTES > frame->len)
		return -1;
	memcpy(to, frame->bytes + offset, MACE_PAYLOAD_BYTES);
	return 0;
}

static void set_buffer(const struct sk_buff *frame, u8 *head, struct mace_buffer *buffer,
		       struct mace_record *record)
{
	memset(head, 0xee, FRAME_MAX);
	memcpy(head, frame->bytes, frame->len);
	*buffer = (struct mace_buffer){
		.skb = frame,
		.data = (u64)head,
		.len = frame->len,
		.in_place = frame->linear < frame->len - MACE_ETH_HLEN ? MACE_ETH_HLEN + frame->linear : frame->len,
		.offset = MACE_ETH_HLEN,
		.tci = -1,
		.protocol = frame->bytes[12] << 8 | frame->bytes[13],
		.pages = pages,
	};
	readable = head;
	readable_end = head + buffer->in_place;
	memset(record, 0, sizeof(*record));
	if (mace_is_vlan(buffer->protocol) && !mace_find_vlan(buffer))
		buffer->in_place = 0;
	if (buffer->tci >= 0) {
		record->vlan = buffer->tci;
		record->flags = MACE_FLAG_VLAN;
	}
	record->l3_len = buffer->len - buffer->offset;
}

/* What the CPU has seen; each frame is in the same buffer. */
static struct mace_seen seen;
static u64 now;

/* Read a frame as a program does, at @head. Return: whether it was recognised. */
static bool see(struct sk_buff frame, u8 *head, struct mace_record *record)
{
	struct mace_fields fields;
	struct mace_buffer buffer;
	bool recognised;

	set_buffer(&frame, head, &buffer, record);
	recognised = mace_recall(&buffer, &seen, &fields);
	if (!recognised)
		mace_read_anew(&buffer, &seen, &fields, 0, ++now);
	mace_set_record(&fields, record);
	return recognised;
}

static void interrupt(void)
{
	static u8 head[FRAME_MAX];
	const uint8_t *interrupted = readable, *interrupted_end = readable_end;
	struct mace_record record;

	see(interrupting, head, &record);
	readable = interrupted;
	readable_end = interrupted_end;
}

void forget(void)
{
	memset(&seen, 0, sizeof(seen));
}

void interrupt_with(const u8 *bytes, int len, int reads)
{
	interrupting = (struct sk_buff){ .bytes = bytes, .len = len, .linear = len };
	reads_until_interrupt = reads;
}

/*
 * Read a frame into @record, and remember it. The linear part holds the Ethernet header and @linear
 * bytes behind it. Return: whether the frame was recognised.
 */
int read_frame(const u8 *bytes, int len, int linear, struct mace_record *record)
{
	struct sk_buff frame = { .bytes = bytes, .len = len, .linear = linear };
	static u8 head[FRAME_MAX];

	return see(frame, head, record);
}

u64 hash_of_skb(u64 skb, u64 key0, u64 key1)
{
	return mace_hash_of_skb(skb, key0, key1);
}
