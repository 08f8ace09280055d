"""MACE's kernel module, read live from the per-CPU rings of /dev/mace."""
