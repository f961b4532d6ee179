# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The repository on disk: the only place that makes, reads and lists what docs/repository_format.md describes.

It never opens an image (that is ``_image``), never follows a link below the repository's own path, and never touches
an entry whose name is not one of ours.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import stat
import typing as t
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from .._errors import (
    BackupExists,
    BlockOpsError,
    FormatUnsupported,
    ManifestInvalid,
    RepositoryInvalid,
    RepositoryMissing,
    TargetUnwritable,
)
from . import chain
from ._fields import Fields
from ._files import (
    NO_LINKS,
    is_real_directory,
    named,
    os_error,
    own,
    read_small,
    remove_quietly,
    remove_temporaries,
    sync_directory,
    write_temporary,
)
from .lock import exclusive
from .manifest import FORMAT, MAX_BYTES, DriveRecord, Manifest
from .names import (
    IDENTITY,
    LOCK,
    MANIFEST,
    decode_name,
    encode_name,
    is_backup_id,
    is_encoded_name,
    is_repository_id,
    timestamp,
)
from .partial import Partial

_PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True)
class Catalogue:
    """Every published backup of a VM: ``manifests`` oldest first, ``broken`` those whose manifest was refused."""

    manifests: tuple[Manifest, ...]
    broken: tuple[tuple[str, BlockOpsError], ...] = ()

    @property
    def unreadable(self) -> frozenset[str]:
        """Ids of the backups whose manifest was refused: nobody knows what builds on them."""
        return frozenset(backup for backup, _error in self.broken)

    def get(self, backup_id: str) -> Manifest | None:
        return next((manifest for manifest in self.manifests if manifest.id == backup_id), None)


@dataclass(frozen=True)
class VmStore:
    """The backups of one VM. ``name`` is the VM's true name, ``directory`` where they lie (it need not exist)."""

    name: str
    directory: str
    pending: tuple[Manifest, ...] = ()

    def expecting(self, pending: t.Iterable[Manifest]) -> VmStore:
        """As it will be when these backups, which lack only their rename, are published. For plans."""
        return replace(self, pending=tuple(pending))

    def exists(self) -> bool:
        return is_real_directory(self.directory)

    def ensure(self, mode: int = 0o700, uid: int | None = None, gid: int | None = None) -> None:
        """Make the directory if it is not there; an existing one keeps its mode and owner.

        :raise RepositoryInvalid: something else stands in its place.
        """
        with named(self.directory, "making the VM's directory"):
            try:
                os.mkdir(self.directory, 0o700)
            except FileExistsError:
                if not self.exists():
                    raise RepositoryInvalid(
                        path=self.directory, reason="it is not a directory (links are not followed)"
                    ) from None
                return
            own(self.directory, uid, gid, mode)
            sync_directory(os.path.dirname(self.directory))

    def lock(self, timeout: float) -> t.AsyncContextManager[None]:
        """Hold the VM's lock (``async with``), waiting at most ``timeout`` seconds, else RepositoryLocked."""
        return exclusive(os.path.join(self.directory, LOCK), self.name, timeout)

    def catalogue(self) -> Catalogue:
        """Read the manifests of all published backups. One bad manifest never hides the others."""
        manifests: list[Manifest] = []
        broken: list[tuple[str, BlockOpsError]] = []
        for name in self._names():
            if not is_backup_id(name) or not is_real_directory(os.path.join(self.directory, name)):
                continue
            try:
                manifest = self._read(name)
            except BlockOpsError as exc:
                broken.append((name, exc))
            else:
                manifests += [manifest] if manifest is not None else []
        return Catalogue(chain.ordered([*manifests, *self.pending]), tuple(sorted(broken, key=lambda pair: pair[0])))

    def _read(self, backup_id: str) -> Manifest | None:
        """The manifest of a published backup; ``None`` for a directory without one, which is not a backup (rule 1)."""
        path = os.path.join(self.directory, backup_id, MANIFEST)
        try:
            data = read_small(path, MAX_BYTES)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise ManifestInvalid(path=path, reason=exc.strerror or str(exc)) from exc
        return _parsed(data, path, backup_id, os.path.basename(self.directory))

    def backup_path(self, manifest: Manifest) -> str:
        if manifest in self.pending:
            return self._partial(manifest.id).directory
        return os.path.join(self.directory, manifest.id)

    def image_path(self, manifest: Manifest, drive: DriveRecord) -> str:
        return os.path.join(self.backup_path(manifest), drive.file)

    def looks_intact(self, manifest: Manifest, drive: DriveRecord) -> str | None:
        """What is wrong with an image at a glance (is it there, a file, of that length); ``None`` when nothing."""
        path = self.image_path(manifest, drive)
        try:
            info = os.lstat(path)
        except OSError as exc:
            return f"{path}: {exc.strerror}"
        if not stat.S_ISREG(info.st_mode):
            return f"{path} is not a regular file"
        if info.st_size != drive.size:
            return f"{path} has {info.st_size} bytes instead of {drive.size}"
        return None

    def partials(self) -> list[Partial]:
        """What runs left behind, or are making; oldest id first. Only the lock tells which of the two."""
        found = [name[1 : -len(_PARTIAL_SUFFIX)] for name in self._names() if _is_partial(name)]
        return [
            self._partial(backup_id) for backup_id in found if is_real_directory(self._partial(backup_id).directory)
        ]

    def begin(self, backup_id: str, mode: int = 0o700, uid: int | None = None, gid: int | None = None) -> Partial:
        """Make the directory of a backup in the making.

        :raise BackupExists: the id is taken.
        """
        partial = self._partial(backup_id)
        if not is_backup_id(backup_id) or os.path.lexists(os.path.join(self.directory, backup_id)):
            raise BackupExists(backup=backup_id, vm=self.name)
        with named(partial.directory, "making the backup's directory"):
            try:
                os.mkdir(partial.directory, 0o700)
            except FileExistsError:
                raise BackupExists(backup=backup_id, vm=self.name) from None
            own(partial.directory, uid, gid, mode)
            sync_directory(self.directory)
        return partial

    def _partial(self, backup_id: str) -> Partial:
        return Partial(backup_id, os.path.join(self.directory, f".{backup_id}{_PARTIAL_SUFFIX}"), self.name)

    def _names(self) -> list[str]:
        return _listed(self.directory) if self.exists() else []


@functools.lru_cache(maxsize=512)
def _parsed(data: bytes, path: str, backup_id: str, vm_directory: str) -> Manifest:
    """A run reads the catalogue a few times; the same bytes make the same (immutable) manifest."""
    return Manifest.from_json(data, path, backup_id=backup_id, vm_directory=vm_directory)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(_PARTIAL_SUFFIX) and is_backup_id(name[1 : -len(_PARTIAL_SUFFIX)])


def _listed(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as exc:
        raise RepositoryInvalid(path=path, reason=exc.strerror or str(exc)) from exc


@dataclass(frozen=True)
class Repository:
    """An existing repository: absolute ``path`` and ``id``."""

    path: str
    id: str

    @classmethod
    def open(cls, path: str) -> Repository:
        """Open the repository at ``path``.

        :raise RepositoryMissing: there is none. :raise RepositoryInvalid: something else is there.
        :raise FormatUnsupported: a newer release made it.
        """
        path = os.path.abspath(path)
        identity = os.path.join(path, IDENTITY)
        try:
            data = read_small(identity, MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise RepositoryMissing(path=path) from exc
        except OSError as exc:
            raise RepositoryInvalid(path=path, reason=f"{IDENTITY}: {exc.strerror or exc}") from exc
        return cls(path, _identity(data, path, identity))

    @classmethod
    def create(cls, path: str, mode: int = 0o700, uid: int | None = None, gid: int | None = None) -> Repository:
        """Open the repository at ``path``, making it first when there is none. Several processes may do so at once.

        The parent directory must exist: a missing one is most likely a file system that is not mounted. Files that
        are there already are left alone.
        """
        path = os.path.abspath(path)
        try:
            cls.open(path)
        except RepositoryMissing:
            _make_directory(path, mode, uid, gid)
            _make_identity(path)
        repository = cls.open(path)
        with named(path, "making the repository"):
            remove_temporaries(path, IDENTITY)
        return repository

    def vms(self) -> list[VmStore]:
        """The VMs that have a directory here, by name. Foreign entries are passed over."""
        names = (name for name in _listed(self.path) if is_encoded_name(name))
        stores = (self._store(name) for name in names if is_real_directory(os.path.join(self.path, name)))
        return sorted(stores, key=lambda store: store.name)

    def vm_names(self) -> list[str]:
        """The true names of the VMs that have a directory here."""
        return [store.name for store in self.vms()]

    def vm(self, name: str) -> VmStore:
        """The store of the VM ``name``, which need not exist yet. :raise InputInvalid: not a possible name."""
        return VmStore(name, os.path.join(self.path, encode_name(name)))

    def _store(self, encoded: str) -> VmStore:
        """A shortened name is told by the manifests; without any it stands for itself."""
        store = VmStore(decode_name(encoded) or encoded, os.path.join(self.path, encoded))
        if decode_name(encoded) is None:
            names = [manifest.vm_name for manifest in store.catalogue().manifests]
            return VmStore(names[-1], store.directory) if names else store
        return store


def _identity(data: bytes, path: str, file: str) -> str:
    """The id in ``repository.json``."""
    try:
        fields = Fields(json.loads(data[:MAX_BYTES].decode()), file, "")
        found = fields.integer("format", 1, 1 << 30)
        if found > FORMAT:
            raise FormatUnsupported(path=path, found=found, known=FORMAT)
        return fields.matching("id", is_repository_id, "eight hexadecimal digits")
    except (ValueError, RecursionError) as exc:
        raise RepositoryInvalid(path=path, reason=f"{IDENTITY} is not JSON ({exc})") from exc
    except ManifestInvalid as exc:
        raise RepositoryInvalid(path=path, reason=f"{IDENTITY}: {exc.data['reason']}") from exc


def _make_directory(path: str, mode: int, uid: int | None, gid: int | None) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError as exc:
        raise TargetUnwritable(
            path=path, reason="its parent directory does not exist; is the file system mounted?"
        ) from exc
    except OSError as exc:
        raise os_error(exc, path, "making the repository") from exc
    with named(path, "making the repository"):
        own(path, uid, gid, mode)
        sync_directory(os.path.dirname(path))


def _make_identity(path: str) -> None:
    """Write ``repository.json`` exactly once, whoever comes first; the file is complete from its first moment."""
    text = {"format": FORMAT, "id": secrets.token_hex(4), "created": timestamp(datetime.now(timezone.utc))}
    target = os.path.join(path, IDENTITY)
    with named(path, "making the repository"):
        temporary = write_temporary(path, IDENTITY, (json.dumps(text) + "\n").encode(), 0o644)
        try:
            os.link(temporary, target)
        except (FileExistsError, FileNotFoundError):
            pass  # another first run was faster, and may have tidied up after itself and us
        except OSError as exc:
            if exc.errno not in NO_LINKS:
                raise
            if not os.path.lexists(target):  # no hard links here: two first runs in the same instant could meet
                os.rename(temporary, target)
        finally:
            remove_quietly(temporary)
        sync_directory(path)
