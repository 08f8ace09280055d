"""The live source that the configuration names; for `auto` the best one that opens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from collector import SOURCES
from collector.live.filter import Choice
from collector.machine.containers import API_SOCKETS
from collector.machine.cri import CRI_SOCKETS
from contracts.config import CaptureConfig
from contracts.errors import SourceError, Unavailable
from contracts.interfaces import Source, StreamHeader, StreamItem
from contracts.results import Results
from contracts.schema import HookCost
from mace.live.chosen import chooser, everything

AUTO = "auto"


class FirstThatOpens:
    """A `contracts.interfaces.Source` over the configured live source, which follows this machine's devices.

    For `auto` it is the first source, in the order of `collector.SOURCES`, that can apply the configured filter and
    opens. To open a source is the only sure test whether it can run, and no slower than a check: loading the BPF
    programs takes a second.

    `host` is the stream's host name; "" is the machine's own name. `raw`: the caller keeps the raw stream, so that its
    packets have to be chosen in the kernel.
    """

    def __init__(self, config: CaptureConfig, host: str = "", *, raw: bool = False) -> None:
        self._config, self._host, self._raw = config, host, raw
        self._opened: Source | None = None
        self.told = ""
        """Once open: which source it is, for `auto` why no better one, and which packets are chosen where."""
        self.only: Callable[[Results], Results] = everything
        """Once open: returns the part of each result to deliver. Results have to come in order."""

    async def open(self) -> StreamHeader:
        """Open the source and return the stream's header.

        Raises the source's error; for `auto` `Unavailable` with the reason of each source, if none opens. Raises
        `ConfigError` for an unknown protocol or device.
        """
        if self._config.source != AUTO:
            return await self._open(self._config.source, "")
        why_not: list[str] = []
        for name in SOURCES:
            try:
                return await self._open(name, "; ".join(why_not))
            except (Unavailable, SourceError) as error:
                why_not.append(f"not {name}: {_reason(error, name)}")
        raise Unavailable("source auto", f"no source can run: {'; '.join(why_not)}")

    async def _open(self, name: str, why: str) -> StreamHeader:
        choice = choice_of(self._config, name, raw=self._raw)
        source = self._make(name)
        try:
            header = await source.open()
        except BaseException:
            await source.aclose()
            raise
        self._opened = source
        self.told = f"source {name}" + (f" ({why})" if why else "") + (f"; {choice.told}" if choice.told else "")
        self.only = chooser(self._config, after_reading=choice.after_reading)
        return header

    def _make(self, name: str) -> Source:
        config = self._config
        devices = SOURCES[name].follow(
            host_netns=config.host_netns or None,
            outer=config.outer,
            remote_netns=config.remote_netns,
            docker_sockets=(*API_SOCKETS, *config.container_sockets),
            pod_logs=config.pod_logs,
            cri_sockets=(*CRI_SOCKETS, *config.cri_sockets),
        )
        return SOURCES[name].make(config, devices, self._host)

    def items(self) -> AsyncIterator[StreamItem]:
        """Yield the stream of the opened source."""
        assert self._opened is not None
        return self._opened.items()

    def request_stop(self) -> None:
        """Let the stream end after the records made so far."""
        if self._opened is not None:
            self._opened.request_stop()

    async def aclose(self) -> None:
        """Release all resources."""
        if self._opened is not None:
            await self._opened.aclose()

    @property
    def discarded(self) -> int:
        """Records that the source itself discarded."""
        return self._opened.discarded if self._opened is not None else 0

    @property
    def cost(self) -> tuple[HookCost, ...]:
        """Cost of observing since `open`, per hook."""
        return self._opened.cost if self._opened is not None else ()


def name_of(config: CaptureConfig) -> str:
    """Return the name of the configured live source; for `auto` the source is opened and closed.

    Raises as `FirstThatOpens.open`. Not to be called in an event loop.
    """

    async def opened() -> str:
        source = FirstThatOpens(config)
        try:
            return (await source.open()).source
        finally:
            await source.aclose()

    return asyncio.run(opened()) if config.source == AUTO else config.source


def chooses_after_reading(config: CaptureConfig) -> bool:
    """Return whether the configured live source chooses packets after reading them.

    For `auto` the source is opened and closed only if one of the sources would. Raises as `name_of` and `choice_of`.
    """
    if config.source != AUTO:
        return choice_of(config, config.source).after_reading
    for name in SOURCES:
        with suppress(Unavailable):
            if choice_of(config, name).after_reading:
                return choice_of(config, name_of(config)).after_reading
    return False


def choice_of(config: CaptureConfig, name: str, *, raw: bool = False) -> Choice:
    """Return which packets the live source `name` chooses where; `raw` as for `FirstThatOpens`.

    Raises `Unavailable` if the source cannot choose them, `ConfigError` for an unknown protocol.
    """
    choice = SOURCES[name].choice(config)
    if raw and choice.after_reading:
        raise Unavailable(
            name,
            f"{name} records every packet, so that a recording cannot be limited to containers",
            "--source bpf, or kmod; or leave out --container, and choose with `mace report --container`",
        )
    return choice


def _reason(error: Exception, name: str) -> str:
    """Return why a source did not open, and the remedy, without the source's name."""
    if isinstance(error, Unavailable):
        return error.why + (f" ({error.remedy})" if error.remedy else "")
    return str(error).removeprefix(f"{name}: ")
