"""Names of live sources, for modules that need only names; `collector.SOURCES` has the sources themselves."""

from __future__ import annotations

from typing import Final

LIVE: Final = ("kmod", "bpf", "ftrace")
"""In the order in which `auto` tries them, the best first."""
