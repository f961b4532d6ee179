# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Where a restored file comes into being: next to its destination, which appears complete or not at all.

``.NAME.xxxxxxxx.restoring/content`` is written, synced and then *linked* to the destination, which fails when anything
is there. ``.../lock`` is held (flock) by this process and by the qemu-img that writes, so what a killed run left behind
is told from what another run is writing by asking the kernel, not by age.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import typing as t
from dataclasses import dataclass

from .._errors import DestinationExists
from ._files import NO_LINKS, is_real_directory, named, sync_directory

_CONTENT, _LOCK = "content", "lock"
_TRIES = 20


@dataclass(frozen=True)
class Owner:
    """What a restored file belongs to; ``None`` leaves it as it was created."""

    uid: int | None = None
    gid: int | None = None
    mode: int = 0o600


@dataclass(frozen=True)
class Place:
    """A claimed place for the file ``dest``. ``lock`` is an open descriptor; hand it to whatever writes ``content``."""

    dest: str
    directory: str
    lock: int

    @property
    def content(self) -> str:
        """The empty file to be written."""
        return os.path.join(self.directory, _CONTENT)

    def finish(self, owner: Owner) -> None:
        """Give the written content its owner and mode, and make it durable."""
        with named(self.content, "finishing the restored file"):
            fd = os.open(self.content, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if owner.uid is not None or owner.gid is not None:
                    os.fchown(fd, -1 if owner.uid is None else owner.uid, -1 if owner.gid is None else owner.gid)
                os.fchmod(fd, owner.mode)
                os.fsync(fd)
            finally:
                os.close(fd)

    def appear(self) -> None:
        """Make the content be ``dest``.

        :raise DestinationExists: something came to be there in the meantime; it was not touched.
        """
        with named(self.dest, "putting the restored file in place"):
            try:
                os.link(self.content, self.dest)
            except FileExistsError:
                raise DestinationExists(path=self.dest) from None
            except OSError as exc:
                if exc.errno not in NO_LINKS:
                    raise
                self._claim_and_rename()
            sync_directory(os.path.dirname(self.dest))

    def _claim_and_rename(self) -> None:
        """Without hard links: an empty file of ours takes the name (or fails), and is then replaced at once."""
        try:
            os.close(os.open(self.dest, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            raise DestinationExists(path=self.dest) from None
        os.rename(self.content, self.dest)

    def replace(self) -> None:
        """Make the content be ``dest`` in place of the file there, which the caller has kept under another name."""
        with named(self.dest, "putting the restored file in place"):
            os.rename(self.content, self.dest)
            sync_directory(os.path.dirname(self.dest))

    def drop(self) -> None:
        """Remove the place; what has appeared stays. Idempotent, and quiet: the next run removes what is left."""
        shutil.rmtree(self.directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self.lock)


def claim(dest: str) -> Place:
    """Make a place for ``dest``, whose directory must exist.

    :raise TargetUnwritable: not allowed there.
    """
    parent, name = os.path.split(dest)
    with named(parent, "making room for the restored file"):
        for _attempt in range(_TRIES):
            directory = os.path.join(parent, f".{name}.{secrets.token_hex(4)}.restoring")
            os.mkdir(directory, 0o700)
            lock = _lock_new(directory)
            if lock is not None:
                place = Place(dest, directory, lock)
                try:
                    os.close(os.open(place.content, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                except OSError:
                    place.drop()
                    raise
                return place
        raise OSError(errno.EBUSY, "another run keeps removing it", parent)


def _lock_new(directory: str) -> int | None:
    """The held lock; ``None`` when another run took the directory for a leftover before it was locked."""
    path = os.path.join(directory, _LOCK)
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:
            return lock
    except BlockingIOError:
        pass
    os.close(lock)
    return None


def remove_leftovers(dest: str) -> list[str]:
    """Remove what killed runs left next to ``dest``, and nothing that is still being written. What was removed."""
    parent, name = os.path.split(dest)
    pattern = re.compile(re.escape(f".{name}.") + r"[0-9a-f]{8}\.restoring")
    try:
        names = [entry for entry in os.listdir(parent) if pattern.fullmatch(entry)]
    except OSError:
        return []  # claim() says what is wrong with the directory
    directories = [os.path.join(parent, entry) for entry in names]
    return [directory for directory in directories if is_real_directory(directory) and _remove_if_dead(directory)]


def _remove_if_dead(directory: str) -> bool:
    try:
        lock = os.open(os.path.join(directory, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        with contextlib.suppress(OSError):  # not empty: being removed by another run
            os.rmdir(directory)
            return True
        return False
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
        return not os.path.lexists(directory)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)


@contextlib.contextmanager
def undoing() -> t.Iterator[list[t.Callable[[], None]]]:
    """Steps back, run last first when the block fails or is cancelled; each may fail without stopping the others."""
    steps: list[t.Callable[[], None]] = []
    try:
        yield steps
    except BaseException:
        for step in reversed(steps):
            with contextlib.suppress(OSError):
                step()
        raise
