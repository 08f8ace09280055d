"""The kernel's tracepoints by BPF programs of ours, read live from a ring buffer for each CPU."""
