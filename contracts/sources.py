"""What live sources are called, for whoever only names them; `collector.SOURCES` has the sources themselves."""

from __future__ import annotations

from typing import Final

LIVE: Final = ("kmod", "ftrace")
"""The best first: `auto` takes the first that can run."""
