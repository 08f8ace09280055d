/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The members of kernel structs that the programs read. libbpf relocates each access to the running
 * kernel's offset by the member's name when it loads the programs (CO-RE), so the order of members
 * here has no meaning. A struct that differs between kernels has a variant whose suffix follows
 * three underscores.
 */
#ifndef _MACE_KERNEL_H
#define _MACE_KERNEL_H

#include <linux/types.h>

#define MACE_CORE __attribute__((preserve_access_index))

struct ns_common {
	unsigned int inum;
} MACE_CORE;

struct list_head {
	struct list_head *next;
	struct list_head *prev;
} MACE_CORE;

struct proc_dir_entry {
	unsigned int low_ino;
} MACE_CORE;

struct net_device;

/* net_cookie is a plain u64 since v5.12; user space can read it (SO_NETNS_COOKIE) since v5.14. */
struct net {
	struct list_head list;
	struct list_head dev_base_head;
	struct net_device *loopback_dev;
	struct proc_dir_entry *proc_net_stat;
	struct ns_common ns;
	__u64 net_cookie;
} MACE_CORE;

typedef struct {
	struct net *net;
} MACE_CORE possible_net_t;

struct rtnl_link_ops {
	const char *kind;
} MACE_CORE;

struct netdev_adjacent {
	struct net_device *dev;
	bool master;
	struct list_head list;
} MACE_CORE;

struct net_device {
	char name[16];
	struct list_head dev_list;
	struct {
		struct list_head upper;
		struct list_head lower;
	} MACE_CORE adj_list;
	int ifindex;
	unsigned short type;
	unsigned short hard_header_len;
	possible_net_t nd_net;
	const struct rtnl_link_ops *rtnl_link_ops;
	__u8 priv[0];
} MACE_CORE;

/* Private data of a VXLAN device. @net is the namespace in which its outer packets are. */
struct vxlan_dev {
	struct net_device *dev;
	struct net *net;
} MACE_CORE;

struct nsproxy {
	struct net *net_ns;
} MACE_CORE;

struct task_struct {
	struct nsproxy *nsproxy;
} MACE_CORE;

struct sock_common {
	possible_net_t skc_net;
} MACE_CORE;

struct sock {
	struct sock_common __sk_common;
} MACE_CORE;

struct sk_buff {
	struct net_device *dev;
	struct sock *sk;
	unsigned int len;
	unsigned int data_len;
	__be16 protocol;
	__u16 network_header;
	__u16 vlan_tci;
	__u32 vlan_all;
	__u8 cloned : 1;
	unsigned int end;
	unsigned char *head;
	unsigned char *data;
} MACE_CORE;

/* Until v6.1: commit 354259fa73e2 ("net: remove skb->vlan_present") removed the bit in v6.2. */
struct sk_buff___vlan_present {
	__u8 vlan_present : 1;
} MACE_CORE;

typedef struct {
	int counter;
} atomic_t;

/* The members from gso_size to dataref lie in the struct's first MACE_SHARED_BYTES. */
#define MACE_SHARED_BYTES 48

struct skb_shared_info {
	unsigned short gso_size;
	unsigned short gso_segs;
	atomic_t dataref;
} MACE_CORE;

/* Only the type is used: a kernel's struct whose first 24 bytes are words of eight. */
struct pt_regs {
	unsigned long r15;
};

/* Since v6.2: commit a35b9af4ec2c ("bpf: Add a kfunc for generic type cast"). */
extern void *bpf_rdonly_cast(const void *obj, __u32 btf_id)
	__attribute__((section(".ksyms"), weak));

/*
 * Since v6.12 for these programs: commit ffc83860d8c0 ("bpf: Allow bpf_dynptr_from_skb() for
 * tp_btf"). The kernel's prototype has struct __sk_buff; libbpf compares only the kinds of types.
 */
extern int bpf_dynptr_from_skb(const struct sk_buff *skb, __u64 flags, struct bpf_dynptr *bytes)
	__attribute__((section(".ksyms"), weak));

#endif
