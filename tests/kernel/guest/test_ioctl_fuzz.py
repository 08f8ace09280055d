"""Arbitrary calls of ioctl and mmap, from several threads at once, give an error and do no harm."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading

import numpy as np
import pytest

from contracts import abi
from mace.lab import Lab
from tests.kernel.guest.reader import Session

CALLS = 3_000
OFTEN = (abi.Ioctl.HELLO, abi.Ioctl.SETUP, abi.Ioctl.TAKE, abi.Ioctl.STATS, abi.Ioctl.COST, abi.Ioctl.PLACES)
REQUESTS = (*OFTEN * 8, abi.Ioctl.START, abi.Ioctl.STOP)
"""Putting probes on tracepoints and taking them off is slow, so it is a twentieth of the calls."""
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_FAILED = ctypes.c_void_p(-1).value
SIZES = (0, 1, 2, 3, 64, 4095, 4096, 4097, 1 << 16, 1 << 20, 1 << 22, 1 << 31, (1 << 32) - 1)
EXPECTED = {
    errno.EINVAL,
    errno.EFAULT,
    errno.ENOTTY,
    errno.EBUSY,
    errno.ENXIO,
    errno.EPROTO,
    errno.EBADF,
    errno.ENOMEM,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EACCES,
    errno.ENODEV,
    errno.EOVERFLOW,
    errno.EAGAIN,
}


def hurt(session: Session, random: np.random.Generator) -> None:
    """One call with arguments that mostly cannot be."""
    match int(random.integers(0, 8)):
        case 0 | 1:  # a structure of random words, some of them nearly right
            structure = random.choice(np.array([abi.SETUP, abi.TAKE, abi.STATS, abi.FILTER, abi.PLACES], object))
            words = np.zeros(512, "<u4")
            words[:] = random.choice(np.array(SIZES, "<u4"), 512)
            argument = words.view(np.uint8)[: structure.itemsize].copy()
            call(session, int(random.choice(REQUESTS)), bytearray(argument.tobytes() + bytes(512)))
        case 2:  # right, but for one word
            setup = np.zeros((), abi.SETUP)
            setup["abi_major"], setup["subbuf_bytes"], setup["subbufs"] = abi.ABI_MAJOR, 4096, 4
            setup["watermark"], setup["flush_ms"] = 1, 10
            raw = bytearray(setup.tobytes())
            at = int(random.integers(0, len(raw) // 4)) * 4
            raw[at : at + 4] = int(random.choice(SIZES)).to_bytes(8, "little")[:4]
            call(session, abi.Ioctl.SETUP, raw)
        case 3:  # requests that are none
            size, number = int(random.integers(0, 1 << 14)), int(random.integers(0, 256))
            request = int(random.integers(0, 4)) << 30 | size << 16 | abi.IOC_MAGIC << 8 | number
            call(session, request, bytearray(1 << 14))
        case 4:  # addresses that are nobody's, and of the kernel
            address = int(random.choice([0, 1, 4096, 1 << 47, 0xFFFF888000000000, (1 << 64) - 8]))
            request = int(random.choice(REQUESTS))
            if libc.ioctl(session.fd, ctypes.c_ulong(request), ctypes.c_void_p(address)) < 0:
                assert ctypes.get_errno() in EXPECTED
            elif request not in (abi.Ioctl.START, abi.Ioctl.STOP):
                raise AssertionError(f"{request:#x} at {address:#x} was allowed")
        case 5:
            length = int(random.choice([0, 1, 4096, 8192, 16384, 1 << 20, 1 << 40, (1 << 63) - 4096]))
            prot = int(random.integers(0, 8))
            offset = int(random.choice([0, 4096, 16384, 32768, 1 << 30, (1 << 62), -4096]))
            kind = int(random.choice([mmap.MAP_SHARED, mmap.MAP_PRIVATE]))
            mapped = libc.mmap(None, length, prot, kind, session.fd, offset)
            if mapped == MAP_FAILED:
                assert ctypes.get_errno() in EXPECTED
            else:
                assert not prot & (mmap.PROT_WRITE | mmap.PROT_EXEC)
                if prot & mmap.PROT_READ:
                    ctypes.string_at(mapped, length)
                # Nor can it be made writable afterwards.
                assert libc.mprotect(ctypes.c_void_p(mapped), ctypes.c_size_t(length), mmap.PROT_WRITE) == -1
                assert libc.munmap(mapped, length) == 0
        case 6:
            take = np.zeros((), abi.TAKE)
            take["cpu"], take["flags"] = random.integers(0, 3), random.integers(0, 2)
            take["release"] = random.choice([0, 1, 1, 2, 3, 0xFFFFFFFF])
            call(session, abi.Ioctl.TAKE, bytearray(take.tobytes()))
        case _:
            for attempt in (
                lambda: os.read(session.fd, 100),
                lambda: os.write(session.fd, b"mace"),
                lambda: os.lseek(session.fd, 5, os.SEEK_SET),
                lambda: os.ftruncate(session.fd, 0),
                lambda: os.pread(session.fd, 1, 0),
            ):
                with pytest.raises(OSError, match=r"Invalid argument|Illegal seek|not suitable"):
                    attempt()


def call(session: Session, request: int, argument: bytearray) -> None:
    try:
        fcntl.ioctl(session.fd, request, argument, True)
    except OSError as error:
        if error.errno not in EXPECTED:
            raise AssertionError(f"ioctl {request:#x}: {error}") from error


def test_one_after_the_other(module: None, lab: Lab) -> None:
    random = np.random.default_rng(3)
    flow = lab.start_ping("c1", count=20_000, interval_s=0.01)
    for _ in range(60):
        with Session() as session:
            for _ in range(CALLS // 60):
                hurt(session, random)
    flow.stop()
    works()


def test_many_at_once_on_one_file(module: None, lab: Lab) -> None:
    """The same session from four threads, while another thread closes and replaces it."""
    flow = lab.start_ping("c1", count=20_000, interval_s=0.01)
    failures: list[BaseException] = []
    with Session() as session:

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            try:
                for _ in range(CALLS // 8):
                    hurt(session, random)
            except BaseException as failure:  # noqa: BLE001 - raised below
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            # A new open file under the same number, and the old one closed, while others are in a call on it.
            fd = os.open("/dev/mace", os.O_RDWR | os.O_CLOEXEC)
            os.dup2(fd, session.fd, inheritable=False)
            os.close(fd)
            threading.Event().wait(0.1)
        for thread in threads:
            thread.join()
    flow.stop()
    if failures:
        raise failures[0]
    works()


def works() -> None:
    """After all that, a session is a session."""
    with Session() as session:
        session.setup(subbufs=4).start()
        session.stop()
        assert session.stats()["written"].sum() == len(session.read())


@pytest.mark.parametrize("size", [0, 1, 7])
def test_structures_at_the_edge_of_a_page(module: None, size: int) -> None:
    """A structure that ends behind readable memory is a bad address, and nothing of it was done."""
    area = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(base + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    with Session() as session:
        session.setup(subbufs=4).start()
        for request in (
            abi.Ioctl.HELLO,
            abi.Ioctl.SETUP,
            abi.Ioctl.TAKE,
            abi.Ioctl.STATS,
            abi.Ioctl.COST,
            abi.Ioctl.PLACES,
        ):
            address = ctypes.c_void_p(base + mmap.PAGESIZE - size)
            assert libc.ioctl(session.fd, ctypes.c_ulong(request), address) == -1
            assert ctypes.get_errno() == errno.EFAULT
