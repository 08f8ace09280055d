// SPDX-License-Identifier: GPL-2.0-only
/*
 * mace: what network devices add to packets, for user space to read.
 *
 *	tracepoint -> probe ---------> filters of ------> per-CPU ring ------> /dev/mace
 *	              mace_probes.c    every session      mace_ring.c  mapped  mace_chardev.c
 *	              mace_packet.c    mace_session.c
 *
 * Nothing is registered on a tracepoint while no session runs: a module that is loaded and not
 * used costs nothing.
 *
 * The way out. An open file pins the module, and a session that runs has an open file: when the
 * module is removed no session is left, so no probe is registered and no ring is left. Then, in
 * this order: no file can be opened any more; every probe that was running has returned, and its
 * table is freed; no namespace calls us any more, and what probes know of each is freed.
 */
#include <linux/module.h>

#include "mace_chardev.h"
#include "mace_packet.h"
#include "mace_probes.h"
#include "mace_session.h"

module_param_named(max_ring_mib, mace_max_ring_mib, uint, 0644);
MODULE_PARM_DESC(max_ring_mib, "most memory of one CPU's ring of one session, MiB");

module_param_named(max_total_mib, mace_max_total_mib, uint, 0644);
MODULE_PARM_DESC(max_total_mib,
		 "most memory of all rings together, MiB; default by CPUs and memory");

module_param_named(max_netns_mib, mace_max_netns_mib, uint, 0644);
MODULE_PARM_DESC(max_netns_mib,
		 "of one namespace's sessions, MiB; default: a quarter of the total");

module_param_named(host_mib, mace_host_mib, uint, 0644);
MODULE_PARM_DESC(host_mib, "kept for the host's root, MiB; default: a quarter of the total");

module_param_named(max_sessions, mace_max_sessions, uint, 0644);
MODULE_PARM_DESC(max_sessions, "files that may be open at once");

module_param_named(max_netns_sessions, mace_max_netns_sessions, uint, 0644);
MODULE_PARM_DESC(max_netns_sessions, "by one namespace");

module_param_named(host_sessions, mace_host_sessions, uint, 0644);
MODULE_PARM_DESC(host_sessions, "of them kept for the host's root");

module_param_named(cost_every, mace_cost_every, uint, 0444);
MODULE_PARM_DESC(cost_every, "one call of a probe in so many is timed; made a power of two");

module_param_array_named(vxlan_ports, mace_vxlan_ports, ushort, &mace_vxlan_port_count, 0444);
MODULE_PARM_DESC(vxlan_ports, "UDP ports whose packets are looked into for VXLAN");

module_param_array_named(geneve_ports, mace_geneve_ports, ushort, &mace_geneve_port_count, 0444);
MODULE_PARM_DESC(geneve_ports, "UDP ports whose packets are looked into for Geneve");

static int __init mace_init(void)
{
	int error;

	mace_packet_init();
	error = mace_sessions_init();
	if (error)
		return error;
	mace_probes_init();
	error = mace_chardev_init();
	if (error)
		mace_sessions_exit();
	return error;
}

static void __exit mace_exit(void)
{
	mace_chardev_exit();
	mace_probes_exit();
	mace_packet_exit();
	mace_sessions_exit();
}

module_init(mace_init);
module_exit(mace_exit);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("What network devices add to packets");
MODULE_VERSION(MACE_VERSION);
