"""MACE's BPF programs on the kernel's tracepoints, read live from per-CPU ring buffers."""
