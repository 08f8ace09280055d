"""MACE: what did a container's virtual network devices add to a packet, device by device?

The package holds what the stages share (records, hooks, rows, ledger, wire) and what composes them (pipeline,
command line, lab). The stages are `collector`, `correlator` and `storage`.

Notebooks and scripts use `mace.open`, `mace.store`, `mace.Recording` and `mace.Store`, which `mace.api` defines.
"""

from importlib import import_module
from typing import Any

from contracts.version import VERSION as __version__  # noqa: F401, N811 (where Python's tools look for it)

_API = ("Filter", "Recording", "Store", "open", "store")


def __getattr__(name: str) -> Any:
    # Imported on first use, so that importing a part of this package does not load a database.
    if name in _API:
        return getattr(import_module("mace.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
