"""A worker process of `mace.replaying.jobs`: does one part after the other until its parent closes the connection.

python -P -m mace.replaying.worker FD PARENT        FD: a connected socket; PARENT: the parent's process number

parent ── PartTask ──► worker
       ◄── int ───────        bytes of the part read so far, now and then
       ◄── PartDone ──        or the exception that ended the part
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_TOLD_S: Final = 0.2
"""Shortest time between two messages about the bytes read."""


def main(fd: int, parent: int) -> None:
    """Do the tasks that arrive at the socket `fd`; `parent` is the number of the process at its other end."""
    # A worker that outlived its parent would write into a store that it no longer holds the lock of.
    # Elsewhere than on Linux it notices at its next message.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    # The kernel closes a killed parent's end of the connection before it sends the signal.
    with Connection(fd) as connection, suppress(EOFError, ConnectionError):
        while True:
            connection.send(_done(connection.recv(), connection))


def _done(task: object, connection: Connection) -> object:
    """Return a part's results, or the exception that ended it; a defect's traceback goes along as a note."""
    from mace.replaying.part import PartTask, run_part  # noqa: PLC0415 (the parent's end is noticed before this)

    assert isinstance(task, PartTask)
    last_s = time.monotonic()

    def told(read: int, _records: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= _TOLD_S:
            last_s = now_s
            connection.send(read)

    try:
        return run_part(task, told)
    except Exception as error:  # noqa: BLE001 (the parent raises it)
        error.add_note(traceback.format_exc())
        return error


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
