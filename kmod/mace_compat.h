/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The only place that knows of differences between kernels. Each names what changed; the rest of
 * the module reads as if there were only the newest.
 */
#ifndef _MACE_COMPAT_H
#define _MACE_COMPAT_H

#include <linux/mm.h>
#include <linux/skbuff.h>
#include <linux/version.h>

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
/* Linux kernel commit 5f60d5f6bbc1 ("move asm/unaligned.h to linux/unaligned.h") (in v6.12) */
#include <linux/unaligned.h>
#else
#include <asm/unaligned.h>
#endif

/*
 * Probes whose tracepoint has more arguments in newer kernels. Each macro begins the definition of
 * the probe @name with the argument @skb; MACE_DROP_REASON() is the reason, where there is one.
 */

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
/* Linux kernel commit dd1b527831a3 ("net: add location to trace_consume_skb()") (in v6.3) */
#define MACE_DEFINE_CONSUME_SKB(name, skb) \
	static void name(void *data, struct sk_buff *skb, void *location)
#else
#define MACE_DEFINE_CONSUME_SKB(name, skb) static void name(void *data, struct sk_buff *skb)
#endif

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
/*
 * Linux kernel commit c53795d48ee8 ("net: add rx_sk to trace_kfree_skb") (in v6.11). In 6.12 rx_sk
 * is no pointer to const, in 7.3 it is; Kbuild looks at the header.
 */
#ifndef MACE_RX_SK_CONST
#define MACE_RX_SK_CONST
#endif
#define MACE_DEFINE_KFREE_SKB(name, skb)                                  \
	static void name(void *data, struct sk_buff *skb, void *location, \
			 enum skb_drop_reason mace_reason, MACE_RX_SK_CONST struct sock *rx_sk)
#define MACE_DROP_REASON() ((u32)mace_reason)
#elif LINUX_VERSION_CODE >= KERNEL_VERSION(5, 17, 0)
/* Linux kernel commit c504e5c2f964 ("net: skb: introduce kfree_skb_reason()") (in v5.17) */
#define MACE_DEFINE_KFREE_SKB(name, skb)                                  \
	static void name(void *data, struct sk_buff *skb, void *location, \
			 enum skb_drop_reason mace_reason)
#define MACE_DROP_REASON() ((u32)mace_reason)
#else
#define MACE_DEFINE_KFREE_SKB(name, skb) \
	static void name(void *data, struct sk_buff *skb, void *location)
#define MACE_DROP_REASON() 0U
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
/* Linux kernel commit bc292ab00f6c ("mm: introduce vma->vm_flags wrapper functions") (in v6.3) */
static inline void vm_flags_mod(struct vm_area_struct *vma, unsigned long set, unsigned long clear)
{
	vma->vm_flags = (vma->vm_flags | set) & ~clear;
}
#endif

#endif
