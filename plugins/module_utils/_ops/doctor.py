# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The doctor of chains: looks at a VM that was observed and at its files, and says what is wrong and what mends it.

It only reads, and it asks nobody: the VM, its jobs and its drift were observed before. What is still going on is not
called wrong: while another task changes the VM, its half-done work is left out.
"""

from __future__ import annotations

import os
import typing as t

from .._errors import BlockOpsError
from .._image.users import holders_of
from .._repository.names import is_backup_id
from .._repository.store import Repository
from .._unix import is_claimed
from .claim import claim_name
from .cold_boot import Drift
from .doctor_images import is_file, on_disk, same_host_files, space
from .doctor_qemu import inside_qemu
from .doctor_strays import beside
from .doctor_types import Finding, sorted_findings
from .snapshot_options import Scene
from .snapshot_recovery_plan import Recovery, RevertInterrupted, plan
from .snapshot_view import View, look


def examine(scene: Scene, drifts: t.Sequence[Drift], repository: str | None) -> list[Finding]:
    """Everything there is to say of the VM, the gravest first. Reads files: run it in a thread."""
    backups, findings = _backups(repository)
    findings += inside_qemu(scene.vm, drifts, backups)
    if scene.vm.process.pid > 0 and not same_host_files(scene.vm.process.pid):
        what = "QEMU runs in another mount namespace (a container): the names of its files mean nothing here."
        fix = "Run the task in that namespace to have its images examined."
        findings.append(Finding("FilesNotVisible", str(scene.vm.process.pid), what, fix))
        return sorted_findings(findings)
    return sorted_findings([*findings, *_of_files(scene)])


def _of_files(scene: Scene) -> t.Iterator[Finding]:
    claim = claim_name(scene.vm.process.pid)
    before = is_claimed(claim)
    view = look(scene)
    recovery, broken = _recovery(scene, view)
    handled = {os.path.realpath(record.overlay) for record in (*recovery.doomed, *recovery.settled)}
    strays = list(beside(scene.vm, view.directories, handled))
    files = [layer.file for drive in scene.vm.drives for layer in drive.layers if is_file(layer)]
    yield from on_disk(scene.vm, holders_of(files))
    yield from space(scene.vm)
    if before or is_claimed(claim):
        what = "Another task changes the snapshots or chains of this VM now; what it is about was left out."
        yield Finding("TaskRunning", claim, what, "Look again when it has ended.")
        return
    yield from strays
    yield from broken
    for sentence, thing in zip(recovery.sentences(), _objects(recovery)):
        fix = "qmp_snapshot with state=recovered cleans up; so does any other task of that module."
        yield Finding("InterruptedRun", thing, f"A run was killed: {sentence}.", fix)


def _recovery(scene: Scene, view: View) -> tuple[Recovery, list[Finding]]:
    try:
        return plan(scene, view), []
    except RevertInterrupted as exc:
        fix = f"qmp_snapshot with name={exc.data['snapshot']}, state=reverted, allow_reset=true finishes it."
        return Recovery(), [Finding("RevertInterrupted", exc.data["snapshot"], str(exc), fix)]


def _objects(recovery: Recovery) -> list[str]:
    """What each of the sentences is about, in their order."""
    records = (record.overlay for record in (*recovery.doomed, *recovery.settled))
    return [*recovery.nodes, *records, *recovery.forget, *recovery.jobs, "VM"]


def _backups(path: str | None) -> tuple[dict[str, frozenset[str]], list[Finding]]:
    """The ids of all backups in the repository, by its id. In doubt a backup is there: it makes no bitmap wrong then.

    Those of other VMs count, because this one may be called otherwise in ``vms``; unreadable and unfinished ones, too.
    """
    if path is None:
        return {}, []
    try:
        repository = Repository.open(path)
        stores = repository.vms()
        names = {name for store in stores for name in os.listdir(store.directory) if is_backup_id(name)}
        ids = frozenset(names | {partial.id for store in stores for partial in store.partials()})
    except (BlockOpsError, OSError) as exc:
        return {}, [Finding("RepositoryUnreadable", path, str(exc), "Correct the option repository, or mend it.")]
    return {repository.id: ids}, []
