# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Snapshots inside the qcow2 images of a running VM, without its memory."""

from __future__ import annotations

import typing as t

from .._block.graph import Drive
from .._errors import BlockOpsError, CommandFailed, CommandTimedOut, VmGone
from .._qmp.session import Command
from . import snapshot_inside as common
from ._outcome import Outcome
from .quiesce import Frozen
from .rendezvous import GroupBroken
from .snapshot_inside import INTERNAL, Holding, SnapshotNotRemoved
from .snapshot_options import Scene, SnapshotFailed
from .snapshot_point import about_point, settle, still_frozen, take_point
from .snapshot_report import vm_result
from .snapshot_view import refuse_while_jobs_run


class NotWhileRunning(BlockOpsError):
    template = (
        "VM {vm} cannot go back to its internal snapshot {snapshot} now: QEMU does that only in an image that nobody "
        "uses, and the VM's memory is not in the snapshot."
    )
    advice = (
        "Nothing was touched. Switch the VM off and use qemu_img_snapshot with state=applied on its images, or the "
        "role vm_rollback, which does both and starts it again."
    )


async def names(scene: Scene) -> set[str]:
    """Names of the internal snapshots this VM has."""
    return common.names_of(scene.vm, INTERNAL)


async def present(scene: Scene) -> Outcome:
    """Take the snapshot on all drives in one transaction, unless it is there."""
    selection = common.choose(scene, INTERNAL)
    drives, name = selection.drives, scene.options.name
    about: dict[str, t.Any] = {"drives": common.drive_results(drives), "skipped": list(selection.skipped)}
    before = common.inside(drives)
    if common.there(scene, INTERNAL, drives):
        return Outcome(False, vm_result(scene, INTERNAL, "present", **about), before, before)
    refuse_while_jobs_run(scene, "an internal snapshot")
    command = _transaction(drives, name)
    after = common.inside(drives, plus=name)
    if scene.check_mode:
        result = vm_result(scene, INTERNAL, "taken", **about, commands=[command.to_result()])
        return Outcome(True, result, before, after)
    frozen = Frozen()
    await _take(scene, command, frozen)
    spread = await settle(scene)
    result = vm_result(scene, INTERNAL, "taken", **about, **about_point(scene, frozen), group_spread_ms=spread)
    return Outcome(True, result, before, after, tuple(frozen.warnings), still_frozen(scene, frozen))


def _transaction(drives: t.Iterable[Drive], name: str) -> Command:
    """QEMU wants the node at the root; throttles and the like pass the order on to the image."""
    data = ({"device": drive.root, "name": name} for drive in drives)
    actions = [{"type": "blockdev-snapshot-internal-sync", "data": each} for each in data]
    return Command("transaction", {"actions": actions})


async def _take(scene: Scene, command: Command, frozen: Frozen) -> None:
    """The instant. QEMU takes the whole transaction back when one drive fails."""
    try:
        await take_point(scene, command, frozen)
    except (VmGone, CommandTimedOut) as exc:
        # Whether it happened is unknown: the next run looks.
        raise still_frozen(scene, frozen, exc) or exc from exc
    except BlockOpsError as exc:
        frozen_error = still_frozen(scene, frozen, exc)
        if frozen_error is not None:
            raise frozen_error from exc
        if isinstance(exc, GroupBroken):
            raise
        raise SnapshotFailed(snapshot=scene.options.name, vm=scene.vm.name, reason=str(exc)) from exc


async def absent(scene: Scene) -> Outcome:
    """Remove the snapshot from every drive that has it; a drive that has none is done already."""
    held = common.holdings(scene, common.reach(scene), INTERNAL)
    if not held:
        return Outcome(False, vm_result(scene, None, "absent"), {}, {}, common.left_alone(scene, INTERNAL))
    refuse_while_jobs_run(scene, "removing a snapshot")
    drives = [holding.drive for holding in held]
    commands = [_deletion(holding) for holding in held]
    before, after = common.inside(drives), common.inside(drives, minus=scene.options.name)
    known: dict[str, t.Any] = {"drives": common.drive_results(drives)}
    if scene.check_mode:
        known["commands"] = [command.to_result() for command in commands]
        return Outcome(True, vm_result(scene, INTERNAL, "removed", **known), before, after)
    for number, command in enumerate(commands):
        try:
            await scene.session.execute(command)
        except CommandFailed as exc:
            return Outcome(number > 0, error=_not_removed(scene, held, number, exc))
    return Outcome(True, vm_result(scene, INTERNAL, "removed", **known), before, after)


def _deletion(holding: Holding) -> Command:
    """Name and id: another tool may have made a second one of that name since it was looked for."""
    arguments = {"device": holding.drive.root, "id": holding.snapshot.id, "name": holding.snapshot.name}
    return Command("blockdev-snapshot-delete-internal-sync", arguments)


def _not_removed(scene: Scene, held: t.Sequence[Holding], number: int, exc: CommandFailed) -> SnapshotNotRemoved:
    drives = [holding.drive.name for holding in held]
    lists = {"done": ", ".join(drives[:number]) or "no drive", "left": ", ".join(drives[number:])}
    return SnapshotNotRemoved(vm=scene.vm.name, snapshot=scene.options.name, said=exc.data["said"], **lists)


async def reverted(scene: Scene) -> Outcome:
    """A running VM cannot.

    :raise NotWhileRunning: always, if there is such a snapshot.
    """
    if scene.options.name not in await names(scene):
        raise common.missing(scene, INTERNAL)
    raise NotWhileRunning(vm=scene.vm.name, snapshot=scene.options.name)
