"""The kernel's own tracepoints, read live from the per-CPU rings of a tracefs instance."""
