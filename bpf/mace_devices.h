/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Lists the devices of all network namespaces of the machine.
 *
 * The reader runs walk_devices (BPF_PROG_RUN) when it wants to know the devices: no packet runs it. It
 * follows two of the kernel's lists: the namespaces, from the reader's own namespace on, and each
 * namespace's devices. Neither netlink nor setns() shows as much to a user with CAP_BPF and
 * CAP_PERFMON alone.
 *
 * One run describes at most MACE_WALK_DEVICES devices, in the elements of the map mace_netdevs, and
 * leaves a cursor for the next run. Within a run RCU keeps all that is on the lists. Between two runs
 * a namespace or a device may be freed, so a run first checks that both are still linked. The kernel
 * links namespaces after their setup, and unlinks both before it destroys them
 * (net/core/net_namespace.c, net/core/dev.c).
 */
#ifndef _MACE_DEVICES_H
#define _MACE_DEVICES_H

#include "mace_bpf.h"
#include "mace_kernel.h"
#include "mace_packet.h"

/* NETDEV_ALIGN: alignment of a driver's private data behind struct net_device. */
#define MACE_NETDEV_ALIGN 32
/* Names of kinds as the words that they are, filled up with zeros. */
#define MACE_KIND_VETH 0x0000000068746576ULL
#define MACE_KIND_NETKIT 0x000074696b74656eULL
#define MACE_KIND_VXLAN 0x0000006e616c7876ULL

#define MACE_NODE_OF(address, type, member) ((u64)(address) + bpf_core_field_offset(type, member))
#define MACE_HOLDER_OF(node, type, member) \
	((type *)((u64)(node)-bpf_core_field_offset(type, member)))

/**
 * struct mace_walk - where the next run of walk_devices continues
 *
 * @net: the namespace's address
 * @node: address of the next device's dev_list, or of the namespace's dev_base_head
 */
struct mace_walk {
	struct net *net;
	struct list_head *node;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct mace_walk);
} mace_walks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MACE_WALK_DEVICES);
	__type(key, u32);
	__type(value, struct mace_netdev);
} mace_netdevs SEC(".maps");

/* --- lists ------------------------------------------------------------------------ */

/* Return whether @node is on a list. An unlinked node keeps its next, which points back no more. */
static __always_inline bool mace_is_linked(const struct list_head *node)
{
	return BPF_CORE_READ(node, next, prev) == node;
}

/* Return whether @net is a namespace. The head of the list of namespaces is in none. */
static __always_inline bool mace_is_net(const struct net *net)
{
	return BPF_CORE_READ(net, loopback_dev, nd_net.net) == net;
}

static __always_inline struct net *mace_next_net(const struct net *net)
{
	struct list_head *node = BPF_CORE_READ(net, list.next);

	if (!mace_is_net(MACE_HOLDER_OF(node, struct net, list)))
		node = BPF_CORE_READ(node, next);
	return MACE_HOLDER_OF(node, struct net, list);
}

/* The kernel makes the initial namespace first, and never removes it. */
static __always_inline bool mace_is_initial(const struct net *net)
{
	return !mace_is_net(MACE_HOLDER_OF(BPF_CORE_READ(net, list.prev), struct net, list));
}

/* --- devices ---------------------------------------------------------------------- */

static __always_inline const void *mace_private(const struct net_device *dev)
{
	u64 size = bpf_core_type_size(struct net_device);

	/* Since v6.11 a member: commit 13cabc47f8ae ("netdevice: define and allocate &net_device"). */
	if (bpf_core_field_exists(dev->priv))
		size = bpf_core_field_offset(struct net_device, priv);
	else
		size = (size + MACE_NETDEV_ALIGN - 1) & ~(u64)(MACE_NETDEV_ALIGN - 1);
	return (const void *)((u64)dev + size);
}

/* Return the first word of a driver's private data, which in veth and netkit is the peer. */
static __always_inline struct net_device *mace_first_of_private(const struct net_device *dev)
{
	struct net_device *first = NULL;

	bpf_probe_read_kernel(&first, sizeof(first), mace_private(dev));
	return first;
}

/* A VXLAN device that was moved still sends from the namespace in which it was made. */
static __always_inline void mace_describe_tunnel(const struct net_device *dev,
						 struct mace_netdev *netdev)
{
	const struct vxlan_dev *vxlan = mace_private(dev);
	u32 sends_from;

	if (*(const u64 *)netdev->kind != MACE_KIND_VXLAN ||
	    !bpf_core_type_exists(struct vxlan_dev) || BPF_CORE_READ(vxlan, dev) != dev)
		return;
	sends_from = BPF_CORE_READ(vxlan, net, ns.inum);
	if (sends_from != netdev->netns)
		netdev->peer_netns = sends_from;
}

static __always_inline void mace_describe_peer(const struct net_device *dev,
					       struct mace_netdev *netdev)
{
	struct net_device *peer;
	u64 kind = *(const u64 *)netdev->kind;

	if (kind != MACE_KIND_VETH && kind != MACE_KIND_NETKIT)
		return;
	peer = mace_first_of_private(dev);
	if (!peer || mace_first_of_private(peer) != dev)
		return;
	netdev->peer_netns = BPF_CORE_READ(peer, nd_net.net, ns.inum);
	netdev->peer_ifindex = BPF_CORE_READ(peer, ifindex);
}

/* The kernel keeps a device's master first among its upper devices (__netdev_adjacent_dev_insert). */
static __always_inline void mace_describe_neighbours(const struct net_device *dev,
						     struct mace_netdev *netdev)
{
	u64 uppers = MACE_NODE_OF(dev, struct net_device, adj_list.upper);
	u64 lowers = MACE_NODE_OF(dev, struct net_device, adj_list.lower);
	struct list_head *upper = BPF_CORE_READ(dev, adj_list.upper.next);
	struct list_head *lower = BPF_CORE_READ(dev, adj_list.lower.next);
	const struct netdev_adjacent *neighbour;

	if ((u64)upper != uppers) {
		neighbour = MACE_HOLDER_OF(upper, struct netdev_adjacent, list);
		if (BPF_CORE_READ(neighbour, master))
			netdev->master_ifindex = BPF_CORE_READ(neighbour, dev, ifindex);
	}
	if ((u64)lower != lowers) {
		neighbour = MACE_HOLDER_OF(lower, struct netdev_adjacent, list);
		netdev->lower_netns = BPF_CORE_READ(neighbour, dev, nd_net.net, ns.inum);
		netdev->lower_ifindex = BPF_CORE_READ(neighbour, dev, ifindex);
	}
}

static __always_inline void mace_describe(const struct net *net, const struct net_device *dev,
					  struct mace_netdev *netdev)
{
	const char *kind = BPF_CORE_READ(dev, rtnl_link_ops, kind);

	__builtin_memset(netdev, 0, sizeof(*netdev));
	if (bpf_core_field_exists(net->net_cookie))
		netdev->netns_cookie = BPF_CORE_READ(net, net_cookie);
	netdev->netns = BPF_CORE_READ(net, ns.inum);
	netdev->proc_stat = BPF_CORE_READ(net, proc_net_stat, low_ino);
	netdev->initial = mace_is_initial(net);
	netdev->ifindex = BPF_CORE_READ(dev, ifindex);
	netdev->type = BPF_CORE_READ(dev, type);
	bpf_core_read_str(netdev->name, sizeof(netdev->name), &dev->name);
	if (kind)
		bpf_probe_read_kernel_str(netdev->kind, sizeof(netdev->kind), kind);
	mace_describe_peer(dev, netdev);
	mace_describe_tunnel(dev, netdev);
	mace_describe_neighbours(dev, netdev);
}

/* --- the walk --------------------------------------------------------------------- */

static __always_inline bool mace_is_at_end(const struct net *net, const struct list_head *node)
{
	return (u64)node == MACE_NODE_OF(net, struct net, dev_base_head);
}

/* Return whether the namespace and the device at which the last run stopped still exist. */
static __always_inline bool mace_can_continue(const struct net *net, const struct list_head *node)
{
	struct list_head *of_net = (void *)MACE_NODE_OF(net, struct net, list);
	const struct net_device *dev;

	if (!net || !mace_is_linked(of_net) || !mace_is_net(net))
		return false;
	if (mace_is_at_end(net, node))
		return true;
	dev = MACE_HOLDER_OF(node, struct net_device, dev_list);
	return mace_is_linked(node) && BPF_CORE_READ(dev, nd_net.net) == net;
}

/*
 * Describe the next devices; an element whose ifindex is 0 describes none.
 *
 * @begin: 1 starts at the first device of the caller's namespace, 0 continues
 *
 * Return an enum mace_walked.
 */
SEC("raw_tp")
int BPF_PROG(walk_devices, u64 begin)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct net *home = BPF_CORE_READ(task, nsproxy, net_ns), *net = home;
	struct list_head *node = BPF_CORE_READ(home, dev_base_head.next);
	struct mace_netdev *netdev;
	u32 zero = 0, number, i;
	struct mace_walk *walk;
	bool ended = false;

	walk = bpf_map_lookup_elem(&mace_walks, &zero);
	if (!walk)
		return MACE_WALK_LOST;
	if (!begin) {
		net = walk->net;
		node = walk->node;
		if (!mace_can_continue(net, node))
			return MACE_WALK_LOST;
	}
	for (i = 0; i < MACE_WALK_DEVICES; i++) {
		number = i;
		netdev = bpf_map_lookup_elem(&mace_netdevs, &number);
		if (!netdev)
			return MACE_WALK_LOST;
		netdev->ifindex = 0;
		if (!ended && mace_is_at_end(net, node)) {
			net = mace_next_net(net);
			node = BPF_CORE_READ(net, dev_base_head.next);
			ended = net == home;
		}
		if (ended || mace_is_at_end(net, node))
			continue;
		mace_describe(net, MACE_HOLDER_OF(node, struct net_device, dev_list), netdev);
		node = BPF_CORE_READ(node, next);
	}
	walk->net = net;
	walk->node = node;
	return ended ? MACE_WALK_DONE : MACE_WALK_MORE;
}

#endif
