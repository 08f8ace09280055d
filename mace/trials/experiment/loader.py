"""Loads a CPU or a disk, for a limited time. `mace.trials.experiment.load` runs this file.

    loader.py cpu CPU LIMIT_S           computes on that CPU
    loader.py io FILE LIMIT_S BYTES     writes the file again and again, at most BYTES long, each MiB to the disk

It imports only the standard library, so that it starts fast.
"""

import os
import signal
import sys

BLOCK = bytes(1 << 20)


def busy(cpu: int) -> None:
    """Compute for ever on one CPU."""
    os.sched_setaffinity(0, {cpu})
    while True:
        pass


def writing(path: str, most_bytes: int) -> None:
    """Write for ever to one file, each block to the disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while True:
        os.lseek(fd, 0, os.SEEK_SET)
        for _ in range(most_bytes // len(BLOCK)):
            os.write(fd, BLOCK)
            os.fdatasync(fd)


if __name__ == "__main__":
    signal.alarm(int(sys.argv[3]))
    if sys.argv[1] == "cpu":
        busy(int(sys.argv[2]))
    else:
        writing(sys.argv[2], int(sys.argv[4]))
