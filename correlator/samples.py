"""A tool's samples: what it said about each of its requests, as columns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from contracts.schema import NOT_TOLD, Columns


@dataclass(frozen=True, slots=True, eq=False)
class Samples(Columns):
    """One row per request or further reply, in the order in which the tool told of them (replies: as they arrived).

    `NOT_TOLD` wherever the tool does not say.
    """

    stamp_utc_ns: npt.NDArray[np.int64]
    """When; what it is the time of depends on the tool (`correlator.stamps.LineTime`)."""
    seq: npt.NDArray[np.int64]
    """Number of the request in the order of sending, not wrapped; for people, and for order."""
    rtt_ns: npt.NDArray[np.int64]
    """The tool's round trip time; `NOT_TOLD`: it has seen no reply, or told no time of it."""
    resolution_ns: npt.NDArray[np.int64]
    """The round trip time is known to ± this."""
    duplicate: npt.NDArray[np.bool_]
    """A further reply to a request that has had one."""
    untimed: npt.NDArray[np.bool_]
    """A reply came, or may have, of which the tool's output has no round trip time; then `rtt_ns` is `NOT_TOLD`.

    With a `reply_len` it came for certain, at this place among the replies.
    """
    request_len: npt.NDArray[np.int32]
    """Bytes of the request with its IP header."""
    reply_len: npt.NDArray[np.int32]
    l4_proto: npt.NDArray[np.int16]
    """IP protocol number."""
    l4_id: npt.NDArray[np.int32]
    """The container's port, or the identifier of ICMP and ICMPv6 echo."""
    l4_seq: npt.NDArray[np.int32]
    """Sequence number of ICMP and ICMPv6 echo as in the packet, 0 to 65535."""

    _DTYPES: ClassVar[dict[str, str]] = {
        "stamp_utc_ns": "<i8",
        "seq": "<i8",
        "rtt_ns": "<i8",
        "resolution_ns": "<i8",
        "duplicate": "?",
        "untimed": "?",
        "request_len": "<i4",
        "reply_len": "<i4",
        "l4_proto": "<i2",
        "l4_id": "<i4",
        "l4_seq": "<i4",
    }

    @classmethod
    def of(cls, length: int, **given: Any) -> Samples:
        """`length` samples from some columns (arrays, or one value for all).

        The others are `NOT_TOLD`, the samples no duplicates, and none `untimed`.

        Raises `TypeError` for an unknown column, `ValueError` for one of another length.
        """
        unknown = given.keys() - cls._DTYPES.keys()
        if unknown:
            raise TypeError(f"no such column: {', '.join(sorted(unknown))}")
        empty = {"duplicate": False, "untimed": False, "resolution_ns": 0}
        columns = {}
        for name, dtype in cls._DTYPES.items():
            value = np.asarray(given.get(name, empty.get(name, NOT_TOLD)))
            columns[name] = np.broadcast_to(value, (length,)).astype(dtype)
        return cls(**columns)


assert tuple(f.name for f in fields(Samples)) == tuple(Samples._DTYPES)
