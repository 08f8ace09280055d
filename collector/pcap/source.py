"""Two packet captures, at a container's inner device and at the host's outer device, as a source.

Tracing needs root on the host; two packet captures may be possible without it, one made in the container and one on the
host. Matched by content, they show how long each packet took from one device to the other, but nothing of the devices
between: the inner device stands for the whole path.

The records look as if the two devices were hooks. tcpdump sees an outgoing packet right before the driver is called
(dev_queue_xmit_nit, net/core/dev.c), and an incoming packet right after netif_receive_skb. The egress path is therefore
measured from driver to driver, while live capture measures from queue to queue. `skb_id` is the content key, because
captures do not contain the kernel buffer; the correlator grades such packets as CONTENT. A packet without a partner
becomes a buffer that ends (`consume_skb`) without having been at a device. Times are UTC.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.pcap.devices import DeviceSurvey
from collector.pcap.file import PacketColumns, PcapFile
from collector.pcap.pairs import EVERYTHING_NS, INNER, OUTER, Paired, Pairing
from collector.reading.options import Description, FileOptions
from collector.reading.reader import FileReader
from contracts.clock import ClockPair
from contracts.errors import CaptureError
from contracts.hooks import BY_HOOK, Hook
from contracts.interfaces import StreamHeader, StreamItem
from contracts.records import Batch
from contracts.topology import NO_DEVICE, Device, Role, Sighting, Topology
from contracts.version import VERSION

NAME: Final = "pcap"
_SIDES: Final = ("inner", "outer")
_OPTIONS: Final = ("--inner-device", "--outer-device")
_NAMES_TOLD: Final = 20
WITHIN_NS: Final = 500_000_000
"""Longest time that a packet may take from one device of a host to the other."""
_HOST, _CONTAINER = 1, 2
"""Made-up inodes of namespaces, and indices of devices: captures contain none."""
_DEVICES: Final = (
    # The inner device is "stacked" on the outer one: captures only show that packets pass from one to the other.
    Device(_CONTAINER, 2, "inner", "pcap", _HOST, 1, netns_name="inner", container="inner", role=Role.INNER),
    Device(_HOST, 1, "outer", "", netns_name="host", role=Role.OUTER),
)
_SIGHTINGS: Final = (NO_DEVICE, Sighting("inner", _CONTAINER, 2), Sighting("outer", _HOST, 1))
_SINGLE: Final = np.uint64(0x9E3779B97F4A7C15)
"""Odd multiplier (the golden ratio's) for ids of packets without a partner, which must differ from all other ids."""


def describe(paths: Sequence[Path], options: FileOptions) -> Description:
    """Read the time of the first packet and make a header; raises `Unavailable` or `CaptureError`."""
    first: list[int] = []
    for path in paths:
        with PcapFile(path, salvage=options.salvage) as file:
            piece = next(file.pieces(), None)
            first += [] if piece is None else [int(piece.utc_ns[0])]
    return Description(_header(paths), min(first, default=0))


def reader(paths: Sequence[Path], options: FileOptions) -> FileReader:
    """Make a reader of two captures, given in the order inner, outer."""
    return PcapPairReader(paths[0], paths[1], options)


def alone(paths: Sequence[Path], _: FileOptions) -> Any:
    """Raise `CaptureError`: a single packet capture contains no delays."""
    raise CaptureError(
        paths[0], 0, "one packet capture has every packet once; give two: `mace replay --inner FILE --outer FILE`"
    )


def _some(names: list[str]) -> str:
    """Join names for a message, at most `_NAMES_TOLD` of them."""
    more = len(names) - _NAMES_TOLD
    return ", ".join(names[:_NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")


def _header(paths: Sequence[Path]) -> StreamHeader:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
    return StreamHeader(
        source=NAME,
        host="unknown",
        run=digest.hexdigest()[:16],
        kernel="",
        boot_id="",
        cpus=1,
        clock=ClockPair(0, 0, 0),
        hooks=tuple(
            BY_HOOK[hook].tracepoint for hook in (Hook.NET_DEV_QUEUE, Hook.NET_DEV_START_XMIT, Hook.NETIF_RECEIVE_SKB)
        ),
        mace_version=VERSION,
    )


def _in_step(files: Sequence[PcapFile]) -> Iterator[tuple[int, PacketColumns | None, int]]:
    """Yield (file, piece or None at its end, complete_ns) of both files in turn, so that neither runs ahead.

    Both files have yielded all packets before `complete_ns`, as far as the files are in order of time; a capture can be
    slightly out of order, because each CPU hands over its own packets.
    """
    pieces = [file.pieces() for file in files]
    never = EVERYTHING_NS
    newest = [-never, -never]
    while True:
        file = min((INNER, OUTER), key=lambda one: newest[one])
        if newest[file] == never:
            return
        piece = next(pieces[file], None)
        newest[file] = never if piece is None else max(newest[file], int(piece.utc_ns.max()))
        yield file, piece, min(newest)


class PcapPairReader(FileReader):
    """Reads two packet captures as a stream."""

    def __init__(self, inner: Path | str, outer: Path | str, options: FileOptions | None = None) -> None:
        self._paths = (Path(inner), Path(outer))
        self._options = options or FileOptions()
        self._files: list[PcapFile] = []
        self._pairing = Pairing(WITHIN_NS)
        self._way: dict[int, int] = {}
        """Sender at the inner device -> packets seen there first minus packets seen there last."""
        self._single = 0
        self._ties = 0
        self._place: list[int | None] = [None, None]
        """Chosen device of each file that was captured at several devices."""
        self._elsewhere = [0, 0]
        """By file: packets of other devices, which are left out."""
        self._told: list[str] = []
        self.packets = 0
        """Packets in both files together."""
        self.pairs = 0
        """Packets found in both files."""

    def _open(self) -> StreamHeader:
        """Open both files; raises `Unavailable` or `CaptureError`."""
        for path in self._paths:
            self._files.append(PcapFile(path, salvage=self._options.salvage))
        return _header(self._paths)

    def close(self) -> None:
        """Close both files."""
        for file in self._files:
            file.close()

    @property
    def discarded(self) -> int:
        """Packets too far out of order, packets that cannot be read, and packets that salvage left out."""
        return self._pairing.late + sum(file.discarded for file in self._files)

    @property
    def bytes_total(self) -> int:
        """Size of both files together."""
        return sum(file.bytes_total for file in self._files)

    @property
    def bytes_read(self) -> int:
        """Bytes of both files read so far."""
        return sum(file.bytes_read for file in self._files)

    @property
    def warnings(self) -> list[str]:
        """Warnings for the user, one line each."""
        told = self._told + [line for file in self._files for line in file.warnings]
        names = " and ".join(map(str, self._paths))
        for path, elsewhere in zip(self._paths, self._elsewhere, strict=True):
            if elsewhere:
                told.append(
                    f"{path}: {elsewhere} packets seen at other devices are left out and not counted as discarded: "
                    "they add nothing to the delay between the two devices"
                )
        for file, several in zip(self._files, self._pairing.several, strict=True):
            if several and file.has_cooked and self._pairing.ambiguous:
                told.append(
                    f"{file.path}: {several} packets occur several times and have no delay: a capture of `any` in the "
                    "format LINUX_SLL does not contain the device. Capture at one device, or with "
                    "`tcpdump -i any -y LINUX_SLL2`"
                )
        if self._pairing.ambiguous:
            told.append(
                f"{names}: {self._pairing.ambiguous} packets cannot be told from others with the same content near in "
                "time; they count as unmatched"
            )
        if self._ties:
            told.append(
                f"{names}: {self._ties} packets have the same time in both captures, so that their direction is "
                "unknown; they count as unmatched"
            )
        told += self._nothing_found(names)
        return told

    def _nothing_found(self, names: str) -> list[str]:
        """Return a warning if there are no figures at all and no other warning explains it."""
        empty = [file for file in self._files if not file.packets and not file.discarded]
        if empty:
            return [f"{file.path}: the capture contains no packet" for file in empty]
        whole = all(file.packets > file.cut_short for file in self._files)
        if self.pairs or self._pairing.ambiguous or self._ties or not whole:
            return []
        told = f"{names}: no packet of one capture is in the other within {WITHIN_NS / 1e9:g} s"
        return [f"{told}: are both of the same host, time and clock?"]

    def items(self) -> Iterator[StreamItem]:
        """See `FileReader`."""
        begun = False
        self._choose_devices()
        for paired in self._decided():
            batch = self._records(paired)
            if not begun:
                begun = True
                yield Topology(int(batch.ts_ns[0]), _HOST, _DEVICES, _SIGHTINGS)
            yield from batch.pieces()
        if not begun:
            yield Topology(0, _HOST, _DEVICES, _SIGHTINGS)

    def _choose_devices(self) -> None:
        """Choose the device of each capture of several devices; raises `CaptureError` if the user has to choose."""
        names: list[dict[int, str]] = []
        for path, asked in zip(self._paths, self._asked(), strict=True):
            with PcapFile(path, salvage=self._options.salvage) as capture:
                places = sorted(capture.places()) if capture.may_have_places or asked else []
                names.append({place: capture.place_name(place) for place in places})
        for file, asked in enumerate(self._asked()):
            if asked:
                self._place[file] = self._named(file, asked, names[file])
        undecided = [file for file in (INNER, OUTER) if len(names[file]) > 1 and self._place[file] is None]
        if not undecided:
            return
        survey = self._surveyed()
        for file in undecided:
            if survey.must_choose(file):
                self._place[file] = self._farthest(file, survey, names[file])

    def _asked(self) -> tuple[str, str]:
        return self._options.inner_device, self._options.outer_device

    def _named(self, file: int, asked: str, names: dict[int, str]) -> int:
        """Return the place that the user named; raises `CaptureError` for an unknown one."""
        found = [place for place, name in names.items() if name == asked]
        if not found:
            there = _some(list(names.values())) or "none"
            raise CaptureError(
                self._paths[file], 0, f"no packet of a device {asked!r}, as {_OPTIONS[file]} names; there are: {there}"
            )
        return found[0]

    def _farthest(self, file: int, survey: DeviceSurvey, names: dict[int, str]) -> int:
        """Return the place at the end of the path; raises `CaptureError` if it is not certain."""
        ends, shared = survey.ends(file), survey.shared(file)
        there = _some([f"{names[place]} ({count})" for place, count in shared.most_common()])
        if len(ends) != 1:
            raise CaptureError(
                self._paths[file],
                0,
                "the capture was made at several devices and has the same packets several times; which of them is the "
                f"{_SIDES[file]} one is not clear: say it with {_OPTIONS[file]}. Devices, and how many packets of the "
                f"other capture each saw: {there}",
            )
        self._told.append(
            f"{self._paths[file]}: made at several devices, each with the packets that it shares with the other "
            f"capture: {there}. Measured at {names[ends[0]]}, where they are farthest from the other capture; "
            f"{_OPTIONS[file]} chooses another"
        )
        return ends[0]

    def _surveyed(self) -> DeviceSurvey:
        """Read both files once and return the survey of their devices."""
        survey = DeviceSurvey(WITHIN_NS)
        files: list[PcapFile] = []
        try:
            for path in self._paths:
                files.append(PcapFile(path, salvage=self._options.salvage))
            for file, piece, complete_ns in _in_step(files):
                if piece is not None:
                    place = self._place[file]
                    survey.push(file, piece if place is None else piece[piece.place == place])
                survey.look(complete_ns)
            survey.look(EVERYTHING_NS, ended=True)
        finally:
            for one in files:
                one.close()
        return survey

    def _decided(self) -> Iterator[Paired]:
        for file, piece, complete_ns in _in_step(self._files):
            if piece is not None:
                place = self._place[file]
                if place is not None:
                    mine = piece.place == place
                    self._elsewhere[file] += int((~mine).sum())
                    piece = piece[mine]
                self.packets += len(piece)
                self._pairing.push(file, piece)
            found = self._pairing.take(complete_ns)
            if found is not None:
                yield found

    def _records(self, found: Paired) -> Batch:
        """Return the records of the packets; a packet sent at the inner device has two, at the queue and the driver."""
        inner, ts = found.file == INNER, found.packets.utc_ns
        # Positive if the other capture saw the packet later.
        ahead = found.partner_ns - ts
        towards_network = np.where(inner, ahead > 0, ahead < 0)
        tied = found.paired & (ahead == 0)
        if tied.any():
            towards_network, unclear = self._by_sender(found, towards_network, tied)
        else:
            unclear = np.zeros(len(found), np.bool_)
            self._learn(found, towards_network)
        paired = found.paired & ~unclear
        self.pairs += int((paired & inner).sum())
        key = found.packets.content.packet_key
        single = np.flatnonzero(~paired)
        ids = key.copy()
        numbers = np.arange(self._single + 1, self._single + 1 + len(single), dtype=np.uint64)
        self._single += len(single)
        ids[single] = key[single] ^ (numbers * _SINGLE)
        sent = paired & towards_network
        twice = sent & inner
        hook = np.where(sent, np.uint8(Hook.NET_DEV_QUEUE), np.uint8(Hook.NETIF_RECEIVE_SKB))
        # The end of the buffer makes the ledger count the packet as unmatched at once, and not as in flight.
        hook[~paired] = Hook.CONSUME_SKB
        index = np.repeat(np.arange(len(found)), 1 + twice)
        again = np.append(False, index[1:] == index[:-1])
        columns: dict[str, npt.NDArray[Any]] = {
            "ts_ns": ts[index],
            "skb_id": ids[index],
            "dev": np.where(paired, np.where(inner, np.uint32(1), np.uint32(2)), np.uint32(0))[index],
            "l3_len": found.packets.length[index],
            "hook": np.where(again, np.uint8(Hook.NET_DEV_START_XMIT), hook[index]),
        }
        batch = Batch.of(len(index), found.packets.content[index], **columns)
        if not tied.any():
            return batch
        # For equal times the record of the device that the packet reached first comes first.
        rank = np.where(towards_network == inner, 0, 1)[index]
        return batch[np.lexsort((rank, batch.ts_ns))]

    def _learn(self, found: Paired, towards_network: npt.NDArray[np.bool_]) -> None:
        """Learn the direction of each sender's packets."""
        of = np.flatnonzero(found.paired & (found.file == INNER) & (found.partner_ns != found.packets.utc_ns))
        senders, place = np.unique(found.packets.sender[of], return_inverse=True)
        if len(senders) > _SENDERS_MAX:
            return
        ways = np.bincount(place, weights=np.where(towards_network[of], 1, -1), minlength=len(senders))
        for sender, way in zip(senders.tolist(), ways.tolist(), strict=True):
            if sender and len(self._way) < _SENDERS_MAX:
                self._way[sender] = self._way.get(sender, 0) + int(way)

    def _by_sender(
        self, found: Paired, towards_network: npt.NDArray[np.bool_], tied: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Decide the direction of packets with equal times in both files by other packets of their sender.

        Returns the direction of all packets (True: towards the network), and a mask of those that stay unknown.
        """
        self._learn(found, towards_network)
        key, inner = found.packets.content.packet_key, found.file == INNER
        seen = np.flatnonzero(tied & inner)
        ways = np.array([self._way.get(sender, 0) for sender in found.packets.sender[seen].tolist()], np.int64)
        way_of = dict(zip(zip(key[seen].tolist(), found.packets.utc_ns[seen].tolist(), strict=True), ways, strict=True))
        at = np.flatnonzero(tied)
        way = np.array(
            [way_of.get(one, 0) for one in zip(key[at].tolist(), found.packets.utc_ns[at].tolist(), strict=True)],
            np.int64,
        )
        towards_network = towards_network.copy()
        towards_network[at] = way > 0
        unclear = np.zeros(len(found), np.bool_)
        unclear[at[way == 0]] = True
        self._ties += int((unclear & inner).sum())
        return towards_network, unclear


_SENDERS_MAX: Final = 1 << 14
"""Largest number of senders (hardware addresses on one link) that are remembered."""
assert (INNER, OUTER) == (0, 1)
