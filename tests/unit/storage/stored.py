"""Makes a store with given results."""

import asyncio

from storage.embedded import EmbeddedStore
from tests.made_results import header


def fill(path, results, run="run-1", *, head=None, **changes):
    """Write all results as one run; the closed sink."""

    async def write():
        sink = EmbeddedStore(path, **({"fsync": False, "flush_interval_s": 60.0} | changes))
        await sink.open(head or header(run))
        for each in results:
            await sink.write(each)
        await sink.aclose()
        return sink

    return asyncio.run(write())
