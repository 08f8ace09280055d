/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The only place that knows of differences between kernels. Each names what changed; the rest of
 * the module reads as if there were only the newest. Kbuild looks into the kernel's headers for
 * each (MACE_HAVE_*): a version says nothing of a kernel into which changes were ported back.
 */
#ifndef _MACE_COMPAT_H
#define _MACE_COMPAT_H

#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/skbuff.h>

#ifdef MACE_HAVE_LINUX_UNALIGNED
/* Linux kernel commit 5f60d5f6bbc1 ("move asm/unaligned.h to linux/unaligned.h") (in v6.12) */
#include <linux/unaligned.h>
#else
#include <asm/unaligned.h>
#endif

/*
 * Probes whose tracepoint has more arguments in newer kernels. Each macro begins the definition of
 * the probe @name with the argument @skb; MACE_DROP_REASON() is the reason, where there is one.
 */

#ifdef MACE_HAVE_CONSUME_SKB_LOCATION
/* Linux kernel commit dd1b527831a3 ("net: add location to trace_consume_skb()") (in v6.3) */
#define MACE_DEFINE_CONSUME_SKB(name, skb) \
	static void name(void *data, struct sk_buff *skb, void *location)
#else
#define MACE_DEFINE_CONSUME_SKB(name, skb) static void name(void *data, struct sk_buff *skb)
#endif

#ifdef MACE_HAVE_KFREE_SKB_RX_SK
/*
 * Linux kernel commit c53795d48ee8 ("net: add rx_sk to trace_kfree_skb") (in v6.11). In 6.12 rx_sk
 * is no pointer to const, in 7.3 it is.
 */
#ifdef MACE_HAVE_KFREE_SKB_RX_SK_CONST
#define MACE_RX_SK const struct sock *rx_sk
#else
#define MACE_RX_SK struct sock *rx_sk
#endif
#define MACE_DEFINE_KFREE_SKB(name, skb)                                  \
	static void name(void *data, struct sk_buff *skb, void *location, \
			 enum skb_drop_reason mace_reason, MACE_RX_SK)
#define MACE_DROP_REASON() ((u32)mace_reason)
#elif defined(MACE_HAVE_KFREE_SKB_REASON)
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

#ifndef MACE_HAVE_VM_FLAGS_MOD
/* Linux kernel commit bc292ab00f6c ("mm: introduce vma->vm_flags wrapper functions") (in v6.3) */
static inline void vm_flags_mod(struct vm_area_struct *vma, unsigned long set, unsigned long clear)
{
	vma->vm_flags = (vma->vm_flags | set) & ~clear;
}
#endif

/*
 * The lower half of a namespace's cookie: Linux kernel commit e8b9eab99232 ("net: retrieve netns
 * cookie via getsocketopt") (in v5.14). v5.10 has a cookie too, but makes it when BPF asks for it,
 * and tells it to nobody else.
 */
#ifdef MACE_HAVE_NETNS_COOKIE
#define MACE_COOKIES true
#define MACE_NETNS_COOKIE(net) ((u32)(net)->net_cookie)
#else
#define MACE_COOKIES false
#define MACE_NETNS_COOKIE(net) 0U
#endif

/*
 * set_active_memcg() of a task. In v5.10 modules cannot use that: it names int_active_memcg, which
 * is not exported.
 */
static inline struct mem_cgroup *mace_charge_to(struct mem_cgroup *memcg)
{
#ifdef CONFIG_MEMCG
	swap(current->active_memcg, memcg);
#endif
	return memcg;
}

#endif
