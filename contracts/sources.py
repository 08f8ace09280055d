"""Names of live sources, for modules that need only names; `collector.SOURCES` has the sources themselves."""

from __future__ import annotations

from typing import Final

LIVE: Final = ("kmod", "ftrace", "bpf")
"""In the order in which `auto` tries them. BPF is last: for now it perturbs packets more than ftrace does."""
