# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""External snapshots: taking one. Dropping and going back are in snapshot_merge and snapshot_revert."""

from __future__ import annotations

import asyncio
import typing as t
from datetime import datetime, timezone

from .._block.graph import Drive
from .._block.names import parse_bitmap
from .._errors import BlockOpsError, CommandTimedOut, VmGone
from .._image.snapshot_record import MERGING, PRESENT, write_record
from .._qmp.session import Command
from . import snapshot_boot
from ._outcome import Outcome
from .overlay import Overlay, make, plan_overlay, take_back
from .quiesce import Frozen
from .rendezvous import GroupBroken
from .snapshot_boot import BootFiles
from .snapshot_merge import absent
from .snapshot_options import Scene, SnapshotFailed, SnapshotIncomplete
from .snapshot_point import about_point, settle, still_frozen, take_point
from .snapshot_recovery import recover
from .snapshot_report import Chains, chains, drive_result, vm_result
from .snapshot_revert import reverted
from .snapshot_view import Selection, View, is_firmware, look, refuse_while_jobs_run, select
from .vm import read_nodes

_WHAT = "an external snapshot"
_WAY_OUT = "Leave it out by drives or exclude_drives."


class BeingRemoved(BlockOpsError):
    template = "Snapshot {snapshot} of VM {vm} is being removed: merging its overlay {overlay} was begun."
    advice = "Nothing was touched. Finish that by state=absent; then it can be taken anew."


async def names(scene: Scene) -> set[str]:
    """Names of the external snapshots this VM has."""
    return look(scene).names


async def present(scene: Scene) -> Outcome:
    """Take the snapshot, unless it is there."""
    scene, view, recovered = await recover(scene)
    refuse_while_jobs_run(scene, "a snapshot")
    selection = select(scene, unfit, _WHAT, _WAY_OUT)
    before = chains(selection.drives)
    there = _there(scene, view, selection)
    boot = await snapshot_boot.look(scene)
    if there:
        return _unchanged(scene, there, selection, boot, recovered)
    nodes = set(scene.vm.nodes)
    overlays = [plan_overlay(scene, drive, drive.active, nodes, _WHAT) for drive in selection.drives]
    actives = {overlay.drive.name: (overlay.path, "qcow2") for overlay in overlays}
    rewriting = boot.plan(boot.moves(actives))  # refuses what it cannot do, before anything is touched
    command = _transaction(overlays)
    drives = [_drive_result(overlay) for overlay in overlays]
    after = _after(overlays)
    if scene.check_mode:
        result = vm_result(scene, "external", "taken", drives, skipped=list(selection.skipped), recovered=recovered)
        result.update(commands=[command.to_result()], definition=rewriting.result(True), boot_drift=boot.drift(actives))
        diff = rewriting.diff(before, after)
        return Outcome(True, result, *diff, warnings=(*_warnings(selection), *rewriting.warnings))
    frozen = Frozen()
    await _take(scene, overlays, command, rewriting, frozen)
    spread = await settle(scene)
    result = vm_result(scene, "external", "taken", drives, skipped=list(selection.skipped), recovered=recovered)
    result.update(about_point(scene, frozen), group_spread_ms=spread)
    result.update(definition=rewriting.result(False), boot_drift=boot.drift(actives))
    warnings = (*frozen.warnings, *_warnings(selection), *rewriting.warnings, *boot.warnings(actives, rewriting))
    diff = rewriting.diff(before, after)
    return Outcome(True, result, *diff, warnings=warnings, error=still_frozen(scene, frozen))


def unfit(drive: Drive) -> str | None:
    """Why a drive cannot have an external snapshot, or ``None``."""
    if drive.empty:
        return "it is empty (no medium inserted)"
    if drive.active.driver in ("quorum", "blkverify"):
        return f"the {drive.active.driver} driver has no single image"
    if is_firmware(drive):
        return "it is firmware memory (pflash) or used by no device, and stays as it is"
    if drive.removable:
        return "it is a removable medium"
    if drive.active.read_only:
        return "it is read-only, so nothing can change that a snapshot would keep"
    if drive.active.encrypted:
        return (
            "it is encrypted, and an overlay would hold what the guest writes in the clear; type=internal keeps it so"
        )
    return None


def _there(scene: Scene, view: View, selection: Selection) -> list[t.Any]:
    """The snapshot on all the chosen drives, or nothing.

    :raise SnapshotIncomplete: only some have it.
    :raise BeingRemoved: it is half removed.
    """
    chosen = {drive.name for drive in selection.drives}
    there = view.of(scene.options.name, chosen)
    for placed in there:
        if placed.record.state == MERGING:
            raise BeingRemoved(snapshot=scene.options.name, vm=scene.vm.name, overlay=placed.overlay.file)
    has = {placed.drive.name for placed in there}
    if has and has != chosen:
        lists = {"has": ", ".join(sorted(has)), "lacks": ", ".join(sorted(chosen - has))}
        raise SnapshotIncomplete(vm=scene.vm.name, snapshot=scene.options.name, **lists)
    return there


def _unchanged(
    scene: Scene, there: list[t.Any], selection: Selection, boot: BootFiles, recovered: list[str]
) -> Outcome:
    """It is there; what may still be missing is the definition, when the first run had none."""
    rewriting = boot.plan(boot.moves({}))
    if not scene.check_mode:
        rewriting.write()
    drives = [drive_result(placed.drive, placed.image.file, overlay=placed.overlay.file) for placed in there]
    result = vm_result(scene, "external", "present", drives, skipped=list(selection.skipped), recovered=recovered)
    result.update(definition=rewriting.result(scene.check_mode), boot_drift=boot.drift({}))
    same = chains(selection.drives)
    diff = rewriting.diff(same, same)
    warnings = (*rewriting.warnings, *boot.warnings({}, rewriting))
    return Outcome(bool(recovered) or rewriting.needed, result, *diff, warnings=warnings)


def _transaction(overlays: t.Iterable[Overlay]) -> Command:
    """The one command that is the instant of all drives (QAPI: transaction, blockdev-snapshot)."""
    actions: list[dict[str, t.Any]] = []
    for overlay in overlays:
        data = {"node": overlay.below.node, "overlay": overlay.node}
        actions += [{"type": "blockdev-snapshot", "data": data}, *overlay.bitmap_actions()]
    return Command("transaction", {"actions": actions})


async def _take(scene: Scene, overlays: list[Overlay], command: Command, rewriting: t.Any, frozen: Frozen) -> None:
    """Make everything, then the instant. A failure before it takes everything back.

    The definition goes first: an empty overlay reads as the image below it, so a VM that died now and was started from
    either would be right; started from the old file after the instant it would not.
    """
    try:
        for overlay in overlays:
            like = overlay.below.file if overlay.below.protocol == "file" else None
            await make(scene.session, overlay, None, like)
        rewriting.write()
        await take_point(scene, command, frozen)
    except (VmGone, CommandTimedOut):
        raise  # whether it happened is unknown: the next run looks, and cleans up or goes on
    except BlockOpsError as exc:
        rewriting.undo()
        await take_back(scene.session, overlays, await read_nodes(scene.session))
        frozen_error = still_frozen(scene, frozen, exc)
        if frozen_error is not None:
            raise frozen_error from exc
        if isinstance(exc, GroupBroken):
            raise
        raise SnapshotFailed(snapshot=scene.options.name, vm=scene.vm.name, reason=str(exc)) from exc
    for overlay in overlays:
        record = overlay.record.in_state(PRESENT, consistency=frozen.consistency, created=_moment(frozen))
        await asyncio.to_thread(write_record, record)


def _moment(frozen: Frozen) -> str:
    return (frozen.point or datetime.now(timezone.utc)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _drive_result(overlay: Overlay) -> dict[str, t.Any]:
    names_ = [name for name, _granularity in overlay.bitmaps]
    return drive_result(overlay.drive, overlay.below.file, overlay=overlay.path, node=overlay.node, bitmaps=names_)


def _after(overlays: t.Iterable[Overlay]) -> Chains:
    return {overlay.drive.name: [overlay.path, *(layer.file for layer in overlay.drive.layers)] for overlay in overlays}


def _warnings(selection: Selection) -> t.Iterator[str]:
    for drive in selection.drives:
        foreign = [bitmap.name for bitmap in drive.active.bitmaps if parse_bitmap(bitmap.name) is None]
        if foreign:
            yield f"Bitmaps of other tools on drive {drive.name} do not go on in the overlay: {', '.join(foreign)}."


__all__ = ["absent", "names", "present", "reverted"]
