"""A tool's samples as columns: the tool's output on each of its requests."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from contracts.schema import NOT_TOLD, Columns


@dataclass(frozen=True, slots=True, eq=False)
class Samples(Columns):
    """One row per request or further reply, in the order of the tool's output (replies: in order of arrival).

    `NOT_TOLD` for values that are not in the output.
    """

    stamp_utc_ns: npt.NDArray[np.int64]
    """Time in the tool's output; the tool decides of what (`correlator.stamps.LineTime`)."""
    seq: npt.NDArray[np.int64]
    """Number of the request in the order of sending, not wrapped; for people, and for order."""
    rtt_ns: npt.NDArray[np.int64]
    """The tool's round trip time; `NOT_TOLD` if the tool saw no reply or gives no time for it."""
    resolution_ns: npt.NDArray[np.int64]
    """The round trip time is known to ± this."""
    duplicate: npt.NDArray[np.bool_]
    """Whether this is a further reply to a request that has already had one."""
    untimed: npt.NDArray[np.bool_]
    """Whether a reply arrived, or may have, without a round trip time in the output; then `rtt_ns` is `NOT_TOLD`.

    With a `reply_len` the reply certainly arrived, at this place among the replies.
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
        """Make `length` samples from some columns (arrays, or one value for all).

        Other columns are `NOT_TOLD`, except `duplicate` and `untimed` (false) and `resolution_ns` (0).

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
