# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Views of a backup: results, warnings and before/after for people. Pure, but for the free space of the source."""

from __future__ import annotations

import json
import os
import time
import typing as t

from .._qmp.session import Command
from .._repository import space
from .._repository.manifest import Manifest
from .._repository.store import VmStore
from ._outcome import Outcome
from .backup_finish import Run
from .backup_recovery import Recovery
from .backup_start import BackupPlan
from .quiesce import Frozen
from .vm import Vm

# A bitmap has one bit per 64 KiB; two of them, rounded up generously, and their tables.
_BITMAP_SHARE = 64 * 1024 * 8 // 4
_BITMAP_BASE = 1 << 20


def plain(manifest: Manifest) -> t.Any:
    return json.loads(manifest.to_json())


def check_source_space(plan: BackupPlan) -> None:
    """Tracking bitmaps are stored in the source image: refuse when its file system is full (QEMU issue 3516)."""
    for drive in plan.drives:
        directory = os.path.dirname(drive.drive.active.file)
        if drive.track and drive.persistent and drive.drive.active.protocol == "file" and os.path.isdir(directory):
            needed = _BITMAP_BASE + drive.drive.active.virtual_size // _BITMAP_SHARE
            space.require(directory, needed, f"The change tracking of drive {drive.drive.name} of VM {plan.vm_name}")


def nothing(vm: Vm, why: str) -> Outcome:
    return Outcome(False, {**_vm(vm), "status": "unchanged", "reason": why, "recovered": []})


def planned(
    vm: Vm,
    plan: BackupPlan,
    store: VmStore | None,
    recovered: list[str],
    commands: t.Sequence[Command],
    *,
    waits: bool,
) -> Outcome:
    count = len(store.catalogue().manifests) if store is not None else 0
    result = {
        **_vm(vm),
        "status": "planned",
        "level": plan.level,
        "drives": [drive.to_result() for drive in plan.drives],
        "skipped": [{"name": skip.name, "reason": skip.reason} for skip in plan.skipped],
        "bytes_bound": sum(drive.bytes_bound for drive in plan.drives),
        "recovered": recovered,
        "commands": [command.to_result() for command in commands],
    }
    levels = {drive.drive.name: drive.level for drive in plan.drives}
    before, after = _difference(count, plan.level, levels, recovered, waits=waits)
    return Outcome(True, result, before, after, plan.warnings)


def published(
    vm: Vm,
    store: VmStore,
    manifest: Manifest,
    recovery: Recovery,
    started: float,
    *,
    frozen: Frozen | None = None,
    sent: t.Sequence[Command] = (),
    adopted: bool = False,
) -> Outcome:
    recovered = recovery.sentences()
    result = {
        **_vm(vm),
        **_backup(store, manifest),
        "status": "published",
        "adopted": adopted,
        "recovered": recovered,
        "seconds": round(time.monotonic() - started, 3),
    }
    if frozen is not None:
        result.update(_point(frozen, sent))
    before, after = _difference(len(store.catalogue().manifests) - 1, manifest.level, _levels(manifest), recovered)
    return Outcome(True, result, before, after, manifest.warnings)


def unchanged(vm: Vm, store: VmStore, manifest: Manifest, recovered: list[str], changed: bool) -> Outcome:
    result = {**_vm(vm), **_backup(store, manifest), "status": "unchanged", "adopted": False, "recovered": recovered}
    return Outcome(changed, result)


def running(
    vm: Vm,
    store: VmStore,
    run: Run,
    recovered: list[str],
    *,
    frozen: Frozen | None = None,
    sent: t.Sequence[Command] = (),
) -> Outcome:
    """The jobs go on inside QEMU; a later call adopts them. ``frozen`` and ``sent``: of the run that started them."""
    result = {
        **_vm(vm),
        **_backup(store, run.draft),
        "status": "running",
        "jobs": list(run.jobs),
        "adopted": frozen is None,
        "recovered": recovered,
    }
    if frozen is None:
        return Outcome(bool(recovered), result, warnings=run.draft.warnings)
    result.update(_point(frozen, sent))
    count = len(store.catalogue().manifests)
    before, after = _difference(count, run.draft.level, _levels(run.draft), recovered, waits=False)
    return Outcome(True, result, before, after, run.draft.warnings)


def adoption_planned(vm: Vm, store: VmStore, recovery: Recovery) -> Outcome:
    run = recovery.adopted[-1]
    result = {**_vm(vm), **_backup(store, run.draft), "status": "planned", "adopted": True}
    result["recovered"] = recovery.sentences()
    count = len(store.catalogue().manifests) + len(recovery.adopted) - 1
    before, after = _difference(count, run.draft.level, _levels(run.draft), recovery.sentences())
    return Outcome(True, result, before, after, run.draft.warnings)


def recovery_planned(vm: Vm, recovery: Recovery, state: str) -> Outcome:
    verb = "cancel" if state == "cancelled" else "publish"
    todo = recovery.sentences() + [f"{verb} running backup {run.draft.id}" for run in recovery.adopted]
    result = {**_vm(vm), "status": "planned" if todo else "unchanged", "recovered": todo}
    return Outcome(bool(todo), result, {"leftovers": todo}, {"leftovers": []})


def recovered(vm: Vm, recovery: Recovery) -> Outcome:
    done = recovery.sentences()
    result = {**_vm(vm), "status": "recovered" if done else "unchanged", "recovered": done}
    return Outcome(bool(done), result, {"leftovers": done}, {"leftovers": []})


def cancelled(vm: Vm, recovery: Recovery) -> Outcome:
    done = recovery.sentences() + [f"cancel running backup {run.draft.id}" for run in recovery.adopted]
    result = {**_vm(vm), "status": "cancelled" if done else "unchanged", "recovered": done}
    return Outcome(bool(done), result, {"leftovers": done}, {"leftovers": []})


def _vm(vm: Vm) -> dict[str, t.Any]:
    return {"name": vm.name, "uuid": vm.uuid}


def _backup(store: VmStore, manifest: Manifest) -> dict[str, t.Any]:
    data = plain(manifest)
    return {
        "backup": manifest.id,
        "path": store.backup_path(manifest),
        "level": manifest.level,
        "point": data["point"],
        "consistency": manifest.consistency,
        "freeze_ms": manifest.freeze_ms,
        "drives": [
            {**_drive(drive), "path": os.path.join(store.backup_path(manifest), drive["file"])}
            for drive in data["drives"]
        ],
        "skipped": data["skipped"],
        "bytes": sum(drive.copied for drive in manifest.drives),
    }


def _drive(drive: dict[str, t.Any]) -> dict[str, t.Any]:
    keys = ("name", "file", "level", "reason", "parent", "virtual_size", "size", "copied", "sha256", "standalone")
    return {key: drive[key] for key in keys}


def _point(frozen: Frozen, sent: t.Sequence[Command]) -> dict[str, t.Any]:
    """What only the run knows that took the point in time."""
    commands = [command.to_result() for command in sent if command.name == "transaction"]
    return {"transaction_ms": round(frozen.transaction_ms, 1), "commands": commands}


def _levels(manifest: Manifest) -> dict[str, str]:
    return {drive.name: drive.level for drive in manifest.drives}


def _difference(
    count: int, level: str, levels: dict[str, str], recovered: list[str], *, waits: bool = True
) -> tuple[dict[str, t.Any], dict[str, t.Any]]:
    """Before and after, worded the same in check mode and in earnest (so without the id, which only the run knows)."""
    before: dict[str, t.Any] = {"backups": count}
    backup = {"level": level, "drives": levels}
    after: dict[str, t.Any] = {"backups": count + 1, "newest": backup} if waits else {"backups": count}
    if not waits:
        before["running"], after["running"] = None, backup
    if recovered:
        before["leftovers"], after["leftovers"] = recovered, []
    return before, after
