"""Recordings by name: files of any format that `collector.files` knows, in time order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from collector.files import PCAP_PAIR, FileOptions, LocalRecording, ordered, recording, recording_of
from contracts.errors import UsageError
from mace.replaying import into_store
from mace.replaying.part import RecordedFile

Pair = tuple[Path | None, Path | None]
"""Two packet captures of one host, made at the container's device and at the host's; or neither."""


def recordings(locations: Sequence[Path | str], pair: Pair, options: FileOptions) -> list[LocalRecording]:
    """The files at these paths and the pair, in time order; URLs are left out.

    Raises `Unavailable` or `CaptureError`, and `UsageError` where there is nothing, or half a pair.
    """
    found = [recording(path, options) for path in locations if isinstance(path, Path)]
    inner, outer = pair
    if (inner is None) != (outer is None):
        raise UsageError("--inner and --outer go together: two packet captures of one host")
    if inner is not None and outer is not None:
        found.append(recording_of(PCAP_PAIR, (inner, outer), options))
    if not found and not locations:
        raise UsageError("nothing to replay: name files, or two packet captures with --inner and --outer")
    return ordered(found)


def recorded_files(locations: Sequence[Path | str], pair: Pair, options: FileOptions) -> list[RecordedFile]:
    """The files at these paths and URLs and the pair, in time order, for a replay in parts."""
    found = [into_store.recorded(each) for each in recordings(locations, pair, options)]
    found += [into_store.recorded_at(each, options) for each in locations if isinstance(each, str)]
    return into_store.in_time_order(found)
