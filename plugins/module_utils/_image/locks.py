# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The locks that QEMU takes on image files: looking at them, and taking the same ones to keep QEMUs out."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import typing as t

from .._errors import FileFailed, ImageInUse

# QEMU's locks on image files (file-posix.c): byte 100 + n is held by who uses permission n, 1 being "write".
# Byte 200 + n is held by who does not let others use permission n. Together they span all of a user's locks.
_WRITERS_BYTE, _NO_WRITERS_BYTE = 101, 201
_FIRST_BYTE, _BYTES = 100, 200
_OURS_BYTE = 300  # none of QEMU's: two runs of ours keep each other out
_FLOCK = "hhqqi"


def open_for_writing(path: str) -> bool:
    """Whether a QEMU (any process that locks images the way QEMU does) has the image open for writing."""
    return _locked(path, _WRITERS_BYTE, 1)


def in_use(path: str) -> bool:
    """Whether a QEMU has the image open at all, be it as the backing image of a VM that was restored instantly."""
    return _locked(path, _FIRST_BYTE, _BYTES)


@contextlib.contextmanager
def held(path: str, *, writing: bool = False) -> t.Iterator[t.Callable[[], None]]:
    """Keep QEMUs from opening the image for writing, and other runs of ours from working on it, while the block runs.

    With ``writing`` a qemu-img may open it, which keeps others out itself as long as it runs; what the block is given
    then shuts them all out. Where a file system has no locks this does nothing.

    :raise ImageInUse: somebody writes to it, or another run holds it, or has just replaced it.
    :raise FileFailed: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        raise FileFailed(path=path, doing="opening the image", reason=exc.strerror or str(exc)) from exc

    def look() -> None:
        if open_for_writing(path) or not os.path.samestat(os.fstat(fd), os.stat(path)):
            raise ImageInUse(image=_absolute(path), said="its lock for writing is held, or it was just replaced")

    def shut() -> None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, _NO_WRITERS_BYTE, 1, 0))
        look()

    try:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _OURS_BYTE, 1, 0))
        except OSError as exc:
            if exc.errno in (errno.EACCES, errno.EAGAIN):
                raise ImageInUse(image=_absolute(path), said="another run of this collection works on it") from exc
        # As QEMU does it: first the lock, then the look.
        look() if writing else shut()
        yield shut
    finally:
        os.close(fd)


@contextlib.contextmanager
def unwritten(path: str) -> t.Iterator[None]:
    """Keep QEMUs from opening the image for writing while the block runs; reading it needs no more than that.

    :raise ImageInUse: somebody writes to it.
    :raise FileFailed: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        raise FileFailed(path=path, doing="opening the image", reason=exc.strerror or str(exc)) from exc
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, _NO_WRITERS_BYTE, 1, 0))
        if open_for_writing(path):
            raise ImageInUse(image=_absolute(path), said="its lock for writing is held")
        yield
    finally:
        os.close(fd)


def _locked(path: str, start: int, length: int) -> bool:
    """Whether anybody holds a lock on these bytes, asked without taking one."""
    probe = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, probe)
        return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(fd)


def _absolute(path: str) -> str:
    return os.path.join(os.getcwd(), path)
