"""This machine's devices, namespaces, containers and processes."""
