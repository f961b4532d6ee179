# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Which drives of a VM a backup takes, at which level, and why not the others. Pure, but for a glance at the images."""

from __future__ import annotations

import dataclasses
import typing as t

from .._block.fitness import Fitness, Tracking, fitness
from .._block.graph import Drive
from .._block.names import MAX_DRIVES
from .._errors import BitmapLost, DriveUnfit, DriveUnknown, NoDrives
from .._repository import chain
from .._repository.manifest import Manifest, SkippedDrive
from .._repository.store import Catalogue, VmStore
from .backup_options import BackupOptions, merged
from .backup_plan import Candidate, DrivePlan, plan_drive
from .backup_start import BackupPlan
from .vm import Vm, VmEntry


def plan_backup(
    vm: Vm, entry: VmEntry, options: BackupOptions, store: VmStore | None, repository: str | None, agent: str | None
) -> BackupPlan:
    """The plan of one run. ``repository`` is ``None`` when it does not exist yet (check mode of a first run)."""
    catalogue = store.catalogue() if store is not None else Catalogue(())
    chosen, skipped = select_drives(vm, entry, options)
    plans = []
    for drive in chosen:
        fit = fitness(drive)
        if options.expert:
            plans.append(_expert(vm, drive, options))
        else:
            candidates = _candidates(catalogue, store, drive.name) if store is not None else []
            level = "copy" if options.sync == "full" else options.level
            plan = plan_drive(drive, fit, level, candidates, repository)
            if plan.lost and options.on_lost_bitmap == "fail":
                raise BitmapLost(drive=drive.name, parent=candidates[0].backup, reason=plan.reason)
            plans.append(plan)
    return BackupPlan(
        vm_name=vm.name,
        vm_uuid=vm.uuid,
        level=_level_of(options, plans),
        sync=options.sync or ("full" if all(plan.sync == "full" for plan in plans) else "bitmap"),
        drives=tuple(plans),
        skipped=tuple(skipped),
        definition=merged(entry.definition, options.definition),
        agent_socket=entry.agent_socket or agent,
        running=vm.running,
        warnings=(*_warnings(chosen), *_gone(vm, catalogue)),
    )


def select_drives(vm: Vm, entry: VmEntry, options: BackupOptions) -> tuple[list[Drive], list[SkippedDrive]]:
    """The drives to back up, and those left out with the reason."""
    wanted = merged(entry.drives, options.drives) or entry.described
    excluded = merged(entry.exclude_drives, options.exclude_drives)
    for name in wanted:
        if vm.drive(name) is None:
            known = ", ".join(drive.name for drive in vm.drives) or "none"
            raise DriveUnknown(vm=vm.name, drive=name, known=known)
    chosen: list[Drive] = []
    skipped: list[SkippedDrive] = []
    for drive in vm.drives:
        reason = _left_out(vm, drive, fitness(drive), wanted, excluded)
        if reason is None:
            chosen.append(drive)
        else:
            skipped.append(SkippedDrive(drive.name, reason))
    if not chosen or len(chosen) > MAX_DRIVES:
        reasons = "; ".join(f"{skip.name}: {skip.reason}" for skip in skipped) or "it has none at all"
        raise NoDrives(vm=vm.name, reasons=reasons)
    return chosen, skipped


def _left_out(vm: Vm, drive: Drive, fit: Fitness, wanted: t.Sequence[str], excluded: t.Sequence[str]) -> str | None:
    if drive.name in excluded:
        return "it is in exclude_drives"
    if wanted and drive.name not in wanted:
        return "it is not in drives"
    if not fit.possible and wanted:
        raise DriveUnfit(vm=vm.name, drive=drive.name, reason=fit.reason)
    return fit.reason if not fit.possible or not (fit.default or wanted) else None


def _candidates(catalogue: Catalogue, store: VmStore, drive: str) -> list[Candidate]:
    """Backups from which the drive could go on: its newest, then its newest full, each with what is wrong with it."""
    broken = dict(catalogue.broken)
    candidates: list[Candidate] = []
    for manifest in (
        chain.newest_with_drive(catalogue.manifests, drive),
        chain.newest_full_of_drive(catalogue.manifests, drive),
    ):
        record = manifest.drive(drive) if manifest is not None else None
        if manifest is None or record is None or any(known.backup == manifest.id for known in candidates):
            continue
        defect = chain.incomplete(catalogue.manifests, manifest, [drive], broken=broken, damage=store.looks_intact)
        candidates.append(Candidate(manifest.id, record, defect))
    return candidates


def _expert(vm: Vm, drive: Drive, options: BackupOptions) -> DrivePlan:
    """A copy with QEMU's own sync mode: what it holds is the expert's business, so nothing ever builds on it."""
    image, sync = drive.active, options.sync or "full"
    bound = {"top": image.data_bound, "none": 0}.get(sync, image.virtual_size)
    if options.bitmap is not None:
        bitmap = image.bitmap(options.bitmap)
        if bitmap is None or bitmap.inconsistent or bitmap.busy:
            state = "has no bitmap" if bitmap is None else f"cannot use its {bitmap.state} bitmap"
            raise DriveUnfit(vm=vm.name, drive=drive.name, reason=f"node {image.node} {state} {options.bitmap}")
        bound = min(bitmap.count, image.virtual_size)
    mode = options.bitmap_mode or "on-success"
    return DrivePlan(
        drive=drive,
        level="copy",
        sync=sync,
        bytes_bound=bound,
        standalone=sync == "top" and len(drive.layers) == 1,
        bitmap=options.bitmap,
        bitmap_mode=mode if sync == "bitmap" else None,
    )


def _level_of(options: BackupOptions, plans: t.Sequence[DrivePlan]) -> str:
    if options.level == "copy" or options.sync is not None:
        return "copy"
    if all(plan.level == "full" for plan in plans):
        return "full"
    return "differential" if any(plan.level == "differential" for plan in plans) else "incremental"


def _gone(vm: Vm, catalogue: Catalogue) -> t.Iterator[str]:
    """Drives the newest backup knew: that one is missing may be a mistake in the VM's definition. Said once."""
    for manifest in catalogue.manifests[-1:]:
        for name in (*(drive.name for drive in manifest.drives), *(skip.name for skip in manifest.skipped)):
            if vm.drive(name) is None:
                yield f"The VM no longer has drive {name}, which it had in backup {manifest.id}."


def _warnings(drives: t.Sequence[Drive]) -> t.Iterator[str]:
    for drive in drives:
        fit = fitness(drive)
        if drive.active.encrypted:
            yield f"Drive {drive.name} is encrypted; its backup is not."
        if fit.tracking is Tracking.TRANSIENT:
            yield f"Drive {drive.name} gets a full backup after each restart of QEMU: {fit.reason}."
        if drive.name.startswith("device["):
            yield f"Drive {drive.name} has no id; give its -device one, or a change of devices may mix up its backups."


def newest_covering(catalogue: Catalogue, store: VmStore, drives: t.Sequence[str]) -> Manifest | None:
    """The newest published backup that has all these drives and looks intact (for ``max_age``)."""
    for manifest in reversed(catalogue.manifests):
        records = [manifest.drive(name) for name in drives]
        if not all(record is not None and record.standalone for record in records):
            continue
        if chain.incomplete(catalogue.manifests, manifest, drives, damage=store.looks_intact) is None:
            return manifest
    return None


def with_version(manifest: Manifest, vm: Vm) -> Manifest:
    return dataclasses.replace(manifest, qemu_version=vm.version)
