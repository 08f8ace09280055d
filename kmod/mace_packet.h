/* SPDX-License-Identifier: GPL-2.0-only */
/* What can be told of a packet by reading it. */
#ifndef _MACE_PACKET_H
#define _MACE_PACKET_H

#include <linux/skbuff.h>

#include "uapi/mace.h"

#define MACE_VXLAN_PORTS_MAX 4

extern unsigned short mace_vxlan_ports[MACE_VXLAN_PORTS_MAX];
extern unsigned int mace_vxlan_port_count;

/*
 * Zeroes of a length that the compiler knows. It makes a "rep stos" of a memset() of more than 32
 * bytes, whose start costs more than these few stores.
 */
static __always_inline void mace_clear(void *memory, size_t bytes)
{
	u64 *words = memory;
	size_t i;

#pragma GCC unroll 8
	for (i = 0; i < bytes / sizeof(*words); i++)
		WRITE_ONCE(words[i], 0);
}

struct mace_record *mace_packet_read_device(const struct sk_buff *skb, int l3_offset);
struct mace_record *mace_packet_read_any(const struct sk_buff *skb);

#endif
