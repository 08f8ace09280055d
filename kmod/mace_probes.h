/* SPDX-License-Identifier: GPL-2.0-only */
/* The probes: which tracepoints there are, and switching them on and off. */
#ifndef _MACE_PROBES_H
#define _MACE_PROBES_H

#include "uapi/mace.h"

extern unsigned int mace_cost_every;

u32 mace_probes_available(void);
u32 mace_probes_watched(u32 hooks);
int mace_probes_get(u32 hooks);
void mace_probes_put(u32 hooks);
void mace_probes_cost(struct mace_cost *cost);

void mace_probes_init(void);
void mace_probes_exit(void);

#endif
