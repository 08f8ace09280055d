/* SPDX-License-Identifier: GPL-2.0-only */
/* /dev/mace. */
#ifndef _MACE_CHARDEV_H
#define _MACE_CHARDEV_H

#define MACE_VERSION "0.1.0"

int mace_chardev_init(void);
void mace_chardev_exit(void);

#endif
