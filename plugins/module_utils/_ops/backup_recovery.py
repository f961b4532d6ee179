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

import json
import os
from dataclasses import dataclass

from .._block.names import run_of
from .._errors import ManifestInvalid, VmMismatch
from .._qmp.session import Session
from .._repository.manifest import Manifest
from .._repository.partial import Partial
from .._repository.store import VmStore
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

    @property
    def needed(self) -> bool:
        return bool(self.adopted or self.complete or self.discarded or self.leftovers.sentences())

    def sentences(self) -> list[str]:
        """For the result: what was (or would be) cleaned up; adopted runs are reported as backups."""
        return [
            *(f"publish backup {manifest.id}, which was complete" for _partial, manifest in self.complete),
            *(f"remove unfinished backup {partial.id}" for partial in self.discarded),
            *(f"remove {sentence}" for sentence in self.leftovers.sentences()),
        ]


def read_intent(store: VmStore, partial: Partial) -> Run | None:
    """The run a partial directory is about; ``None`` when its intent cannot be understood."""
    intent = partial.read_intent() or {}
    try:
        data = json.dumps(intent.get("manifest")).encode()
        draft = Manifest.from_json(
            data, partial.directory, backup_id=partial.id, vm_directory=os.path.basename(store.directory)
        )
    except ManifestInvalid:
        return None
    return Run(store, partial, draft)


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
    for partial in store.partials():
        manifest = partial.read_manifest()
        run = read_intent(store, partial)
        if manifest is not None and _whole(partial, manifest):
            complete.append((partial, manifest))
        elif run is not None and run.draft.repository == repository and _alive(run, vm):
            adopted.append(run)
        else:
            discarded.append(partial)
    spare = frozenset(run_of(run.draft.id) for run in adopted)
    manifests = (*store.catalogue().manifests, *(manifest for _partial, manifest in complete))
    scope = Scope(repository, manifests, spare=spare)
    found = find(scope, vm.drives, vm.nodes, vm.jobs)
    return Recovery(tuple(adopted), tuple(complete), tuple(discarded), found, scope)


async def execute(session: Session, recovery: Recovery, own: Ownership) -> None:
    """Publish what is complete, remove what is not. The adopted runs are the caller's to finish."""
    for partial, manifest in recovery.complete:
        partial.publish(manifest, uid=own.uid, gid=own.gid, mode=own.file_mode)
    if recovery.leftovers.sentences() or recovery.discarded:
        await sweep(session, recovery.scope)
    for partial in recovery.discarded:
        partial.remove()


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
