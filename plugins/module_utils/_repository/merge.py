# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Removing a published backup, and replacing one by another that reads the same. Killed anywhere, nothing is half done.

Whoever uses it holds the VM's lock. The names tell a later run what to do:

======================  ===========================================================================================
``.ID.RANDOM.merging``  the replacement in the making, or (after the exchange) what was replaced: remove it
``.ID.replaced``        what is replaced, where two directories cannot be exchanged at once: put it back if ID is gone
``.ID.pruned``          a removed backup: remove the rest of it
======================  ===========================================================================================

The random digits are for the qemu-img of a killed run, which may live on for a moment: it never finds the files of a
later run under the names that it was given.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import typing as t
from dataclasses import dataclass, field

from .._errors import ManifestInvalid
from ._files import NO_LINKS, is_real_directory, named, own, read_small, sync_directory, write_atomic
from .manifest import MAX_BYTES, Manifest
from .names import MANIFEST, is_backup_id

PROTECTED = "protected"
MERGING, REPLACED, PRUNED = ".merging", ".replaced", ".pruned"

_NAME = re.compile(r"\.(?P<id>[^.]+)(?:\.[0-9a-f]{8}(?=\.merging))?(?P<kind>\.merging|\.replaced|\.pruned)")
_EXCHANGE = 2  # RENAME_EXCHANGE
_AT_FDCWD = -100
_CLONE = 0x40049409  # FICLONE: the copy shares the blocks (XFS, btrfs)
_CHUNK = 1 << 20
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class Leftover:
    """What a killed run left for ``backup``: ``kind`` is one of the suffixes; ``restores``: the backup is in it."""

    path: str
    backup: str
    kind: str
    restores: bool = False

    @property
    def hidden(self) -> bool:
        """The run was killed before or after its last look at who has the images open."""
        there = os.path.join(os.path.dirname(self.path), self.backup)
        return self.kind == PRUNED and not os.path.lexists(there) and os.path.lexists(os.path.join(self.path, MANIFEST))


def leftovers(directory: str) -> tuple[Leftover, ...]:
    """What killed runs of pruning left in a VM's directory. What cannot be told is not listed, and stays."""
    found = []
    for name in sorted(os.listdir(directory)) if is_real_directory(directory) else ():
        shape = _NAME.fullmatch(name)
        path = os.path.join(directory, name)
        if shape is None or not is_backup_id(shape["id"]) or not is_real_directory(path):
            continue
        there = os.path.lexists(os.path.join(directory, shape["id"], MANIFEST))
        aside = is_real_directory(os.path.join(directory, f".{shape['id']}{REPLACED}"))
        restores = shape["kind"] == REPLACED and not there
        if there or aside or shape["kind"] == PRUNED:
            found.append(Leftover(path, shape["id"], shape["kind"], restores))
    return tuple(found)


def recover(found: t.Iterable[Leftover]) -> None:
    """Finish or undo what killed runs left; putting back comes first, because it is what backups need."""
    for leftover in sorted(found, key=lambda entry: not entry.restores):
        with named(leftover.path, "cleaning up after an earlier run"):
            parent = os.path.dirname(leftover.path)
            if leftover.restores:
                os.rename(leftover.path, os.path.join(parent, leftover.backup))
                sync_directory(parent)
            else:
                shutil.rmtree(leftover.path)


def is_protected(directory: str, backup: str) -> bool:
    return os.path.lexists(os.path.join(directory, backup, PROTECTED))


def protect(directory: str, backup: str, wanted: bool) -> None:
    """Make the marker of a published backup be there, or not."""
    place = os.path.join(directory, backup)
    with named(place, "protecting the backup" if wanted else "ending the protection of the backup"):
        if wanted and not is_protected(directory, backup):
            write_atomic(place, PROTECTED, b"", 0o440)
            info = os.lstat(os.path.join(place, MANIFEST))
            own(os.path.join(place, PROTECTED), info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode))
        elif not wanted and is_protected(directory, backup):
            os.unlink(os.path.join(place, PROTECTED))
            sync_directory(place)


def hide(directory: str, backup: str) -> str:
    """Take a backup out of the catalogue, durably; where it is now. No open of its path succeeds from here on."""
    path = os.path.join(directory, f".{backup}{PRUNED}")
    with named(os.path.join(directory, backup), "removing the backup"):
        if os.path.lexists(path):
            shutil.rmtree(path)
        os.rename(os.path.join(directory, backup), path)
        sync_directory(directory)
    return path


def unhide(directory: str, backup: str) -> None:
    with named(os.path.join(directory, backup), "putting the backup back"):
        os.rename(os.path.join(directory, f".{backup}{PRUNED}"), os.path.join(directory, backup))
        sync_directory(directory)


def discard(path: str) -> None:
    """Remove a hidden directory and all in it."""
    with named(path, "removing the backup's files"):
        shutil.rmtree(path)


@dataclass(frozen=True)
class Replacement:
    """A backup in the making that shall stand in for the published ``backup`` of the VM's ``directory``."""

    directory: str
    backup: str
    token: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def place(self) -> str:
        return os.path.join(self.directory, f".{self.backup}.{self.token}{MERGING}")

    @property
    def published(self) -> str:
        return os.path.join(self.directory, self.backup)

    def begin(self) -> None:
        with named(self.place, "making room for the merged backup"):
            info = os.stat(self.published)
            os.mkdir(self.place, 0o700)
            own(self.place, info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode) | 0o700)

    def image(self, file: str) -> str:
        """A new empty image for qemu-img to write into; its path."""
        path = os.path.join(self.place, file)
        with named(path, "making the merged image"):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        return path

    def copy(self, file: str) -> str:
        """A copy of an image to go on with, with shared blocks where the file system can; its path."""
        path = os.path.join(self.place, file)
        old = os.path.join(self.published, file)
        with named(path, "copying the image to be merged"), open(old, "rb") as source, open(path, "xb") as target:
            os.fchmod(target.fileno(), 0o600)
            try:
                fcntl.ioctl(target.fileno(), _CLONE, source.fileno())
            except OSError:
                shutil.copyfileobj(source, target, _CHUNK)
        return path

    def seal(self, file: str) -> int:
        """Sync the image, and give it the owner and mode of the one it stands in for; its length."""
        path = os.path.join(self.place, file)
        with named(path, "sealing the merged image"):
            old = os.stat(os.path.join(self.published, file))
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                own(fd, old.st_uid, old.st_gid, stat.S_IMODE(old.st_mode))
                os.fsync(fd)
                return os.fstat(fd).st_size
            finally:
                os.close(fd)

    def carry(self, without: t.Collection[str]) -> None:
        """Everything else of the backup, as hard links (copies where there are none)."""
        with named(self.place, "taking over the backup's other files"):
            for root, directories, files in os.walk(self.published):
                inside = os.path.relpath(root, self.published)
                for name in directories:
                    self._make_directory(os.path.join(root, name), os.path.join(self.place, inside, name))
                for name in files:
                    if not name.endswith(".tmp") and (inside != "." or name not in without):
                        _link(os.path.join(root, name), os.path.normpath(os.path.join(self.place, inside, name)))

    def _make_directory(self, old: str, new: str) -> None:
        info = os.stat(old)
        os.mkdir(new, 0o700)
        own(new, info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode))

    def complete(self, manifest: bytes) -> Manifest:
        """Write the manifest, and make all of it durable; nothing has been replaced by then.

        :raise ManifestInvalid: no reader would accept the manifest.
        """
        path = os.path.join(self.place, MANIFEST)
        vm_directory = os.path.basename(self.directory)
        parsed = Manifest.from_json(manifest, path, backup_id=self.backup, vm_directory=vm_directory)
        with named(self.place, "completing the merged backup"):
            old = os.stat(os.path.join(self.published, MANIFEST))
            mode = stat.S_IMODE(os.stat(self.published).st_mode)
            write_atomic(self.place, MANIFEST, manifest, 0o600)
            own(path, old.st_uid, old.st_gid, stat.S_IMODE(old.st_mode))
            os.chmod(self.place, mode)
            sync_directory(self.place)
        return parsed

    def swap(self) -> None:
        """Take the place of the published backup, in one step where the file system can exchange two directories."""
        with named(self.place, "publishing the merged backup"):
            if not _exchange(self.place, self.published):
                self._move()
            sync_directory(self.directory)
        discard(self.place if os.path.lexists(self.place) else self._replaced)

    @property
    def _replaced(self) -> str:
        return os.path.join(self.directory, f".{self.backup}{REPLACED}")

    def _move(self) -> None:
        """In two steps: for a moment there is no such backup. A run that ends there is undone by the next one."""
        os.rename(self.published, self._replaced)
        os.rename(self.place, self.published)

    def drop(self) -> None:
        """Give up. Quiet: the next run removes what cannot be removed now."""
        shutil.rmtree(self.place, ignore_errors=True)


def read_raw_manifest(directory: str, backup: str) -> bytes:
    """The bytes of a published manifest: keys of later releases have to survive a merge."""
    path = os.path.join(directory, backup, MANIFEST)
    try:
        return read_small(path, MAX_BYTES)
    except OSError as exc:
        raise ManifestInvalid(path=path, reason=exc.strerror or str(exc)) from exc


def _exchange(a: str, b: str) -> bool:
    """Exchange two names at once; false where this file system (or C library) cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), b)


def _link(old: str, new: str) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except FileNotFoundError:
        if os.path.lexists(old):
            raise
        return  # a record beside the manifest, which goes and comes without the lock
    except OSError as exc:
        if exc.errno not in NO_LINKS:
            raise
        shutil.copy2(old, new, follow_symlinks=False)
        info = os.lstat(old)
        os.chown(new, info.st_uid, info.st_gid, follow_symlinks=False)
