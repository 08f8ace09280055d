"""The ledger from the source to the store: every record is counted, whichever stage fails."""

import asyncio

import pytest

from contracts.interfaces import Progress
from contracts.ledger import Ledger
from contracts.records import Batch
from contracts.schema import Segment
from correlator.engine import EngineConfig
from mace.live import pipeline
from mace.live.pipeline import Stop
from mace.trials.verify.stream import CollectedStream, thinned
from storage.embedded import EmbeddedStore
from tests.made_capture import HEADER, TOPOLOGY, traffic
from tests.measuring import query

RECORDS = 30_000
CUT = 1_000


class Made:
    """A source with a made-up stream that has discarded some records itself."""

    def __init__(self, items, discarded):
        self._items, self.discarded, self.cost = items, discarded, ()

    async def open(self):
        return HEADER

    async def items(self):
        for item in self._items:
            yield item
            if isinstance(item, Batch):
                yield Progress(int(item.ts_ns[-1]))

    def request_stop(self):
        self._items = []

    async def aclose(self):
        pass


class Slow:
    """A slow sink, which keeps the channels full most of the time."""

    def __init__(self):
        self.results = []

    async def open(self, header):
        pass

    async def write(self, results):
        self.results.append(results)
        await asyncio.sleep(0.001)

    async def aclose(self):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize(
    ("loss", "discarded", "engine"),
    [
        (0.0, 0, EngineConfig()),
        (0.2, 0, EngineConfig()),
        (0.0, 7_000, EngineConfig()),
        (0.0, 0, EngineConfig(open_records=50)),
        (0.0, 0, EngineConfig(timeout_ns=2_000, link_ns=500)),
        (0.05, 300, EngineConfig(open_records=30, slice_records=100, timeout_ns=20_000)),
    ],
    ids=["nothing", "ring", "source", "engine full", "engine too late", "all at once"],
)
def test_every_record_is_counted(tmp_path, read, loss, discarded, engine):
    batch = traffic(RECORDS, content=read)
    whole = CollectedStream(0, [TOPOLOGY, *(batch[i : i + CUT] for i in range(0, RECORDS, CUT))])
    stream, gone = thinned(whole, loss)
    slow, store = Slow(), tmp_path / "store"
    source = Made(stream.items, discarded)
    asyncio.run(pipeline.run(source, [slow, EmbeddedStore(store, flush_interval_s=0.05)], engine=engine, stop=Stop()))

    assert all(results.totals.ledger.imbalance == 0 for results in slow.results)
    last = slow.results[-1].totals.ledger
    assert (last.records, last.lost, last.discarded) == (RECORDS - gone.sum(), gone.sum(), discarded)
    assert last.lost == 0 or loss
    # All counts only grow, except `in_flight`.
    for before, after in zip(slow.results, slow.results[1:], strict=False):
        falls = {name for name, n in after.totals.ledger.as_dict().items() if n < before.totals.ledger.as_dict()[name]}
        assert falls <= {"in_flight"}

    names = list(Ledger().as_dict())
    stored = query(store, f"SELECT {', '.join(names)} FROM ledger ORDER BY time, records").fetchall()
    assert all(Ledger(*row).imbalance == 0 for row in stored)
    assert Ledger(*stored[-1]) == last
    # Rows, windows and their stored copies cover the same packets.
    delays = sum(len(results.rows.delays) for results in slow.results)
    counted = sum(w.count for results in slow.results for w in results.rows.windows if w.width_s == 1)
    rows, windows = (
        query(store, sql).fetchone()[0]
        for sql in ("SELECT count(*) FROM delays", "SELECT sum(count) FROM windows WHERE width_s = 1")
    )
    assert delays == counted == rows == windows > 0
    wholes = query(store, "SELECT count(*) FROM delays WHERE segment = 'overhead'").fetchone()[0]
    assert wholes == sum(int((r.rows.delays.segment == Segment.OVERHEAD).sum()) for r in slow.results)


def test_no_window_is_stored_before_the_ledger_of_its_time(tmp_path):
    """A reader of a window finds a ledger that covers its time."""
    batch = traffic(RECORDS)
    store = tmp_path / "store"
    source = Made([TOPOLOGY, *(batch[i : i + CUT] for i in range(0, RECORDS, CUT))], 0)
    asyncio.run(pipeline.run(source, [EmbeddedStore(store)], engine=EngineConfig(), stop=Stop()))
    after = "SELECT count(*) FROM windows w WHERE NOT EXISTS (FROM ledger l WHERE l.time >= w.time)"
    assert query(store, after).fetchone() == (0,)
