"""Files that hold a stream: the format of each, the time of its capture, and the reader for it.

`FORMATS` is the table of formats. A file has the first format that recognises its first bytes; every format replays
through the same engine. A `LocalRecording` names one stream to replay: plain data, so that another process can open it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from collector.capture import source as capture_source
from collector.pcap import file as pcap_file
from collector.pcap import source as pcap_source
from collector.perfetto import source as perfetto_source
from collector.perfetto import wire as perfetto_wire
from collector.reading.options import Description, FileOptions
from collector.reading.reader import FileReader
from collector.reading.streaming import FileSource
from collector.text import source as text_source
from collector.tracecmd import source as tracecmd_source
from contracts import wire
from contracts.errors import CaptureError, Unavailable
from contracts.interfaces import StreamHeader

__all__ = [
    "BY_NAME",
    "FORMATS",
    "PCAP_PAIR",
    "Description",
    "FileFormat",
    "FileOptions",
    "FileReader",
    "FileSource",
    "LocalRecording",
    "in_time_order",
    "ordered",
    "recording",
    "recording_of",
    "sniff",
]

HEAD_BYTES: Final = 1 << 16
"""Bytes at a file's beginning by which its format is recognised. Text may begin with a long comment."""


@dataclass(frozen=True, slots=True)
class FileFormat:
    """One row of the table of formats. Other processes find the row by its name."""

    name: str
    """Name for users: `mace`, `trace.dat`, ..."""
    meaning: str
    """Which files these are, for lists and errors."""
    recognises: Callable[[bytes], bool]
    """Returns whether the first `HEAD_BYTES` of a file (all of a shorter one) have this format. Cheap; never raises."""
    describe: Callable[[Sequence[Path], FileOptions], Description]
    """Reads header and first time, and as little else as possible. Raises `Unavailable` or `CaptureError`."""
    reader: Callable[[Sequence[Path], FileOptions], FileReader]
    """Makes a reader that has not opened the files yet."""


@dataclass(frozen=True, slots=True)
class LocalRecording:
    """A file (or several that are one stream) whose format is known."""

    paths: tuple[Path, ...]
    format: str
    """Name of the row in `FORMATS`."""
    options: FileOptions
    header: StreamHeader
    first_utc_ns: int
    bytes_total: int

    @property
    def name(self) -> str:
        """The paths, as messages name the recording."""
        return " + ".join(map(str, self.paths))

    def reader(self) -> FileReader:
        """Make a new reader of the recording, not yet open."""
        return BY_NAME[self.format].reader(self.paths, self.options)

    def source(self) -> FileSource:
        """Make a new source of the recording for the pipeline, not yet open."""
        return FileSource(self.reader())


def sniff(path: Path | str) -> FileFormat:
    """Return the format of a file.

    Raises `Unavailable` if the file cannot be read and `CaptureError` if no format recognises it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise Unavailable(
            str(path), error.strerror or str(error), "name a file that `mace record` or another tracer made"
        ) from error
    for form in FORMATS:
        if form.recognises(head):
            return form
    said = f"it begins with {head[:8].hex(' ')}" if head else "the file is empty"
    raise CaptureError(
        path, 0, f"no format that can be replayed: {said}; these can: {', '.join(one.name for one in FORMATS)}"
    )


def recording(path: Path | str, options: FileOptions | None = None) -> LocalRecording:
    """Return one file as a recording; raises `Unavailable` or `CaptureError`."""
    return recording_of(sniff(path), (Path(path),), options)


def recording_of(form: FileFormat, paths: Sequence[Path], options: FileOptions | None = None) -> LocalRecording:
    """Return files of a given format that hold one stream as a recording; raises `Unavailable` or `CaptureError`."""
    options = options or FileOptions()
    told = form.describe(paths, options)
    size = sum(path.stat().st_size for path in paths)
    return LocalRecording(tuple(paths), form.name, options, told.header, told.first_utc_ns, size)


def in_time_order(paths: Iterable[Path | str], options: FileOptions | None = None) -> list[LocalRecording]:
    """Return files as recordings, ordered like `ordered`; raises `Unavailable` or `CaptureError`."""
    return ordered(recording(path, options) for path in paths)


def ordered(recordings: Iterable[LocalRecording]) -> list[LocalRecording]:
    """Sort recordings by the UTC time of their first record: monotonic clocks of two boots cannot be compared."""
    return sorted(recordings, key=lambda one: (one.first_utc_ns, one.name))


# The formats and their adapters. The order matters only if two formats could recognise the same bytes.


def _is_mace(head: bytes) -> bool:
    # A capture changed or cut in transfer counts too, and so does an empty file: the reader reports what happened.
    return head[:4] == wire.SIGNATURE[: min(len(head), 4)]


def _describe_mace(paths: Sequence[Path], options: FileOptions) -> Description:
    info = capture_source.describe(paths[0], salvage=options.salvage)
    return Description(info.header, info.first_utc_ns)


def _mace_reader(paths: Sequence[Path], options: FileOptions) -> FileReader:
    return capture_source.CaptureReader(paths[0], salvage=options.salvage)


FORMATS: Final[tuple[FileFormat, ...]] = (
    FileFormat("mace", "captures of `mace record` and `mace run --record`", _is_mace, _describe_mace, _mace_reader),
    FileFormat(
        "trace.dat",
        "files of `trace-cmd record` and `trace-cmd extract`, versions 6 and 7",
        tracecmd_source.recognises,
        tracecmd_source.describe,
        tracecmd_source.reader,
    ),
    FileFormat(
        "perfetto",
        "Perfetto traces with network events of traced",
        perfetto_wire.recognises,
        perfetto_source.describe,
        perfetto_source.reader,
    ),
    FileFormat(
        "text",
        "output of ftrace's trace and trace_pipe, `trace-cmd report` and `perf script`",
        text_source.recognises,
        text_source.describe,
        text_source.reader,
    ),
    FileFormat(
        "pcap",
        "packet captures, pcap and pcapng, compressed or not: two of them, `--inner FILE --outer FILE`",
        pcap_file.is_pcap,
        pcap_source.alone,
        pcap_source.alone,
    ),
)
"""Formats that can be replayed."""

PCAP_PAIR: Final = FileFormat(
    "pcap pair", "an inner and an outer packet capture", lambda _: False, pcap_source.describe, pcap_source.reader
)
"""A format of two files, so that no single file is recognised: `recording_of(PCAP_PAIR, (inner, outer))`."""

BY_NAME: Final[dict[str, FileFormat]] = {form.name: form for form in (*FORMATS, PCAP_PAIR)}
