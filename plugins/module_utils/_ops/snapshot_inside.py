# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What snapshots inside qcow2 images have in common, with memory and without: which drives, and what is there. Pure."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from .._block.graph import Drive, InternalSnapshot
from .._errors import BlockOpsError
from .snapshot_errors import SnapshotAmbiguous, SnapshotMissing
from .snapshot_options import DriveUnsuited, Scene, SnapshotIncomplete
from .snapshot_report import drive_result
from .snapshot_view import Selection, select
from .vm import Vm

INTERNAL, MEMORY = "internal", "memory"
_WHAT = {INTERNAL: "an internal snapshot", MEMORY: "a memory snapshot"}


class SnapshotNameTaken(BlockOpsError):
    template = "VM {vm} has {there} snapshot named {snapshot}, so it cannot get {wanted} snapshot of that name."
    advice = "Nothing was touched. Choose another name, or remove that one first (state=absent)."


class SnapshotNameNumeric(BlockOpsError):
    template = "{snapshot} cannot be the name of a snapshot inside an image: QEMU would take it for a snapshot's id."
    advice = "Nothing was touched. Choose a name with something else than digits in it."


class SnapshotNotRemoved(BlockOpsError):
    """``done`` and ``left`` name the drives."""

    template = "Snapshot {snapshot} of VM {vm} was not removed from {left}: {said}."
    advice = "It is gone from {done}. Run again when the cause is mended: it goes on where this run ended."


@dataclass(frozen=True)
class Holding:
    """One drive that has a snapshot of the name asked for inside its active image."""

    drive: Drive
    snapshot: InternalSnapshot


def names_of(vm: Vm, kind: str) -> set[str]:
    """Names of the snapshots of this kind. A memory snapshot has the memory in one image; in the others it is plain."""
    memory, every = set(), set()
    for drive in vm.drives:
        for snapshot in drive.active.snapshots if not drive.empty else ():
            every.add(snapshot.name)
            if snapshot.vm_state_size:
                memory.add(snapshot.name)
    return memory if kind == MEMORY else every - memory


def choose(scene: Scene, kind: str) -> Selection:
    """The drives to snapshot: all that the guest writes to.

    A snapshot that silently lacks a disk is none, so a drive that cannot have one has to be left out by name.

    :raise DriveUnsuited: there is such a drive.
    """
    vm = scene.vm

    def judge(drive: Drive) -> str | None:
        reason = _of_no_interest(drive, kind)
        if reason is None:
            unfit = _unfit(drive)
            if unfit is not None:
                about = {"drive": drive.name, "vm": vm.name, "what": _WHAT[kind]}
                raise DriveUnsuited(reason=unfit, way_out=_way_out(drive, kind), **about)
        return reason

    return select(scene, judge, _WHAT[kind], "Leave it out by drives or exclude_drives.")


def _of_no_interest(drive: Drive, kind: str) -> str | None:
    """Why a drive is left out without being asked."""
    if drive.empty:
        return "it is empty (no medium inserted)"
    if drive.qdev is None:
        return "no device of the VM uses it"
    if drive.active.read_only:
        return "it is read-only, so nothing can change that a snapshot would keep"
    # The guest's memory may hold what it has yet to write to a stick: that has to go back together.
    if drive.removable and kind == INTERNAL:
        return "it is a removable medium"
    return None


def _unfit(drive: Drive) -> str | None:
    image = drive.active
    if image.driver != "qcow2":
        return f"its format is {image.driver}, and only qcow2 images can have snapshots inside"
    if image.data_file is not None:
        return "its data is in a file of its own (data-file), where QEMU keeps no snapshots"
    return None


def _way_out(drive: Drive, kind: str) -> str:
    if drive.qdev is not None and drive.qdev.startswith("/machine/system.flash"):
        return (
            "Start the VM with its NVRAM as qcow2 (qemu-img convert -O qcow2, -blockdev driver=qcow2), or leave it out "
            "by exclude_drives; then the firmware's variables do not go back with the rest."
        )
    if kind == INTERNAL:
        return "Use type=external, which can be put on any format, or leave it out by exclude_drives."
    return "Convert it to qcow2, or leave it out by exclude_drives; then it does not go back with the rest."


def reach(scene: Scene) -> list[Drive]:
    """The drives that the options speak of, whatever they are, and that have an image."""
    return [drive for drive in select(scene, lambda drive: None, "this", "").drives if not drive.empty]


def holdings(scene: Scene, drives: t.Iterable[Drive], kind: str) -> list[Holding]:
    """Which of the drives have the snapshot; none if what has its name is of the other kind.

    :raise SnapshotAmbiguous: one has several of that name.
    """
    name, vm = scene.options.name, scene.vm
    if name not in names_of(vm, kind):
        return []
    found: list[Holding] = []
    for drive in drives:
        same = [snapshot for snapshot in drive.active.snapshots if snapshot.name == name] if not drive.empty else []
        if len(same) > 1:
            raise _ambiguous(scene, drive, same)
        found += [Holding(drive, snapshot) for snapshot in same]
    return found


def refuse_ids(scene: Scene, held: t.Iterable[Holding]) -> None:
    """For loading, QEMU looks for an id first, and only then for a name.

    :raise SnapshotAmbiguous: the name is the id of another snapshot.
    """
    for holding in held:
        other = [
            snapshot
            for snapshot in holding.drive.active.snapshots
            if snapshot.id == scene.options.name and snapshot.id != holding.snapshot.id
        ]
        if other:
            raise _ambiguous(scene, holding.drive, [holding.snapshot, *other])


def _ambiguous(scene: Scene, drive: Drive, snapshots: list[InternalSnapshot]) -> SnapshotAmbiguous:
    ids = ", ".join(snapshot.id for snapshot in snapshots)
    about = {"vm": scene.vm.name, "drive": drive.name, "image": drive.active.file, "snapshot": scene.options.name}
    of = f"The image {drive.active.file} of drive {drive.name} of VM {scene.vm.name}"
    way_out = " by their ids, with QEMU's blockdev-snapshot-delete-internal-sync"
    return SnapshotAmbiguous(of=of, ids=ids, way_out=way_out, **about)


def there(scene: Scene, kind: str, chosen: t.Sequence[Drive]) -> list[Holding]:
    """The snapshot on all the chosen drives, or nothing; then it can be taken.

    :raise SnapshotNameTaken: there is one of the other kind.
    :raise SnapshotNameNumeric: it is not there, and such a name is asking for trouble.
    :raise SnapshotIncomplete: only some have it.
    """
    name, vm = scene.options.name, scene.vm
    other = INTERNAL if kind == MEMORY else MEMORY
    if name in names_of(vm, other):
        words = {INTERNAL: "an internal", MEMORY: "a memory"}
        raise SnapshotNameTaken(vm=vm.name, snapshot=name, there=words[other], wanted=words[kind])
    held = holdings(scene, chosen, kind)
    if not held and name.isdigit():
        raise SnapshotNameNumeric(snapshot=name)
    refuse_incomplete(scene, held, chosen)
    return held


def refuse_incomplete(scene: Scene, held: t.Sequence[Holding], chosen: t.Iterable[Drive]) -> None:
    """:raise SnapshotIncomplete: some of the chosen drives have it, but not all."""
    has = {holding.drive.name for holding in held}
    lacks = {drive.name for drive in chosen} - has
    if has and lacks:
        lists = {"has": ", ".join(sorted(has)), "lacks": ", ".join(sorted(lacks))}
        raise SnapshotIncomplete(vm=scene.vm.name, snapshot=scene.options.name, **lists)


def missing(scene: Scene, kind: str) -> SnapshotMissing:
    """There is none; if it is in an image that is no longer the active one, say so."""
    name, vm = scene.options.name, scene.vm
    below = below_active(scene)
    where = f" in an active image (only in {', '.join(below)}, below an external snapshot, which has to go first)"
    known = ", ".join(sorted(names_of(vm, kind))) or "none"
    return SnapshotMissing(
        of=f"VM {vm.name}", vm=vm.name, snapshot=name, type=kind, where=where if below else "", known=known
    )


def below_active(scene: Scene) -> list[str]:
    """Images below the active ones that have a snapshot of this name. QEMU cannot work on it there."""
    name = scene.options.name
    return [
        layer.file
        for drive in scene.vm.drives
        for layer in drive.layers[1:]
        if any(snapshot.name == name for snapshot in layer.snapshots)
    ]


def left_alone(scene: Scene, kind: str) -> tuple[str, ...]:
    """Warnings for a snapshot that is absent, but has a namesake that this run does not remove."""
    name = scene.options.name
    other = INTERNAL if kind == MEMORY else MEMORY
    warnings = []
    if name in names_of(scene.vm, other):
        warnings.append(f"The {other} snapshot named {name} was left alone; type={other} removes it.")
    below = below_active(scene)
    if below:
        warnings.append(
            f"A snapshot named {name} is in {', '.join(below)}, below an external snapshot, and stays there."
        )
    return tuple(warnings)


def drive_results(drives: t.Iterable[Drive]) -> list[dict[str, t.Any]]:
    return [drive_result(drive, drive.active.file) for drive in drives]


Names = dict[str, list[str]]


def inside(drives: t.Iterable[Drive], *, plus: str | None = None, minus: str | None = None) -> Names:
    """For diff mode: the names of the snapshots in each active image, as they are or as they will be."""
    return {
        drive.name: [
            *(snapshot.name for snapshot in drive.active.snapshots if snapshot.name != minus),
            *([plus] if plus is not None else []),
        ]
        for drive in drives
    }
