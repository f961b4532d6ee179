# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""A backup in the making: the directory ``.ID.partial`` and the one way it becomes a backup (rule 4 of the format).

Whoever uses it holds the VM's lock. Killed anywhere, it leaves a partial directory or a backup, never half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import typing as t
from dataclasses import dataclass

from .._errors import BackupExists, DefinitionMissing, ManifestInvalid, PartialIncomplete
from ._files import named, own, read_small, remove_temporaries, sync_directory, write_all, write_atomic
from .manifest import MAX_BYTES, DefinitionRecord, Manifest
from .names import DEFINITION, INTENT, MANIFEST, has_control_characters, is_image_file

_DEFINITION_LIMIT = 256 << 20  # bytes per file; firmware variables and start-up files, not disks
_CHUNK = 1 << 20


def check_definition(paths: t.Sequence[str]) -> None:
    """See that every file can be saved, before anything else is done.

    :raise DefinitionMissing: the first that cannot.
    """
    seen: set[str] = set()
    for path in paths:
        if not path.startswith("/") or ".." in path.split("/") or has_control_characters(path):
            raise DefinitionMissing(path=path, reason="it is not an absolute path without .. and control characters")
        if path in seen:
            raise DefinitionMissing(path=path, reason="it is listed twice")
        seen.add(path)
        os.close(_open_definition(path))


def _open_definition(path: str) -> int:
    """Open for reading; links are followed, because start-up files often are ones."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise DefinitionMissing(path=path, reason=exc.strerror or str(exc)) from exc
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and info.st_size <= _DEFINITION_LIMIT:
        return fd
    os.close(fd)
    raise DefinitionMissing(path=path, reason=f"it is not a regular file of at most {_DEFINITION_LIMIT} bytes")


@dataclass(frozen=True)
class Partial:
    """``directory`` is ``.ID.partial`` in the VM's directory; ``vm`` the VM's name."""

    id: str
    directory: str
    vm: str

    def write_intent(self, intent: t.Mapping[str, t.Any]) -> None:
        """Record (replacing) what this run is about, for the run that has to clean up or go on.

        Not synced: it is of use only while QEMU lives, so not after a power cut.
        """
        with named(self._inside(INTENT), "writing"):
            write_atomic(self.directory, INTENT, json.dumps(intent, indent=1).encode(), 0o600, durable=False)

    def read_intent(self) -> dict[str, t.Any] | None:
        """The intent; ``None`` when there is none that can be understood (killed before it was written)."""
        try:
            intent = json.loads(read_small(self._inside(INTENT), MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        return intent if isinstance(intent, dict) else None

    def read_manifest(self) -> Manifest | None:
        """The manifest of a run that was killed just before its rename: all it lacks is :meth:`publish`."""
        path = self._inside(MANIFEST)
        vm_directory = os.path.basename(os.path.dirname(self.directory))
        try:
            return Manifest.from_json(read_small(path, MAX_BYTES), path, backup_id=self.id, vm_directory=vm_directory)
        except (OSError, ManifestInvalid):
            return None

    def image_path(self, file: str) -> str:
        """Where the image ``file`` is made.

        :raise PartialIncomplete: not a plain image name.
        """
        if not is_image_file(file):
            raise PartialIncomplete(backup=self.id, reason=f"{file!r} is not a plain file name ending in .qcow2")
        return self._inside(file)

    def create_image(self, file: str, mode: int) -> int:
        """A new empty image file; its open descriptor (read and write, close-on-exec) belongs to the caller."""
        path = self.image_path(file)
        with named(path, "making the image"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.fchmod(fd, mode)
            except OSError:
                os.close(fd)
                raise
        return fd

    def seal(self, file: str, uid: int | None, gid: int | None, mode: int) -> int:
        """Sync a finished image and make it what a published one is (``mode`` without write bits); its length in bytes.

        The owner comes before the mode: chown may clear bits, and afterwards we may no longer be allowed to chmod.
        """
        path = self.image_path(file)
        with named(path, "sealing the image"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                own(fd, uid, gid, mode)
                os.fsync(fd)
                return os.fstat(fd).st_size
            finally:
                os.close(fd)

    def save_definition(
        self, paths: t.Sequence[str], *, uid: int | None = None, gid: int | None = None, mode: int = 0o400
    ) -> tuple[DefinitionRecord, ...]:
        """Copy the files to ``definition/N``, synced; ``uid``, ``gid``, ``mode`` are those of the copies.

        :raise DefinitionMissing: one cannot be read (call :func:`check_definition` first; it may vanish later).
        """
        if not paths:
            return ()
        directory = self._inside(DEFINITION)
        with named(directory, "saving the definition"):
            os.makedirs(directory, exist_ok=True)
            own(directory, uid, gid, stat.S_IMODE(os.stat(self.directory).st_mode))
            records = tuple(self._save_one(path, n, uid, gid, mode) for n, path in enumerate(paths))
            sync_directory(directory)
        return records

    def _save_one(self, path: str, number: int, uid: int | None, gid: int | None, mode: int) -> DefinitionRecord:
        file = f"{DEFINITION}/{number}"
        digest, size = hashlib.sha256(), 0
        source = _open_definition(path)
        try:
            target = os.open(
                self._inside(file), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            try:
                for data in iter(lambda: os.read(source, _CHUNK), b""):
                    digest.update(data)
                    size += len(data)
                    write_all(target, data)
                own(target, uid, gid, mode)
                os.fsync(target)
            finally:
                os.close(target)
            info = os.fstat(source)
        finally:
            os.close(source)
        return DefinitionRecord(
            path, file, stat.S_IMODE(info.st_mode) & 0o777, info.st_uid, info.st_gid, size, digest.hexdigest()
        )

    def publish(self, manifest: Manifest, *, uid: int | None = None, gid: int | None = None, mode: int = 0o440) -> str:
        """Make it a backup (rule 4); the directory it is in now. The images are detached, sealed and checked by then.

        ``uid``, ``gid`` and ``mode`` are the manifest's.

        :raise BackupExists: the id is taken.
        :raise PartialIncomplete: a file is missing or has another length than the manifest says.
        :raise ManifestInvalid: the manifest is one that no reader would accept.
        """
        parent = os.path.dirname(self.directory)
        target = os.path.join(parent, self.id)
        if os.path.lexists(target):
            raise BackupExists(backup=self.id, vm=self.vm)
        data = manifest.to_json().encode()
        vm_directory = os.path.basename(parent)
        self._check_files(
            Manifest.from_json(data, self._inside(MANIFEST), backup_id=self.id, vm_directory=vm_directory)
        )
        with named(self.directory, "publishing the backup"):
            write_atomic(self.directory, MANIFEST, data, mode)
            own(self._inside(MANIFEST), uid, gid, mode)
            # From here on the manifest tells a later run what to finish, and a backup holds nothing but itself.
            _unlink_if_there(self._inside(INTENT))
            remove_temporaries(self.directory, INTENT, MANIFEST)
            os.rename(self.directory, target)
            sync_directory(parent)
        return target

    def _check_files(self, manifest: Manifest) -> None:
        expected = {drive.file: drive.size for drive in manifest.drives}
        expected.update({record.file: record.size for record in manifest.definition})
        for file, size in expected.items():
            try:
                info = os.lstat(self._inside(file))
            except OSError as exc:
                raise PartialIncomplete(backup=self.id, reason=f"{file}: {exc.strerror}") from exc
            if not stat.S_ISREG(info.st_mode) or info.st_size != size:
                raise PartialIncomplete(backup=self.id, reason=f"{file} is not a regular file of {size} bytes")

    def remove(self) -> None:
        """Remove the directory and all in it. Idempotent; links are removed, never followed (rmtree sees to that)."""
        with named(self.directory, "removing the partial backup"):
            if os.path.islink(self.directory):
                os.unlink(self.directory)
            elif os.path.lexists(self.directory):
                shutil.rmtree(self.directory)

    def _inside(self, name: str) -> str:
        return os.path.join(self.directory, name)


def _unlink_if_there(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as exc:
        if exc.errno != errno.ENOENT:
            raise
