"""The collector's loops over single records, compiled from the C in this folder (docs/design/004-ftrace.md).

Importing it raises `Unavailable` where it was not compiled, or for another kind of machine.
"""

from contracts.errors import Unavailable

try:
    import collector.compiled.loops  # noqa: F401
except ImportError as error:
    raise Unavailable(
        "the collector", f"its compiled part cannot be loaded ({error})", "./dev setup, which compiles it"
    ) from error
