"""Readers of one CPU's trace ring: `ReadRing` uses read(2), `MmapRing` maps the ring's memory.

Both consume the same pages. docs/design/004-ftrace.md has their measured costs.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from collector.pages.decoding import MISSED, page_buffer
from collector.pages.formats import PageLayout
from contracts.arrays import Bytes
from contracts.errors import SourceError


class PageBuffer:
    """Buffer of pages between the kernel and the decoder, shared by all CPUs."""

    def __init__(self, layout: PageLayout, pages: int) -> None:
        self.layout, self.pages = layout, pages
        self.bytes: Bytes = page_buffer(layout, pages)
        size = layout.page_size
        whole = self.bytes.data
        self.views = [whole[i * size : (i + 1) * size] for i in range(pages)]
        self.matrix = self.bytes[: pages * size].reshape(pages, size)
        self.commits = self.matrix.view(np.uint32)[:, layout.commit_offset // 4]


@dataclass(frozen=True, slots=True)
class TakenPages:
    """Result of one `take` from a ring."""

    pages: int
    empty: bool
    """Whether the ring was found empty at the end; if false, there may be more pages."""
    skip: int = 0
    """Bytes of the first page's data that the previous `take` already returned."""


class Ring(Protocol):
    """One CPU's ring. `close` is called once, last."""

    def take(self, into: PageBuffer, start: int = 0) -> TakenPages:
        """Move pages out of the ring into the buffer, from the buffer's page `start` on; raises `SourceError`.

        The page that the kernel is writing is included as far as it is written.
        """
        ...

    def fileno(self) -> int:
        """Return a file descriptor that poll(2) reports readable once the ring is filled to `buffer_percent`."""
        ...

    def close(self) -> None: ...


class ReadRing:
    """Reads a ring by readv(2), many pages per system call.

    `trace_pipe_raw` returns one page per read, and readv(2) on a file without read_iter() does one read for each of its
    buffers (fs/read_write.c, do_loop_readv_writev). One system call thereby returns up to hundreds of pages.
    """

    _FIRST: Final = 4
    """Pages requested first: a ring mostly holds few, and each buffer of a readv costs time before the call."""

    def __init__(self, path: Path, layout: PageLayout) -> None:
        self._path = path
        self._size = layout.page_size
        self._fd = _open(path)

    def take(self, into: PageBuffer, start: int = 0) -> TakenPages:
        at = start
        for upto in (min(start + self._FIRST, into.pages), into.pages):
            if at < upto:
                at += self._readv(into.views[at:upto])
            if at < upto:
                return TakenPages(at - start, empty=True)
        return TakenPages(at - start, empty=False)

    def _readv(self, views: list[memoryview]) -> int:
        try:
            got = os.readv(self._fd, views)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise SourceError(f"{self._path}: cannot be read: {error.strerror}") from error
        if got % self._size:
            raise SourceError(f"{self._path}: a read gave {got} bytes, expected whole pages of {self._size}")
        return got // self._size

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


class _Meta(ctypes.Structure):
    """struct trace_buffer_meta (include/uapi/linux/trace_mmap.h)."""

    _fields_ = (
        ("meta_page_size", ctypes.c_uint32),
        ("meta_struct_len", ctypes.c_uint32),
        ("subbuf_size", ctypes.c_uint32),
        ("nr_subbufs", ctypes.c_uint32),
        ("reader_lost_events", ctypes.c_uint64),
        ("reader_id", ctypes.c_uint32),
        ("reader_read", ctypes.c_uint32),
    )


_GET_READER: Final = 0x5220
"""TRACE_MMAP_IOCTL_GET_READER, _IO('R', 0x20) (include/uapi/linux/trace_mmap.h)."""


class _Mapping:
    """A read-only shared mapping of a file that mmap.mmap refuses, because its size is 0."""

    def __init__(self, fd: int, length: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.length = length
        address = self._libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.address: int = address

    def close(self) -> None:
        self._libc.munmap(self.address, self.length)


class MmapRing:
    """Reads a ring from its mapped memory, with one system call per page.

    Mapping needs Linux 6.10, commit 117c39200d9d ("ring-buffer: Introducing ring-buffer mapping functions"). The call
    detaches the reader's page from the writer and orders memory, so that no other barrier is needed. The page is
    copied, because the kernel takes it back at the next call, and the decoder needs its pages contiguous.
    """

    def __init__(self, path: Path, layout: PageLayout) -> None:
        self._path, self._layout = path, layout
        self._fd = _open(path)
        try:
            first = _Mapping(self._fd, mmap.PAGESIZE)
            meta = _Meta.from_address(first.address)
            head, size, count = meta.meta_page_size, meta.subbuf_size, meta.nr_subbufs
            first.close()
            if size != layout.page_size:
                raise SourceError(f"{path}: sub-buffers of {size} bytes are mapped, expected {layout.page_size}")
            self._mapping = _Mapping(self._fd, head + size * count)
        except OSError as error:
            os.close(self._fd)
            raise SourceError(f"{path}: cannot be mapped: {error.strerror}") from error
        except SourceError:
            os.close(self._fd)
            raise
        self._meta = _Meta.from_address(self._mapping.address)
        memory = (ctypes.c_uint8 * (size * count)).from_address(self._mapping.address + head)
        self._pages = np.frombuffer(memory, np.uint8).reshape(count, size)
        self._page = self._meta.reader_id
        self._read = self._meta.reader_read

    def take(self, into: PageBuffer, start: int = 0) -> TakenPages:
        at, skip = start, 0
        while at < into.pages:
            try:
                fcntl.ioctl(self._fd, _GET_READER)
            except OSError as error:
                raise SourceError(f"{self._path}: TRACE_MMAP_IOCTL_GET_READER: {error.strerror}") from error
            page, read = self._meta.reader_id, self._meta.reader_read
            same = page == self._page
            if same and read == self._read:
                return TakenPages(at - start, empty=True, skip=skip)
            if same and at > start:
                # The writer has added to this page while it was being copied: it is the ring's last page.
                self._copy(into, at - 1, page, read)
                return TakenPages(at - start, empty=True, skip=skip)
            if same:
                skip = self._read
            self._copy(into, at, page, read)
            at += 1
        return TakenPages(at - start, empty=False, skip=skip)

    def _copy(self, into: PageBuffer, slot: int, page: int, read: int) -> None:
        into.matrix[slot] = self._pages[page]
        # Data that the writer adds behind `read` belongs to the next take. A page that follows lost events is
        # complete, and its commit word holds the MISSED flag.
        if not into.commits[slot] & MISSED:
            into.commits[slot] = read
        self._page, self._read = page, read

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        del self._pages, self._meta
        self._mapping.close()
        os.close(self._fd)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"{path}: cannot be opened: {error.strerror}") from error
