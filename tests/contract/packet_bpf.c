/* bpf/mace_packet.h in user space, for test_packet_bpf.py: puts an Ethernet frame into a buffer and reads it. */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FRAME_MAX 16384

static const uint8_t *readable, *readable_end;
/* Number of reads outside the buffer's linear part. */
int violations;

static long bpf_probe_read_kernel(void *to, uint32_t len, const void *from)
{
	const uint8_t *at = from;

	if (at < readable || at + len > readable_end) {
		violations++;
		return -1;
	}
	memcpy(to, at, len);
	return 0;
}

#include "mace_packet.h"

/* Read a frame into @record. The linear part holds the Ethernet header and @linear bytes behind it. */
void read_frame(const u8 *frame, int len, int linear, struct mace_record *record)
{
	static u8 head[FRAME_MAX];
	struct mace_words words;
	struct mace_buffer buffer = {
		.data = (u64)head,
		.len = len,
		.in_place = linear < len - MACE_ETH_HLEN ? MACE_ETH_HLEN + linear : len,
		.offset = MACE_ETH_HLEN,
		.tci = -1,
		.protocol = frame[12] << 8 | frame[13],
	};

	memset(head, 0xee, sizeof(head));
	memcpy(head, frame, len);
	readable = head;
	readable_end = head + buffer.in_place;
	memset(record, 0, sizeof(*record));
	if (mace_is_vlan(buffer.protocol) && !mace_find_vlan(&buffer))
		buffer.in_place = 0;
	if (buffer.tci >= 0) {
		record->vlan = buffer.tci;
		record->flags = MACE_FLAG_VLAN;
	}
	record->l3_len = buffer.len - buffer.offset;
	mace_read_buffer(&buffer, 0, record, &words);
	if (record->flags & MACE_FLAG_KEY)
		record->packet_key = mace_key(&words);
}

u64 hash_of_skb(u64 skb, u64 key0, u64 key1)
{
	return mace_hash_of_skb(skb, key0, key1);
}
