# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What earlier runs left: adopted when it still works, unwound when not. Always first, and idempotent.

A run can have ended anywhere. Its partial directory and its jobs inside QEMU together tell where:

=====================================  ==============================================================
partial with a manifest                only the rename was missing: publish it
intent, all jobs there, none failed    adopt: wait if need be, then publish
anything else                          unwind; the bitmaps of the backup before still know every change
=====================================  ==============================================================
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass

from .._block.names import run_of
from .._errors import FormatUnsupported, ManifestInvalid, VmMismatch
from .._qmp.session import Session
from .._repository.manifest import Manifest
from .._repository.partial import Partial
from .._repository.store import Catalogue, VmStore
from .backup_finish import Run
from .backup_options import Ownership
from .leftovers import Leftovers, Scope, find, sweep
from .vm import Vm


@dataclass(frozen=True)
class Recovery:
    """What is to be done about earlier runs. ``adopted``: runs to wait for, in the order they began."""

    adopted: tuple[Run, ...]
    complete: tuple[tuple[Partial, Manifest], ...]
    discarded: tuple[Partial, ...]
    leftovers: Leftovers
    scope: Scope
    failures: tuple[tuple[str, str], ...] = ()

    @property
    def needed(self) -> bool:
        return bool(self.adopted or self.complete or self.discarded or self.leftovers.sentences())

    def sentences(self) -> list[str]:
        """For the result: what was (or would be) cleaned up; adopted runs are reported as backups."""
        return [
            *(f"publish backup {manifest.id}, which was complete" for _partial, manifest in self.complete),
            *(f"remove unfinished backup {partial.id}{self._why(partial)}" for partial in self.discarded),
            *(f"remove {sentence}" for sentence in self.leftovers.sentences()),
        ]

    def _why(self, partial: Partial) -> str:
        """What its job died of, for a run that nobody waited for."""
        said = dict(self.failures).get(partial.id)
        return "" if said is None else f" (its copy failed: {said})"


def read_intent(store: VmStore, partial: Partial) -> Run | None:
    """The run a partial directory is about; ``None`` when its intent cannot be understood."""
    try:
        return Run(store, partial, read_draft(store, partial))
    except ManifestInvalid:
        return None


def read_draft(store: VmStore, partial: Partial) -> Manifest:
    """The manifest a run has drafted. Raises ManifestInvalid."""
    data = json.dumps((partial.read_intent() or {}).get("manifest")).encode()
    directory = os.path.basename(store.directory)
    return Manifest.from_json(data, partial.directory, backup_id=partial.id, vm_directory=directory)


def _check_identity(vm: Vm, store: VmStore) -> None:
    """Two VMs must not share a directory: the runs and backups of one would be taken for the other's.

    The newest word counts; while either side has no uuid there is none.
    """
    runs = [read_intent(store, partial) for partial in store.partials()]
    known = (*store.catalogue().manifests, *(run.draft for run in runs if run is not None))
    uuids = [manifest.vm_uuid for manifest in known if manifest.vm_uuid is not None]
    if uuids and vm.uuid is not None and uuids[-1] != vm.uuid:
        raise VmMismatch(path=store.directory, found=uuids[-1], vm=vm.name, uuid=vm.uuid)


def plan_recovery(vm: Vm, store: VmStore, repository: str) -> Recovery:
    """Sort what is there. Reads only. Raises VmMismatch when it is another VM's."""
    _check_identity(vm, store)
    adopted: list[Run] = []
    complete: list[tuple[Partial, Manifest]] = []
    discarded: list[Partial] = []
    failures: list[tuple[str, str]] = []
    catalogue = store.catalogue()
    refuse_newer(catalogue)
    for partial in store.partials():
        manifest = partial.read_manifest()
        run = read_intent(store, partial)
        if manifest is not None and _whole(partial, manifest):
            complete.append((partial, manifest))
        elif run is not None and run.draft.repository == repository and _alive(run, vm):
            adopted.append(run)
        else:
            discarded.append(partial)
            failures += [(partial.id, said) for said in _errors(run, vm)]
    spare = frozenset(run_of(run.draft.id) for run in adopted)
    manifests = (*catalogue.manifests, *(manifest for _partial, manifest in complete))
    scope = Scope(repository, manifests, spare=spare, unreadable=catalogue.unreadable)
    found = find(scope, vm.drives, vm.nodes, vm.jobs)
    return Recovery(tuple(adopted), tuple(complete), tuple(discarded), found, scope, tuple(failures))


def refuse_newer(catalogue: Catalogue) -> None:
    """A newer release works here: its backups may be what ours would have to follow. Raises FormatUnsupported."""
    for _backup, error in catalogue.broken:
        if isinstance(error, FormatUnsupported):
            raise error


def _errors(run: Run | None, vm: Vm) -> list[str]:
    jobs = [vm.jobs.get(job) for job in run.jobs] if run is not None else []
    return [job.error for job in jobs if job is not None and job.error is not None][:1]


async def execute(session: Session, recovery: Recovery, own: Ownership) -> None:
    """Publish what is complete, remove what is not. The adopted runs are the caller's to finish."""
    for partial, manifest in recovery.complete:
        await asyncio.to_thread(partial.publish, manifest, uid=own.uid, gid=own.gid, mode=own.file_mode)
    if recovery.leftovers.sentences() or recovery.discarded:
        await sweep(session, recovery.scope)
    for partial in recovery.discarded:
        await asyncio.to_thread(partial.remove)


def _alive(run: Run, vm: Vm) -> bool:
    """Whether every job of the run is still known, and none failed or stalled."""
    jobs = [vm.jobs.get(job) for job in run.jobs]
    return bool(jobs) and all(job is not None and not job.failed and not job.stalled for job in jobs)


def _whole(partial: Partial, manifest: Manifest) -> bool:
    files = [(drive.file, drive.size) for drive in manifest.drives]
    files += [(record.file, record.size) for record in manifest.definition]
    return all(_length(os.path.join(partial.directory, file)) == size for file, size in files)


def _length(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return -1
