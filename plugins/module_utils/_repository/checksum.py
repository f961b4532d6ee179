# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""SHA-256 of big files: off the event loop, past the host's page cache, reading and hashing at the same time.

The page cache belongs to the guests (and freshly filled cache is 2-5 times slower than direct reads on the hosts
measured), so files are read with O_DIRECT; where the file system refuses, buffered and dropped afterwards.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import mmap
import os
import queue
import stat
import threading
import typing as t

from .._errors import FileFailed
from ._files import os_error

_CHUNK = 1 << 20  # bytes; a multiple of every block size, and as fast as bigger ones (measured)
_BUFFERS = 4


async def sha256(path: str) -> str:
    """The hexadecimal digest of the regular file ``path``. Cancelling stops the threads within one chunk.

    :raise FileFailed: it cannot be read, or is no regular file.
    """
    stop = threading.Event()
    try:
        return await asyncio.get_running_loop().run_in_executor(None, sha256_of, path, stop)
    except asyncio.CancelledError:
        stop.set()
        raise


def sha256_of(path: str, stop: threading.Event | None = None) -> str:
    """As :func:`sha256`, blocking."""
    try:
        fd, direct = _open(path)
        try:
            return _digest(fd, direct, stop or threading.Event())
        finally:
            os.close(fd)
    except OSError as exc:
        raise os_error(exc, path, "reading for the checksum") from exc


def _open(path: str) -> tuple[int, bool]:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd, direct = os.open(path, flags | os.O_DIRECT), True
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        fd, direct = os.open(path, flags), False
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileFailed(path=path, doing="reading for the checksum", reason="it is not a regular file")
    return fd, direct


def _digest(fd: int, direct: bool, stop: threading.Event) -> str:
    """A second thread reads ahead into a few buffers; this one hashes them. Both release the interpreter lock."""
    free: queue.Queue[mmap.mmap | None] = queue.Queue()
    full: queue.Queue[tuple[mmap.mmap, int] | OSError | None] = queue.Queue()
    for _number in range(_BUFFERS):
        free.put(mmap.mmap(-1, _CHUNK))  # page-aligned, as O_DIRECT wants
    reader = threading.Thread(target=_read, args=(fd, direct, free, full, stop), daemon=True)
    reader.start()
    digest = hashlib.sha256()
    try:
        while True:
            item = full.get()
            if item is None:
                return digest.hexdigest()
            if isinstance(item, OSError):
                raise item
            buffer, length = item
            with memoryview(buffer) as view, view[:length] as part:
                digest.update(part)
            free.put(buffer)
    finally:
        free.put(None)
        reader.join()


def _read(fd: int, direct: bool, free: queue.Queue[t.Any], full: queue.Queue[t.Any], stop: threading.Event) -> None:
    position = 0
    try:
        while not stop.is_set():
            buffer = free.get()
            if buffer is None:
                return
            length = os.preadv(fd, [buffer], position)
            if not length:
                break
            if not direct:
                os.posix_fadvise(fd, position, length, os.POSIX_FADV_DONTNEED)
            full.put((buffer, length))
            position += length
        full.put(OSError(errno.ECANCELED, "cancelled") if stop.is_set() else None)
    except OSError as exc:
        full.put(exc)
