/* kmod/mace_packet.c in user space, for test_packet_module.py: an Ethernet frame in a buffer, and what is read of it. */
#include "kernel_in_user_space.h"

#include "mace_packet.c"

#define ROOM 64
#define BUFFERS 4
#define FRAME_MAX 16384

int prepare(void)
{
	mace_packet_init();
	return mace_packet_prepare(0);
}

/*
 * The record of a frame in one of a few buffers. Of what follows the Ethernet header @linear bytes are in the linear part,
 * the others in two pages. Whatever lies behind either is no part of the packet.
 */
void read_frame(const u8 *frame, int len, int linear, int which, struct mace_record *record)
{
	static u8 heads[BUFFERS][ROOM + FRAME_MAX], pages[BUFFERS][FRAME_MAX + ROOM];
	static struct sk_buff buffers[BUFFERS];
	static struct net_device device = { .hard_header_len = ETH_HLEN };
	int in_place = ETH_HLEN + min(linear, len - ETH_HLEN), rest = len - in_place;
	struct sk_buff *skb = &buffers[which];
	struct mace_read read;

	memset(heads[which], 0xee, sizeof(heads[which]));
	memset(pages[which], 0xdd, sizeof(pages[which]));
	memcpy(heads[which] + ROOM, frame, in_place);
	memcpy(pages[which], frame + in_place, rest);
	*skb = (struct sk_buff){
		.head = heads[which],
		.data = heads[which] + ROOM,
		.len = len,
		.data_len = rest,
		.network_header = ROOM + ETH_HLEN,
		.protocol = ((const struct ethhdr *)frame)->h_proto,
		.dev = &device,
		.shared = {
			.nr_frags = rest > 0 ? 2 : 0,
			.frags = { { pages[which], rest - rest / 3 },
				   { pages[which] + rest - rest / 3, rest / 3 } },
		},
	};
	read = mace_packet_read_device(skb, skb->data + ETH_HLEN);
	*record = *read.record;
	record->l3_len = read.l3_len;
}

/* Nothing was read before, and what is read from now on has no mark. */
void forget(void)
{
	struct mace_packet *packet;
	int i;

	for (i = 0; i < 1 << MACE_DATA_BITS; i++)
		for (packet = mace_packets->data[i].packets;
		     packet < mace_packets->data[i].packets + 2; packet++) {
			packet->protocol = MACE_PROTOCOL_NONE;
			packet->record.flags = 0;
			packet->record.drop_reason = 0;
		}
}

/* A mark on what was read last, which reading leaves alone: who has it was recognised, not read anew. */
void mark(void)
{
	mace_last_packet->record.drop_reason = 1;
}
