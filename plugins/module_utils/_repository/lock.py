# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The lock of one VM's backups: a kernel lock that ends with its process, so it cannot go stale.

The text in the file tells a human (and the error message) who holds it, and never decides anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import typing as t
from datetime import datetime, timezone

from .._errors import RepositoryLocked
from ._files import named, read_small
from .manifest import MAX_BYTES
from .names import timestamp

_POLL = 0.1  # seconds
_BUSY = (errno.EAGAIN, errno.EACCES)


@contextlib.asynccontextmanager
async def exclusive(path: str, vm: str, timeout: float) -> t.AsyncIterator[None]:
    """Hold the lock file ``path``, waiting at most ``timeout`` seconds for whoever holds it.

    :raise RepositoryLocked: still held at the deadline; says by whom as far as the file tells.
    :raise TargetUnwritable: the file cannot be made.
    """
    began = time.monotonic()
    fd = _try(path)
    while fd is None:
        waited = time.monotonic() - began
        if waited >= timeout:
            raise RepositoryLocked(vm=vm, holder=holder(path), waited=round(waited, 1), path=path)
        await asyncio.sleep(min(_POLL, max(timeout - waited, 0.001)))
        fd = _try(path)
    try:
        yield
    finally:
        os.close(fd)


def _try(path: str) -> int | None:
    """An open, locked file, or ``None`` while another process (or task) has it."""
    with named(path, "locking"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, fd):
                _sign(fd)
                return fd
        except OSError as exc:
            if exc.errno not in _BUSY:
                os.close(fd)
                raise
        os.close(fd)
        return None


def _is_still(path: str, fd: int) -> bool:
    """False when the file was removed (with its directory) between open and flock: that lock guards nothing."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _sign(fd: int) -> None:
    text = {"host": socket.gethostname(), "pid": os.getpid(), "since": timestamp(datetime.now(timezone.utc))}
    with contextlib.suppress(OSError):  # a full file system must not keep the lock (for prune!) from being taken
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(text).encode(), 0)


def holder(path: str) -> str:
    """Who wrote the lock file, as a phrase. Only worth saying while the lock is held."""
    try:
        text = json.loads(read_small(path, MAX_BYTES).decode())
        return f"process {int(text['pid'])} on {str(text['host'])[:64]!r} since {str(text['since'])[:32]}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
