# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Putting back the files that were saved with a backup: planned first, never over a different file unless asked."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import typing as t

from .._errors import ChecksumMismatch, DefinitionDiffers, FileFailed, InputInvalid, TargetUnwritable
from .._repository._files import is_real_directory, named
from .._repository.manifest import DefinitionRecord, Manifest
from .._repository.names import DEFINITION
from .._repository.place import Owner, Place, claim, remove_leftovers
from .._repository.store import VmStore
from .restore_types import DefinitionStep, Request

_CHUNK = 1 << 20


def plan_definition(request: Request, manifest: Manifest, store: VmStore) -> tuple[DefinitionStep, ...]:
    """The saved files and where they go; each has the checksum its manifest records.

    :raise DefinitionDiffers: another file is there, and ``overwrite_definition`` is not set.
    :raise ChecksumMismatch: a saved file is damaged.
    """
    if request.definition == "none" or not manifest.definition:
        return ()
    directory = os.path.join(store.backup_path(manifest), DEFINITION)
    if not is_real_directory(directory):
        raise FileFailed(path=directory, doing="reading the saved files", reason="it is not a directory")
    steps = [
        DefinitionStep(record, os.path.join(store.backup_path(manifest), record.file), dest, "")
        for record, dest in zip(manifest.definition, _destinations(request, manifest.definition))
    ]
    return tuple(_judged(request, step) for step in steps)


def _destinations(request: Request, records: t.Sequence[DefinitionRecord]) -> list[str]:
    if request.definition == "original":
        return [os.path.realpath(record.path) for record in records]
    if request.definition_dest is None or not os.path.isabs(request.definition_dest):
        raise InputInvalid(message="definition=directory needs definition_dest, an absolute path.")
    names = [os.path.basename(record.path) for record in records]
    unique = [name if names.count(name) == 1 else f"{number}-{name}" for number, name in enumerate(names)]
    return [os.path.join(request.definition_dest, name) for name in unique]


def _judged(request: Request, step: DefinitionStep) -> DefinitionStep:
    record = step.record
    found = _sha256(step.source)
    if found != record.sha256:
        raise ChecksumMismatch(path=step.source, algorithm="sha256", found=found, expected=record.sha256)
    if not os.path.isdir(os.path.dirname(step.dest)):
        raise TargetUnwritable(path=os.path.dirname(step.dest), reason="there is no such directory")
    state = "absent"
    if os.path.lexists(step.dest):
        same = os.path.isfile(step.dest) and not os.path.islink(step.dest) and _sha256(step.dest) == record.sha256
        state = "same" if same else "differs"
    if state == "differs" and not (request.overwrite_definition and os.path.isfile(step.dest)):
        raise DefinitionDiffers(path=step.dest)
    return DefinitionStep(record, step.source, step.dest, state)


def _sha256(path: str) -> str:
    """Small files: buffered, at once. The last component may not be a link."""
    digest = hashlib.sha256()
    with named(path, "reading"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as stream:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FileFailed(path=path, doing="reading", reason="it is not a regular file")
            for data in iter(lambda: stream.read(_CHUNK), b""):
                digest.update(data)
    return digest.hexdigest()


def write_definition(step: DefinitionStep) -> Place:
    """Copy a saved file to a place next to its destination, with its first mode (and owner, when we are root)."""
    remove_leftovers(step.dest)
    place = claim(step.dest)
    try:
        with named(place.content, "writing"):
            shutil.copyfile(step.source, place.content, follow_symlinks=False)
        record = step.record
        privileged = os.geteuid() == 0
        place.finish(Owner(record.uid if privileged else None, record.gid if privileged else None, record.mode))
    except BaseException:
        place.drop()
        raise
    return place


def put_definition(step: DefinitionStep, place: Place) -> t.Callable[[], None]:
    """Make the file appear, keeping the present one as ``.before-restore``; the step back."""
    if step.state == "absent":
        place.appear()
        return lambda: os.unlink(step.dest)
    with named(step.dest, "keeping the present file aside"):
        kept = _keep(step.dest)
    place.replace()
    return lambda: os.rename(kept, step.dest)


def _keep(path: str) -> str:
    """A second name for the present file, which then is replaced. Earlier ones are kept as well."""
    number = 1
    while True:
        kept = f"{path}.before-restore" + (f".{number}" if number > 1 else "")
        try:
            os.link(path, kept)
            return kept
        except FileExistsError:
            number += 1
