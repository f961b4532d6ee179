# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Room for an image: what is free, reserving it before anything depends on it, and giving back what was not needed."""

from __future__ import annotations

import ctypes
import errno
import os

from .._errors import NoSpace
from ._files import named

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_CLUSTER = 1 << 16


def available(path: str) -> int:
    """Bytes an ordinary user may still write on the file system of ``path``."""
    with named(path, "asking for the free space"):
        status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def require(path: str, needed: int, what: str) -> None:
    """Raises NoSpace when ``needed`` bytes are not free."""
    free = available(path)
    if needed > free:
        raise NoSpace(what=what, needed=needed, path=path, available=free)


def reserve(fd: int, size: int, path: str, what: str) -> None:
    """Allocate ``size`` bytes of an open file, so that the copy cannot run out of space half way.

    Writes into allocated space are also quicker. Where the file system cannot allocate (NFS before 4.2), nothing
    happens: posix_fallocate() would write the zeros there. Raises NoSpace.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    allocate = getattr(libc, "fallocate64", None) or libc.fallocate
    allocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if allocate(fd, 0, 0, size) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise NoSpace(what=what, needed=size, path=path, available=available(os.path.dirname(path)))
    if number not in _UNSUPPORTED:
        with named(path, "reserving space"):
            raise OSError(number, os.strerror(number))


def trim(path: str, end: int) -> None:
    """Cut an image off behind the last cluster that was written (``end`` bytes), giving back the rest."""
    with named(path, "cutting the image to its length"):
        wanted = -(-end // _CLUSTER) * _CLUSTER
        if end and wanted < os.stat(path).st_size:
            os.truncate(path, wanted)
