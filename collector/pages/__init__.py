"""Pages of the kernel's ring buffer, decoded to columns, wherever the pages come from."""
