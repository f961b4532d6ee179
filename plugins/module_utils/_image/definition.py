# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The files a VM is started from: read whole, replaced whole, never without a copy of what was there before.

They are the administrator's own (a script, a unit, a file for QEMU's command line), so owner, mode and extended
attributes stay, a link stays a link, and a reader sees the old file or the new one, also after a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import typing as t
from dataclasses import dataclass

from .._errors import BlockOpsError, FileFailed, TargetUnwritable

BACKUP_SUFFIX = ".before-snapshot"
_LIMIT = 1 << 22


class DefinitionUnreadable(BlockOpsError):
    template = "The file {path}, listed in definition, cannot be read: {reason}."
    advice = "Nothing was started. Correct the option definition."


class DefinitionChanged(BlockOpsError):
    template = "The file {path} is not what it was when this task read it: somebody else changed it in between."
    advice = "It was not touched. Run the task again."


@dataclass(frozen=True)
class DefinitionFile:
    """``path`` as it was given, ``real`` the file it leads to, and its content (no more than the limit, and a byte)."""

    path: str
    real: str
    content: bytes

    @property
    def text(self) -> bool:
        """Firmware variables may be listed as well, as they are for backups: a binary file, which names no image."""
        return len(self.content) <= _LIMIT and b"\0" not in self.content


def read_definition(path: str) -> DefinitionFile:
    """Read the file that ``path`` (an absolute one, maybe a link) leads to.

    :raise DefinitionUnreadable: there is none, or it is no regular file.
    """
    real = os.path.realpath(path)
    if not os.path.isabs(path):
        raise DefinitionUnreadable(path=path, reason="it is not an absolute path")
    try:
        content = _content(real)
    except OSError as exc:
        raise DefinitionUnreadable(path=path, reason=exc.strerror or str(exc)) from exc
    if content is None:
        raise DefinitionUnreadable(path=path, reason="it is not a regular file")
    return DefinitionFile(path, real, content)


def require_writable(path: str) -> None:
    """See beforehand that the file can be replaced, so that nothing is started that could not be ended.

    :raise TargetUnwritable: its directory cannot be written.
    """
    directory = os.path.dirname(path)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise TargetUnwritable(path=directory, reason=f"{os.path.basename(path)} could not be replaced")


def keep_copy(path: str, content: bytes) -> str:
    """Keep ``content``, which the file has now, beside it; the path of the copy.

    ``NAME.before-snapshot``, or with a number when that is another state of the file; an equal one is not made twice.
    """
    number = 0
    with _named(path, "keeping a copy"):
        while True:
            kept = f"{path}{BACKUP_SUFFIX}" + (f".{number}" if number else "")
            try:
                os.close(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            except FileExistsError:
                if _is(kept, content):
                    return kept
                number += 1
                continue
            # The name is ours now; an empty file is all that a kill can leave there.
            try:
                _put(path, content, kept)
            except OSError:
                _remove(kept)
                raise
            return kept


def replace_definition(path: str, before: bytes, after: bytes) -> None:
    """Give the file (not a link) another content, if it still has ``before``.

    :raise DefinitionChanged: it has not; nothing was touched.
    """
    with _named(path, "replacing it"):
        if _content(path) != before:
            raise DefinitionChanged(path=path)
        _put(path, after, path)


def remove_copy(kept: str, content: bytes) -> None:
    """Remove a copy that says nothing any more because the file itself has that content again."""
    with _named(kept, "removing a copy"):
        if _is(kept, content):
            os.unlink(kept)
            _sync_directory(os.path.dirname(kept))


def _put(model: str, content: bytes, dest: str) -> None:
    """Make ``dest`` a file with this content and all else of ``model``: complete, durable, at once."""
    directory, name = os.path.split(dest)
    _sweep(directory, name)
    temporary = os.path.join(directory, f".{name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as stream:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, see _sweep
            stream.write(content)
            stream.flush()
            _look_like(model, fd)
            os.fsync(fd)
        os.rename(temporary, dest)
    except OSError:
        _remove(temporary)
        raise
    _sync_directory(directory)


def _sweep(directory: str, name: str) -> None:
    """Remove what killed runs have left of the same file: temporary ones that nobody holds."""
    pattern = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.tmp")
    for found in os.listdir(directory):
        if pattern.fullmatch(found) is None:
            continue
        path = os.path.join(directory, found)
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


def _look_like(model: str, fd: int) -> None:
    """Owner, extended attributes (access lists, labels), mode; the mode last, because a change of owner clears bits."""
    wanted, given = os.stat(model), os.fstat(fd)
    if (wanted.st_uid, wanted.st_gid) != (given.st_uid, given.st_gid):
        os.fchown(fd, wanted.st_uid, wanted.st_gid)
    for name in _attributes(model):
        value = os.getxattr(model, name)
        if name not in _attributes(fd) or os.getxattr(fd, name) != value:
            os.setxattr(fd, name, value)
    os.fchmod(fd, stat.S_IMODE(wanted.st_mode))


def _attributes(file: str | int) -> list[str]:
    try:
        return os.listxattr(file)
    except OSError as exc:
        if exc.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return []
        raise


def _content(path: str) -> bytes | None:
    """At most a byte more than the limit; ``None`` for what is no regular file. O_NONBLOCK: a FIFO must not hang us."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as stream:
        return stream.read(_LIMIT + 1) if stat.S_ISREG(os.fstat(fd).st_mode) else None


def _is(path: str, content: bytes) -> bool:
    try:
        return _content(path) == content
    except OSError:
        return False


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _named(path: str, doing: str) -> t.Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise FileFailed(path=path, doing=doing, reason=exc.strerror or str(exc)) from exc
