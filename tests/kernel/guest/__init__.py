"""Tests that run inside a virtual machine, on a kernel that the module is loaded into: `./dev test-kernel`."""
