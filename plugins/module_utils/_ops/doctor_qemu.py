# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What the doctor finds inside QEMU: bitmaps, jobs, nodes, depth, and what a cold start would boot. Pure."""

from __future__ import annotations

import typing as t

from .._block.graph import Bitmap, Drive, Layer
from .._block.names import BitmapName, is_ours, of_snapshot, parse_bitmap, parse_object, run_of
from .._qmp.jobs import Job
from .cold_boot import Drift
from .doctor_types import Finding
from .vm import Vm

# As many images as qmp_vm_info takes without a warning.
DEEP = 16
_RECOVER = "qmp_drive_backup with state=recovered removes it, or adopts it; the next backup does so too."


def inside_qemu(vm: Vm, drifts: t.Sequence[Drift], backups: t.Mapping[str, t.Container[str]]) -> t.Iterator[Finding]:
    """``backups``: by repository id, the ids of the backups there, as far as repositories are known."""
    for drive in vm.drives:
        yield from _bitmaps(drive, backups, _busy_runs(vm))
        if len(drive.layers) > DEEP:
            yield _deep(drive)
    for job in vm.jobs.values():
        yield from _job(job)
    yield from _nodes(vm)
    for drift in drifts:
        yield _drift(vm, drift)


def _busy_runs(vm: Vm) -> set[str]:
    """Backups that are under way: nothing of theirs is left over."""
    objects = (parse_object(job.id) for job in vm.jobs.values() if job.status != "concluded" and not job.stalled)
    return {thing.run for thing in objects if thing is not None}


def _bitmaps(drive: Drive, backups: t.Mapping[str, t.Container[str]], busy: t.Container[str]) -> t.Iterator[Finding]:
    for layer in drive.layers:
        for bitmap in layer.bitmaps:
            ours, thing = parse_bitmap(bitmap.name), parse_object(bitmap.name)
            if thing is not None and thing.run not in busy:
                what = f"Bitmap {bitmap.name} was made for one backup, and that one did not come to its end."
                yield Finding("BackupLeftover", bitmap.name, what, _RECOVER, drive.name)
            elif ours is not None and run_of(ours.backup) not in busy:
                yield from _tracking(drive, layer, bitmap, ours, backups)
            elif not is_ours(bitmap.name):
                yield _foreign(drive, layer, bitmap)


def _tracking(
    drive: Drive, layer: Layer, bitmap: Bitmap, ours: BitmapName, backups: t.Mapping[str, t.Container[str]]
) -> t.Iterator[Finding]:
    known = backups.get(ours.repository)
    if known is not None and ours.backup not in known:
        what = f"Bitmap {bitmap.name} in {layer.file} follows backup {ours.backup}, which is not in its repository."
        yield Finding("BitmapOfNoBackup", bitmap.name, what, _removal(drive, layer, bitmap, ours=True), drive.name)
    elif bitmap.inconsistent:
        what = f"Bitmap {bitmap.name} in {layer.file} is inconsistent: QEMU was killed while it recorded."
        fix = "The next backup is a full one for this drive, and removes it."
        yield Finding("InconsistentBitmap", bitmap.name, what, fix, drive.name)


def _foreign(drive: Drive, layer: Layer, bitmap: Bitmap) -> Finding:
    fix = _removal(drive, layer, bitmap, ours=False)
    if bitmap.inconsistent:
        what = f"Bitmap {bitmap.name} in {layer.file} is inconsistent: QEMU was killed while it recorded."
        return Finding("InconsistentBitmap", bitmap.name, what, fix, drive.name)
    what = (
        f"Bitmap {bitmap.name} in {layer.file} is another tool's. It keeps QEMU from going back to internal snapshots."
    )
    return Finding("ForeignBitmap", bitmap.name, what, f"If that tool is no longer used: {fix}", drive.name)


def _removal(drive: Drive, layer: Layer, bitmap: Bitmap, *, ours: bool) -> str:
    if layer is drive.active and not layer.read_only:
        more = ", ours=true" if ours else ""
        return f"qmp_dirty_bitmap with name={bitmap.name}, state=absent, drives=[{drive.name}]{more} removes it."
    return "It cannot be removed while its image is below others, and goes when that is merged into another one."


def _deep(drive: Drive) -> Finding:
    what = f"The chain of drive {drive.name} has {len(drive.layers)} images: reading and starting get slower with each."
    fix = f"qmp_block_commit with drives=[{drive.name}], max_depth={DEEP} merges the oldest snapshots."
    return Finding("DeepChain", drive.active.file, what, fix, drive.name)


def _job(job: Job) -> t.Iterator[Finding]:
    name = f"Job {job.id} ({job.type})"
    if job.stalled:
        fix = "Mend the cause. Then run the task that started it again, or tell QEMU: job-resume, or job-cancel."
        yield Finding("StalledJob", job.id, f"{name} is paused by an I/O error ({job.io_status}).", fix)
    elif job.status == "concluded" and parse_object(job.id) is not None:
        yield Finding("BackupLeftover", job.id, f"{name} has ended, and nobody has looked at its result.", _RECOVER)
    elif job.status == "concluded" and not of_snapshot(job.id):
        what = f"{name} of another tool has ended, and was not dismissed ({job.error or 'it succeeded'})."
        yield Finding("UndismissedJob", job.id, what, f"QMP job-dismiss with id={job.id}, if that tool has ended.")


def _nodes(vm: Vm) -> t.Iterator[Finding]:
    busy = _busy_runs(vm)
    for node in vm.nodes:
        thing = parse_object(node)
        if thing is not None and thing.run not in busy:
            yield Finding("BackupLeftover", node, f"Node {node} was left by a backup that did not end.", _RECOVER)


def _drift(vm: Vm, drift: Drift) -> Finding:
    drive = vm.drive(drift.drive)
    depth = len(drive.layers) if drive is not None else 1
    fix = (
        f"Have the start-up definition name {drift.new} (format {drift.new_format}) in place of {drift.old}. "
        f"qmp_block_commit with drives=[{drift.drive}], max_depth={depth} and definition does so and merges nothing. "
        "If it has been done already, this goes with the next cold start."
    )
    return Finding("BootDrift", drift.new, drift.warning, fix, drift.drive)
