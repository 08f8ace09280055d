/* SPDX-License-Identifier: Apache-2.0 */
/* A table of device names, which numbers them in order of appearance. */
#ifndef MACE_NAMES_H
#define MACE_NAMES_H

#include <stddef.h>
#include <stdint.h>

/* Bytes 0 to 7 and 8 to 15 of a name, little-endian, padded with NUL. */
struct name {
	uint64_t low;
	uint64_t high;
};

struct names {
	struct name *names; /* in order of appearance; the first is the empty name */
	uint32_t *slots; /* by hash: index in `names` plus 1, or 0 */
	size_t slot_count; /* a power of two, and twice the room for names */
	uint32_t count;
};

#define NAMES_FULL UINT32_MAX

/* Seed the hash, once, so that no file can be made whose names collide. */
void names_seed(uint64_t seed);

/* Return 0, or -1 without memory; names_deinit() frees the table in either case. */
int names_init(struct names *names);
void names_deinit(struct names *names);

/* Return the index of a name, which is added if it is new, or NAMES_FULL without memory. */
uint32_t names_index(struct names *names, struct name name);

#endif
