# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Small durable steps on files, with named errors. Nothing here follows a link in the last component of a path."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import typing as t

from .._errors import BlockOpsError, FileFailed, SpaceExhausted, TargetUnwritable

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# What file systems without hard links answer (vfat, some FUSE and SMB mounts).
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def os_error(exc: OSError, path: str, doing: str) -> BlockOpsError:
    """The named error for ``exc``; ``doing`` is a gerund phrase such as "writing"."""
    reason = exc.strerror or str(exc)
    if exc.errno in _FULL:
        return SpaceExhausted(path=path, doing=doing, reason=reason)
    if exc.errno in _FORBIDDEN:
        return TargetUnwritable(path=path, reason=f"{doing} failed: {reason}")
    return FileFailed(path=path, doing=doing, reason=reason)


@contextlib.contextmanager
def named(path: str, doing: str) -> t.Iterator[None]:
    """Turn an OSError of the block into its named error."""
    try:
        yield
    except OSError as exc:
        raise os_error(exc, path, doing) from exc


def sync_directory(path: str) -> None:
    """Make names that were added to or removed from the directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_temporary(directory: str, name: str, data: bytes, mode: int, *, durable: bool = True) -> str:
    """A new (synced) file next to where ``name`` shall be; its path. The caller links or renames it, or removes it."""
    path = os.path.join(directory, f".{name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        write_all(fd, data)
        os.fchmod(fd, mode)
        if durable:
            os.fsync(fd)
    except OSError:
        remove_quietly(path)
        raise
    finally:
        os.close(fd)
    return path


def write_atomic(directory: str, name: str, data: bytes, mode: int, *, durable: bool = True) -> None:
    """Write or replace a small file: a reader sees the old or the new one, if ``durable`` also after a power cut."""
    temporary = write_temporary(directory, name, data, mode, durable=durable)
    try:
        os.rename(temporary, os.path.join(directory, name))
    except OSError:
        remove_quietly(temporary)
        raise
    if durable:
        sync_directory(directory)


def own(path: str | int, uid: int | None, gid: int | None, mode: int) -> None:
    """Give a file or directory of ours (or the open descriptor of one) its owner, then its mode: chown clears bits."""
    if uid is not None or gid is not None:
        os.chown(path, -1 if uid is None else uid, -1 if gid is None else gid)
    os.chmod(path, mode)


def remove_temporaries(directory: str, *names: str) -> None:
    """Remove what killed runs left of :func:`write_temporary` for these names."""
    prefixes = tuple(f".{name}." for name in names)
    for entry in os.listdir(directory):
        if entry.startswith(prefixes) and entry.endswith(".tmp"):
            remove_quietly(os.path.join(directory, entry))


def remove_quietly(path: str) -> None:
    """Remove a file of ours that may be gone; what cannot be removed is left to the next run."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def read_small(path: str, limit: int) -> bytes:
    """At most ``limit`` + 1 bytes of a regular file (so that the caller sees that there is more).

    :raise OSError: it cannot be read; ELOOP for a link, EINVAL for what is no regular file.
    """
    # O_NONBLOCK: a FIFO in a hostile tree must not hang us.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as stream:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return stream.read(limit + 1)


def is_real_directory(path: str) -> bool:
    """True for a directory that is not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False
