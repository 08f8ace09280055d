"""Replays recordings into a store in parts, in this process or in others, so that a stopped replay can resume."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from collector.capture.source import describe
from collector.files import BY_NAME, FileOptions, LocalRecording, recording
from collector.reading.opening import open_binary
from contracts.config import Config, StoreConfig
from contracts.errors import Stopped
from contracts.figures import Summary
from correlator import configured
from mace.replaying import jobs as processes
from mace.replaying.assembly import PART_BYTES, Assembly
from mace.replaying.part import MACE_FORMAT, PartDone, RecordedFile, here, run_part
from mace.replaying.progress import asked_to_stop, bar
from mace.shown import terminal

if TYPE_CHECKING:
    from correlator.engine import EngineConfig


def recorded(one: LocalRecording) -> RecordedFile:
    """Describe a recording of this machine; its paths become absolute, because a worker has another directory."""
    options = one.options
    if options.topology is not None:
        options = replace(options, topology=options.topology.absolute())
    paths = tuple(str(each.absolute()) for each in one.paths)
    return RecordedFile(paths, one.format, options, one.header, one.first_utc_ns, one.bytes_total)


def recorded_at(url: str, options: FileOptions) -> RecordedFile:
    """Describe a file at a URL. A capture is read in place; a file of another format is fetched to read its header."""
    file, size = open_binary(url)
    with file:
        head = file.read(4)
    if head and BY_NAME[MACE_FORMAT].recognises(head):
        info = describe(url, salvage=options.salvage)
        return RecordedFile((url,), MACE_FORMAT, options, info.header, info.first_utc_ns, size)
    with here((url,)) as paths:
        one = recording(paths[0], options)
    return replace(recorded(one), locations=(url,), bytes_total=size)


def in_time_order(files: Sequence[RecordedFile]) -> list[RecordedFile]:
    """Return the files sorted by the UTC time of their first record."""
    return sorted(files, key=lambda one: (one.first_utc_ns, one.name))


def files_at(locations: Sequence[Path | str], options: FileOptions | None = None) -> list[RecordedFile]:
    """Describe files of any format at paths and URLs, in time order. Raises `Unavailable` or `CaptureError`."""
    options = options or FileOptions()
    return in_time_order(
        [
            recorded_at(each, options) if isinstance(each, str) else recorded(recording(each, options))
            for each in locations
        ]
    )


class How(TypedDict, total=False):
    """Options of `into_store` that the command line passes on."""

    resume: bool
    cluster: str | None
    jobs: int
    part_bytes: int | None


def into_store(
    files: Sequence[RecordedFile],
    store: str | None,
    engine: EngineConfig,
    config: StoreConfig,
    *,
    resume: bool = False,
    cluster: str | None = None,
    jobs: int = 1,
    part_bytes: int | None = None,
    told: Callable[[int, int], None] = lambda _done, _total: None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Summary, list[str]]:
    """Replay files in parts into `store`, or with None compute figures only; returns the figures and warnings.

    Up to `jobs` processes work on parts at the same time, if the files are so large that this is faster (always with
    `part_bytes`). `told` is called with the bytes done and the total bytes. When `stop()` returns true, a replay into a
    store raises `Stopped`, and a later call with `resume` continues it; without a store, the figures of the parts done
    are returned.
    """
    if part_bytes is None and cluster is None:
        jobs = jobs if processes.worthwhile(files, jobs) else 1
        part_bytes = processes.part_bytes(files, jobs) if jobs > 1 else PART_BYTES
    if store is None:
        engine = replace(engine, rows=False)
    with Assembly(files, store, engine, config, resume=resume, part_bytes=part_bytes or PART_BYTES) as assembly:
        told(assembly.bytes_committed, assembly.bytes_total)
        try:
            if cluster is not None:
                from mace.replaying import cluster as workers  # noqa: PLC0415 (an extra, and slow to import)

                workers.replay(assembly, cluster, told, stop)
            elif min(jobs, assembly.parts_total - assembly.parts_committed) > 1:
                processes.replay(assembly, jobs, told, stop)
            else:
                _in_turn(assembly, told, stop)
        except Stopped as early:
            if store is not None:
                raise
            return assembly.summary(), [*assembly.warnings, f"{early}: the figures are of these"]
        assembly.finish()
        return assembly.summary(), assembly.warnings


def _in_turn(assembly: Assembly, told: Callable[[int, int], None], stop: Callable[[], bool]) -> None:
    """Run and commit one part after the other in this process, each with the state of the part before it."""
    for task in assembly.tasks():
        before = assembly.bytes_committed

        def reading(read: int, _records: int, before: int = before) -> None:
            if stop():
                raise assembly.stopped()
            told(before + read, assembly.bytes_total)

        done: PartDone = run_part(replace(task, overlap=True), reading)
        assembly.commit(done)
        told(assembly.bytes_committed, assembly.bytes_total)


@contextmanager
def replayed(files: Sequence[RecordedFile], settings: Config, *, quiet: bool, stages: bool = False) -> Iterator[Path]:
    """Replay recordings into a temporary store, with a progress bar; yields its path and removes it after the block.

    With `stages` the store has which CPU worked on packets, and no rows.
    """
    console = terminal.PlainConsole(stderr=True)
    engine = replace(configured.replayed(settings.correlate), rows=not stages, stages=stages)
    with tempfile.TemporaryDirectory(prefix="mace-replayed-") as folder:
        with asked_to_stop() as stop, bar(console, quiet=quiet) as told:
            # Named after the first recording, because a report prints the store's name as its heading.
            made = Path(folder) / files[0].name.rsplit("/", 1)[-1]
            store = StoreConfig(sync=False)
            _, warnings = into_store(files, str(made), engine, store, jobs=processes.usable(), told=told, stop=stop)
        terminal.warn(console, warnings)
        yield made
