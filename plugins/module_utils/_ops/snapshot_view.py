# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The external snapshots of a VM, found from its chains and the records beside its images."""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from .._block.graph import Drive, Layer
from .._image.snapshot_record import MERGED, SnapshotRecord, read_record, records_in
from .snapshot_options import DriveUnsuited, JobsRunning, Scene
from .vm import Vm

_ENDED = ("concluded", "null")
# Jobs that touch no image: they only make one, or are somebody's bookkeeping.
_HARMLESS = ("create",)


@dataclass(frozen=True)
class Placed:
    """An overlay in use: layer ``index`` of the drive's chain; the snapshot is the image below it."""

    drive: Drive
    index: int
    record: SnapshotRecord

    @property
    def overlay(self) -> Layer:
        return self.drive.layers[self.index]

    @property
    def image(self) -> Layer:
        """The snapshot itself."""
        return self.drive.layers[self.index + 1]

    @property
    def active(self) -> bool:
        return self.index == 0


@dataclass(frozen=True)
class View:
    """``placed``: overlays in a chain of the VM, the topmost first; ``loose``: records of its overlays in no chain.

    ``directories``: where images of the VM lie.
    """

    placed: tuple[Placed, ...]
    loose: tuple[SnapshotRecord, ...]
    directories: tuple[str, ...]

    def of(self, name: str, drives: t.Collection[str] = ()) -> list[Placed]:
        """Snapshot ``name`` on the drives (default: wherever it is)."""
        return [
            placed
            for placed in self.placed
            if placed.record.name == name and (not drives or placed.drive.name in drives)
        ]

    @property
    def names(self) -> set[str]:
        return {placed.record.name for placed in self.placed}

    @property
    def emptied(self) -> list[str]:
        """Overlays that an earlier run merged or replaced, and was not told to delete."""
        return [record.overlay for record in self.loose if record.state == MERGED and record.stays]


def look(scene: Scene) -> View:
    """Read the records. Files only; QEMU was asked before."""
    vm = scene.vm
    placed = []
    for drive in vm.drives:
        for index, layer in enumerate(drive.layers[:-1]):
            record = read_record(layer.file) if layer.protocol == "file" else None
            if record is not None:
                placed.append(Placed(drive, index, record))
    files = {layer.file for drive in vm.drives for layer in drive.layers if layer.protocol == "file"}
    directories = {os.path.dirname(file) for file in files}
    if scene.options.overlay_directory is not None:
        directories.add(scene.options.overlay_directory)
    loose = (
        record
        for directory in sorted(directories)
        for record in records_in(directory)
        if record.overlay not in files and _is_of(record, vm, files)
    )
    return View(tuple(placed), tuple(loose), tuple(sorted(directories)))


def _is_of(record: SnapshotRecord, vm: Vm, files: t.Container[str]) -> bool:
    """Whether a record is about this VM: made for it, on an image that it still uses."""
    same = record.uuid == vm.uuid if record.uuid is not None and vm.uuid is not None else record.vm == vm.name
    return same and record.image in files


def is_firmware(drive: Drive) -> bool:
    """Firmware memory (pflash), or an image that no device uses: no snapshot has it, and going back leaves it alone."""
    return drive.qdev is None or drive.qdev.startswith("/machine/system.flash")


def refuse_while_jobs_run(scene: Scene, what: str, but: t.Container[str] = ()) -> None:
    """:raise JobsRunning: a job works on the images."""
    jobs = [
        f"{job.id} ({job.type}, {job.status})"
        for job in scene.vm.jobs.values()
        if job.status not in _ENDED and job.type not in _HARMLESS and job.id not in but
    ]
    if jobs:
        raise JobsRunning(vm=scene.vm.name, jobs=", ".join(sorted(jobs)), what=what)


def select(scene: Scene, judge: t.Callable[[Drive], str | None], what: str, way_out: str) -> Selection:
    """The drives to work on, and those left out with the reason. ``judge`` says why a drive cannot take part.

    :raise DriveUnsuited: a drive that was asked for by name cannot take part, or none can.
    """
    vm, options = scene.vm, scene.options
    wanted = scene.entry.drives or options.drives
    excluded = scene.entry.exclude_drives or options.exclude_drives
    _refuse_unknown(scene, wanted, what)
    chosen: list[Drive] = []
    skipped: list[dict[str, str]] = []
    for drive in vm.drives:
        if drive.name in excluded or (wanted and drive.name not in wanted):
            skipped.append({"name": drive.name, "reason": _left_out(drive.name in excluded)})
            continue
        reason = judge(drive)
        if reason is not None and wanted:
            raise DriveUnsuited(drive=drive.name, vm=vm.name, what=what, reason=reason, way_out=way_out)
        if reason is None:
            chosen.append(drive)
        else:
            skipped.append({"name": drive.name, "reason": reason})
    if not chosen:
        reasons = "; ".join(f"{skip['name']}: {skip['reason']}" for skip in skipped) or "it has no drives at all"
        raise DriveUnsuited(drive="(any)", vm=vm.name, what=what, reason=reasons, way_out=way_out)
    return Selection(tuple(chosen), tuple(skipped))


def _refuse_unknown(scene: Scene, wanted: t.Iterable[str], what: str) -> None:
    for name in wanted:
        if scene.vm.drive(name) is None:
            known = ", ".join(drive.name for drive in scene.vm.drives) or "none"
            reason, way_out = f"the VM has no such drive; it has: {known}", "Correct the option drives."
            raise DriveUnsuited(drive=name, vm=scene.vm.name, what=what, reason=reason, way_out=way_out)


def _left_out(excluded: bool) -> str:
    return "it is in exclude_drives" if excluded else "it is not in drives"


@dataclass(frozen=True)
class Selection:
    drives: tuple[Drive, ...]
    skipped: tuple[dict[str, str], ...]
