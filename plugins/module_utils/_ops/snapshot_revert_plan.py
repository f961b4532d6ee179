# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What going back to an external snapshot would do: which drives, onto which overlays, what is lost, kept, deleted."""

from __future__ import annotations

import dataclasses
import os
import typing as t

from .._block.graph import Drive, Layer
from .._errors import BlockOpsError
from .._image.dependents import dependents
from .._image.snapshot_record import MERGING, REVERTING, read_record
from .._image.users import holders
from .overlay import Overlay, plan_overlay
from .snapshot_errors import SnapshotMissing
from .snapshot_options import DriveUnsuited, Scene, SnapshotIncomplete
from .snapshot_view import Placed, View, is_firmware

WHAT = "going back to a snapshot while QEMU runs"
POWER_OFF = "Go back with the VM switched off (role vm_rollback, or qemu_img_snapshot with type=external)."


class SnapshotSpoilt(BlockOpsError):
    template = "Snapshot {snapshot} of drive {drive} of VM {vm} is no longer what it was: merging it was begun."
    advice = "Nothing was touched. It cannot be gone back to; finish removing it by state=absent, or restore a backup."


@dataclasses.dataclass(frozen=True)
class Turn:
    """One drive that goes back. ``branch``: files from the active image down to the snapshot's overlay.

    ``overlay`` is ``None`` when the drive is back already (a killed run did that).
    """

    placed: Placed
    overlay: Overlay | None
    branch: tuple[str, ...]
    lost: int

    @property
    def drive(self) -> Drive:
        return self.placed.drive

    @property
    def path(self) -> str:
        return self.overlay.path if self.overlay is not None else self.drive.active.file


def targets(scene: Scene, view: View) -> list[Placed]:
    """The lowest overlay of this snapshot on each of its drives, which have to be all that can be written."""
    vm, options = scene.vm, scene.options
    wanted = scene.entry.drives or options.drives
    excluded = scene.entry.exclude_drives or options.exclude_drives
    found = {each.drive.name: each for each in view.of(options.name, wanted) if each.drive.name not in excluded}
    if not found:
        where = f" on {', '.join(wanted)}" if wanted else ""
        known = ", ".join(sorted(view.names)) or "none"
        about = {"of": f"VM {vm.name}", "vm": vm.name, "snapshot": options.name, "type": "external"}
        raise SnapshotMissing(where=where, known=known, **about)
    chosen = set(wanted) or {
        drive.name
        for drive in vm.drives
        if not drive.empty and not drive.removable and not is_firmware(drive) and not drive.active.read_only
    } - set(excluded)
    if chosen - found.keys():
        lists = {"has": ", ".join(sorted(found)), "lacks": ", ".join(sorted(chosen - found.keys()))}
        raise SnapshotIncomplete(vm=vm.name, snapshot=options.name, **lists)
    for each in found.values():
        _refuse_unfit(scene, each)
    return list(found.values())


def _refuse_unfit(scene: Scene, placed: Placed) -> None:
    if placed.record.state == MERGING:
        raise SnapshotSpoilt(snapshot=placed.record.name, drive=placed.drive.name, vm=scene.vm.name)
    reason = None
    if placed.drive.filters:
        reason = f"the filter {placed.drive.filters[0]} above its image would be lost"
    elif placed.drive.qdev is None:
        reason = "no device of the VM uses it"
    elif placed.image.virtual_size != placed.drive.active.virtual_size:
        reason = f"it was resized from {placed.image.virtual_size} to {placed.drive.active.virtual_size} bytes since"
    if reason is not None:
        raise DriveUnsuited(drive=placed.drive.name, vm=scene.vm.name, what=WHAT, reason=reason, way_out=POWER_OFF)


def fresh(placed: Placed) -> bool:
    """Whether nothing has been written since: the active image is the snapshot's overlay and holds no data.

    With a guest's first write come a table and a cluster, which is more than the tables of an empty image.
    """
    return placed.active and placed.overlay.allocated <= _tables(placed.overlay)


def _written(placed: Placed) -> int:
    """About how many bytes the guest wrote since the snapshot: what the images of the branch occupy, without tables."""
    branch = placed.drive.layers[: placed.index + 1]
    return sum(max(0, layer.allocated - _tables(layer)) for layer in branch)


def _tables(layer: Layer) -> int:
    """Bytes of an empty qcow2 image: header, refcount table and block, and L1 (8 bytes for each L2 table's reach)."""
    cluster = layer.cluster_size
    entries = -(-layer.virtual_size // (cluster // 8 * cluster))
    return (3 + -(-entries * 8 // cluster)) * cluster


def plan_all(scene: Scene, placed: list[Placed]) -> list[Turn]:
    """Go on where a killed run ended; but never put some drives of a guest that runs back further than the others."""
    back = [_is_back(each) for each in placed]
    anew = scene.vm.running and not all(back)
    return [
        Turn(each, None, each.record.discards, 0) if done and not anew else _plan(scene, each)
        for each, done in zip(placed, back)
    ]


def _is_back(placed: Placed) -> bool:
    return placed.record.state == REVERTING and placed.active


def _plan(scene: Scene, placed: Placed) -> Turn:
    overlay = plan_overlay(scene, placed.drive, placed.image, scene.vm.nodes, WHAT)
    branch = tuple(layer.file for layer in placed.drive.layers[: placed.index + 1])
    if placed.record.state == REVERTING:
        branch += placed.record.discards  # of a run that was killed before it disposed of them
    record = overlay.record.in_state(
        REVERTING,
        running=scene.vm.running,
        discards=branch,
        created=placed.record.created,
        consistency=placed.record.consistency,
    )
    return Turn(placed, dataclasses.replace(overlay, record=record), branch, _written(placed))


def fate(scene: Scene, view: View, turns: t.Iterable[Turn]) -> tuple[list[str], list[str]]:
    """Which files of the branches are kept and which deleted: from the top down, so that one kept keeps those below."""
    kept: list[str] = []
    deleted: list[str] = []
    holding = {layer.file for turn in turns for layer in turn.drive.layers if layer.snapshots}
    for file in (file for turn in turns for file in turn.branch):
        if file in scene.gone or not os.path.exists(file):
            continue
        ours = scene.options.discarded == "delete" and file not in holding and read_record(file) is not None
        (deleted if ours and not _needed(scene, view, file, {*deleted, *scene.gone}) else kept).append(file)
    return kept, deleted


def _needed(scene: Scene, view: View, file: str, going: set[str]) -> bool:
    """Whether another image is based on the file, or another process has it open."""
    real = {os.path.realpath(path) for path in going}
    based = any(os.path.realpath(user) not in real for user in dependents(file, view.directories))
    return based or any(user.pid != scene.session.process.pid for user in holders(file))
