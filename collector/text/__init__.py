"""Text that trace-cmd, perf and the kernel's trace files print."""
