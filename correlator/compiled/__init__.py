"""The correlator's loop over single records, compiled from the C in this folder (docs/design/007-correlator.md).

Importing it raises `Unavailable` where it was not compiled, or for another kind of machine.
"""

from contracts.errors import Unavailable

try:
    import correlator.compiled.joiner  # noqa: F401
except ImportError as error:
    raise Unavailable(
        "the correlator", f"its compiled part cannot be loaded ({error})", "./dev setup, which compiles it"
    ) from error
