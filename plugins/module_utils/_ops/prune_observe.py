# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What is in a VM's directory, backups and everything else, as pruning has to know it. Reads, and never writes."""

from __future__ import annotations

import json
import os
import time
import typing as t

from .._errors import FormatUnsupported, ImageInvalid
from .._image import qemu_img, users
from .._image.header import read_header
from .._repository import merge
from .._repository.manifest import Manifest
from .._repository.names import IMAGE_SUFFIX, INTENT, MANIFEST, is_backup_id
from .._repository.partial import Partial
from .._repository.store import VmStore
from .prune_plan import find_defects
from .prune_types import Found, Orphan

STALE = 86400  # seconds nobody has written to an unfinished backup

Foreign = dict[str, tuple[str, ...]]


def observe(store: VmStore) -> Found:
    """One VM as it is.

    :raise FormatUnsupported: a newer release works here; what its backups need is not ours to know.
    """
    catalogue = store.catalogue()
    for _backup, error in catalogue.broken:
        if isinstance(error, FormatUnsupported):
            raise error
    broken = {backup: str(error) for backup, error in catalogue.broken}
    orphans = [*_partials(store), *_strange(store, catalogue.manifests)]
    foreign: Foreign = {}
    for backup in broken:
        _need(foreign, os.path.join(store.directory, backup), f"{backup}, whose manifest cannot be read")
    for orphan in orphans:
        if not orphan.removed and os.path.isdir(orphan.path):
            _need(foreign, orphan.path, os.path.basename(orphan.path))
    return Found(
        manifests=catalogue.manifests,
        broken=broken,
        defects=find_defects(catalogue.manifests, broken, store.looks_intact),
        protected=frozenset(m.id for m in catalogue.manifests if merge.is_protected(store.directory, m.id)),
        foreign=foreign,
        leftovers=merge.leftovers(store.directory),
        orphans=tuple(orphans),
    )


def _need(foreign: Foreign, directory: str, who: str) -> None:
    """Note the backups that the images in ``directory`` build on: by their headers, and by the intent of a run."""
    names: set[str] = set()
    for entry in _entries(directory):
        if entry.endswith(IMAGE_SUFFIX):
            try:
                backing = read_header(os.path.join(directory, entry)).backing_file or ""
            except ImageInvalid:
                continue
            names.update(part for part in backing.split("/") if is_backup_id(part))
    if directory.endswith(".partial"):
        names.update(_intended(directory))
    for name in sorted(names):
        foreign[name] = (*foreign.get(name, ()), f"it may be needed by {who}")


def _intended(directory: str) -> set[str]:
    intent = Partial("", directory, "").read_intent() or {}
    text = json.dumps(intent)
    return {part for part in text.split('"') if is_backup_id(part)}


def _entries(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _partials(store: VmStore) -> t.Iterator[Orphan]:
    """Unfinished backups. qmp_drive_backup finishes or undoes them; what it has not come to within a day goes here."""
    for partial in store.partials():
        files = [partial.directory, *(os.path.join(partial.directory, name) for name in _entries(partial.directory))]
        if os.path.lexists(os.path.join(partial.directory, MANIFEST)):
            reason = "a finished backup that was not published: the next backup of the VM does it"
        elif any(qemu_img.in_use(path) for path in files if path.endswith(IMAGE_SUFFIX)):
            reason = "an unfinished backup that is being written"
        elif _age(files) < STALE:
            reason = "an unfinished backup: the next backup of the VM finishes or removes it"
        else:
            reason = "an unfinished backup that nobody has written to for a day"
            yield Orphan(partial.directory, reason, removed=True, size=allocated(partial.directory))
            continue
        yield Orphan(partial.directory, reason, removed=False, size=allocated(partial.directory))


def _age(paths: t.Iterable[str]) -> float:
    """Seconds since the last change of any of them. A clock that went backwards makes it young."""
    changes = [0.0]
    for path in paths:
        try:
            changes.append(os.lstat(path).st_mtime)
        except OSError:
            continue
    return time.time() - max(changes)


def _strange(store: VmStore, manifests: t.Iterable[Manifest]) -> t.Iterator[Orphan]:
    """What looks like ours and belongs to nothing. Never removed: nobody knows why it is there."""
    for name in _entries(store.directory):
        path = os.path.join(store.directory, name)
        if is_backup_id(name) and os.path.isdir(path) and not os.path.lexists(os.path.join(path, MANIFEST)):
            yield Orphan(path, "a directory of a backup without a manifest", removed=False, size=allocated(path))
    for manifest in manifests:
        named = {record.file for record in manifest.drives}
        directory = os.path.join(store.directory, manifest.id)
        for name in _entries(directory):
            if name not in named and (name.endswith(IMAGE_SUFFIX) or name == INTENT):
                path = os.path.join(directory, name)
                yield Orphan(path, "a file that the backup's manifest does not name", removed=False, size=_blocks(path))


def busy(store: VmStore, manifest: Manifest) -> str | None:
    """Whether an image of the backup is open, as QEMU's locks tell; a sentence that says in what."""
    return busy_in(os.path.join(store.directory, manifest.id), manifest)


def busy_in(directory: str, manifest: Manifest) -> str | None:
    for record in manifest.drives:
        path = os.path.join(directory, record.file)
        if qemu_img.in_use(path):
            who = ", ".join(f"{holder.command} ({holder.pid})" for holder in users.holders(path))
            return f"{record.file} is in use by {who or 'another process'}"
    return None


def is_open(directory: str) -> bool:
    """Whether any image in a directory is in use."""
    return any(qemu_img.in_use(os.path.join(directory, name)) for name in _entries(directory))


def allocated(directory: str) -> int:
    """Bytes that go when the directory does: files with other names elsewhere stay."""
    return sum(_blocks(os.path.join(root, name)) for root, _dirs, files in os.walk(directory) for name in files)


def _blocks(path: str) -> int:
    try:
        info = os.lstat(path)
    except OSError:
        return 0
    return 0 if info.st_nlink > 1 else info.st_blocks * 512
