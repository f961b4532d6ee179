# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Where two chains show different bytes, found by reading only what their maps leave open, and as fast as disks allow.

Images lie in files, so their clusters are read from there, by several threads at once, and compared by memcmp; QEMU
is asked for where they lie (``qemu-img map``), and for the bytes only of clusters that are compressed. Nobody may write
to any of the images meanwhile: see :func:`..qemu_img.unwritten`.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import ctypes
import errno
import mmap
import os
import threading
import typing as t
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .._errors import FileFailed, ImageToolFailed, SpaceExhausted
from . import qemu_img
from .extents import Extents, Range, common, joined, pieces
from .nbd import Nbd, NbdFailed
from .qemu_img import Image

_PIECE = 1 << 20
_THREADS = 2
_DIRECT_UNIT = 4096
_MEMCMP = ctypes.CDLL(None).memcmp
_MEMCMP.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True)
class Disk:
    """What a chain shows: ``image`` (``None``: nothing, which reads as zeroes) and the map of it."""

    image: Image | None
    extents: Extents


@dataclass(frozen=True)
class Content:
    """Parts of a disk, in order: ``data`` that was read, and ``zeroes``."""

    data: list[Range]
    zeroes: list[Range]

    def __bool__(self) -> bool:
        return bool(self.data or self.zeroes)


async def difference(a: Disk, b: Disk, ranges: t.Sequence[Range], unit: int, *, first: bool = False) -> Content:
    """The units of ``ranges`` (whole ones, but for the end of the disk) in which the two differ: what ``a`` has there.

    ``first`` is enough to know that there is one.

    :raise FileFailed, ImageToolFailed, ImageInUse: they could not be read.
    """
    async with contextlib.AsyncExitStack() as stack:
        sides = [await stack.enter_async_context(_opened(disk, ranges)) for disk in (a, b)]
        work = _Work(sides[0], sides[1], pieces(ranges, max(_PIECE, unit)), unit, first)
        with ThreadPoolExecutor(_THREADS) as pool:
            threads = [asyncio.get_running_loop().run_in_executor(pool, work.run) for _number in range(_THREADS)]
            try:
                await asyncio.gather(*threads)
            except BaseException:
                work.stop()
                raise
        return work.found()


async def copy(source: Disk, target: Image, content: Content) -> None:
    """Write the content into the image ``target``, a new overlay.

    :raise FileFailed, ImageToolFailed: it failed; the target is of no use.
    """
    async with _opened(source, content.data) as side, qemu_img.served(target, writable=True) as sock:
        await asyncio.to_thread(_copy, side, sock, target.path, content)


def _copy(side: _Side, sock: t.Any, path: str, content: Content) -> None:
    buffer = memoryview(mmap.mmap(-1, _PIECE))
    try:
        server = Nbd(sock)
        for start, end in content.zeroes:
            server.write_zeroes(start, end - start)
        for start, end in pieces(content.data, _PIECE):
            side.fill(start, buffer[: end - start])
            server.write(start, buffer[: end - start])
        server.flush()
        server.close()
    except NbdFailed as exc:
        if not exc.errno:
            raise
        kind = SpaceExhausted if exc.errno in (errno.ENOSPC, errno.EDQUOT) else FileFailed
        raise kind(path=path, doing=str(exc), reason=os.strerror(exc.errno)) from exc


class _Side:
    """Reads a disk at any place, from several threads."""

    def __init__(self, disk: Disk, server: Nbd | None) -> None:
        self._extents = disk.extents
        self._starts = [each.start for each in disk.extents]
        self._server, self._lock = server, threading.Lock()
        self._files: dict[str, tuple[int, int | None]] = {}

    def open(self, ranges: t.Sequence[Range], stack: contextlib.ExitStack) -> None:
        for path in {each.file for each in self._extents if each.offset is not None and each.file}:
            with _named(path):
                self._files[path] = _descriptors(path, stack)

    def fill(self, start: int, view: memoryview) -> None:
        end, number = start + len(view), max(bisect.bisect_right(self._starts, start) - 1, 0)
        position = start
        while position < end and number < len(self._extents):
            each = self._extents[number]
            stop = min(end, each.end)
            if stop > position:
                part = view[position - start : stop - start]
                if each.zero:
                    _clear(part)
                elif each.offset is not None and each.file is not None:
                    self._read(each.file, each.offset + position - each.start, part)
                else:
                    self._ask(position, part)
                position = stop
            number += 1
        _clear(view[position - start :])  # beyond the end of a disk that is shorter

    def _read(self, path: str, offset: int, view: memoryview) -> None:
        """From the page cache what is in there; from the disk the rest, without pushing the guests' pages out."""
        plain, direct = self._files[path]
        with _named(path):
            if direct is not None:
                count = _cached(plain, view, offset)
                view, offset = view[count:], offset + count
                if view and not (offset | len(view) | _address(view)) % _DIRECT_UNIT:
                    count = os.preadv(direct, [view], offset)
                    view, offset = view[count:], offset + count
            while view:
                count = os.preadv(plain, [view], offset)
                if not count:
                    _clear(view)  # a file that ends within a cluster
                    return
                view, offset = view[count:], offset + count

    def _ask(self, offset: int, view: memoryview) -> None:
        with self._lock:
            if self._server is None:
                raise NbdFailed("reading")
            length = min(len(view), max(self._server.size - offset, 0))
            self._server.read_into(offset, view[:length])
            _clear(view[length:])


class _Work:
    """Pieces that threads take and compare, and what they find."""

    def __init__(self, a: _Side, b: _Side, todo: t.Iterator[Range], unit: int, first: bool) -> None:
        self._sides, self._todo, self._unit, self._first = (a, b), todo, unit, first
        self._lock, self._stopped = threading.Lock(), False
        self._data: list[Range] = []
        self._zeroes: list[Range] = []
        self._room = max(_PIECE, unit)

    def run(self) -> None:
        buffers = [mmap.mmap(-1, self._room) for _number in range(3)]  # a, b, and zeroes for ever
        views = [memoryview(buffer) for buffer in buffers]
        while (piece := self._next()) is not None:
            start, end = piece
            for side, view in zip(self._sides, views):
                side.fill(start, view[: end - start])
            self._compare(start, end, *(_address(view) for view in views))

    def stop(self) -> None:
        self._stopped = True

    def found(self) -> Content:
        return Content(joined(self._data), joined(self._zeroes))

    def _next(self) -> Range | None:
        with self._lock:
            return None if self._stopped else next(self._todo, None)

    def _compare(self, start: int, end: int, a: int, b: int, zeroes: int) -> None:
        if not _MEMCMP(a, b, end - start):
            return
        for position in range(0, end - start, self._unit):
            length = min(self._unit, end - start - position)
            if not _MEMCMP(a + position, b + position, length):
                continue
            empty = not _MEMCMP(a + position, zeroes, length)
            with self._lock:
                (self._zeroes if empty else self._data).append((start + position, start + position + length))
                self._stopped = self._stopped or self._first


@contextlib.asynccontextmanager
async def _opened(disk: Disk, ranges: t.Sequence[Range]) -> t.AsyncIterator[_Side]:
    """The disk, and a server for it only if something of the ranges cannot be read from a file."""
    unmapped = [(each.start, each.end) for each in disk.extents if not each.mapped]
    async with contextlib.AsyncExitStack() as stack:
        server = None
        if disk.image is not None and common(unmapped, list(ranges)):
            sock = await stack.enter_async_context(qemu_img.served(disk.image, writable=False))
            server = await asyncio.to_thread(Nbd, sock)
        side = _Side(disk, server)
        side.open(ranges, stack.enter_context(contextlib.ExitStack()))
        try:
            yield side
            if server is not None:
                server.close()
        except NbdFailed as exc:
            path = disk.image.path if disk.image is not None else ""
            said = os.strerror(exc.errno) if exc.errno else "the server speaks no NBD"
            raise ImageToolFailed(tool="qemu-nbd", image=path, said=f"{exc}: {said}") from exc


def _descriptors(path: str, stack: contextlib.ExitStack) -> tuple[int, int | None]:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    plain = os.open(path, flags)
    stack.callback(os.close, plain)
    try:
        direct = os.open(path, flags | os.O_DIRECT)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return plain, None
    stack.callback(os.close, direct)
    return plain, direct


def _cached(fd: int, view: memoryview, offset: int) -> int:
    """Read what needs no disk. How many bytes that were; a multiple of what direct I/O takes, or all."""
    try:
        count = os.preadv(fd, [view], offset, os.RWF_NOWAIT)
    except OSError as exc:
        if exc.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        return 0
    return count if count == len(view) else count // _DIRECT_UNIT * _DIRECT_UNIT


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if view else 0


def _clear(view: memoryview) -> None:
    if view:
        ctypes.memset(_address(view), 0, len(view))


@contextlib.contextmanager
def _named(path: str) -> t.Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise FileFailed(path=path, doing="reading the image", reason=exc.strerror or str(exc)) from exc
