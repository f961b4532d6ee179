# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Snapshots of a running VM with its memory and devices, inside its qcow2 images. The guest stands still meanwhile."""

from __future__ import annotations

import time
import typing as t
from datetime import datetime, timezone

from .._block.graph import Drive
from .._errors import BlockOpsError
from .._qmp.schema import read_schema
from . import snapshot_inside as common
from ._outcome import Outcome
from .snapshot_inside import MEMORY, SnapshotNotRemoved
from .snapshot_job import Ended, job_command, leftover_jobs, run_job, tidied
from .snapshot_memory_revert import reverted
from .snapshot_options import Scene, SnapshotFailed
from .snapshot_point import settle
from .snapshot_report import vm_result
from .snapshot_view import Selection, refuse_while_jobs_run
from .vm import read_vm


class MemoryUnsupported(BlockOpsError):
    template = "The QEMU {version} of VM {vm} has no {command}; it came with QEMU 6.0."
    advice = "Nothing was touched. Take an external or internal snapshot, which have no memory."


class MemoryBlocked(BlockOpsError):
    template = "The memory and devices of VM {vm} cannot be saved: {reasons}."
    advice = "Nothing was touched. Take an external or internal snapshot, or start the VM without that device."


async def names(scene: Scene) -> set[str]:
    """Names of the memory snapshots this VM has; for ``absent`` also the one of which a killed run left a job."""
    found = common.names_of(scene.vm, MEMORY)
    left = scene.options.state == "absent" and leftover_jobs(scene)
    return {*found, scene.options.name} if left else found


async def present(scene: Scene) -> Outcome:
    """Save memory, devices and drives, unless that is there."""
    scene, recovered = await tidied(scene)
    selection = common.choose(scene, MEMORY)
    drives = selection.drives
    about: dict[str, t.Any] = {"drives": common.drive_results(drives), "skipped": list(selection.skipped)}
    about["recovered"] = recovered
    before = common.inside(drives)
    if common.there(scene, MEMORY, drives):
        return Outcome(bool(recovered), vm_result(scene, MEMORY, "present", **about), before, before)
    refuse_while_jobs_run(scene, "a memory snapshot")
    await _refuse_impossible(scene)
    keeper = _keeper(drives)
    nodes = [keeper.active.node, *(drive.active.node for drive in drives if drive is not keeper)]
    command = job_command(scene, "snapshot-save", nodes, keeper.active.node)
    after = common.inside(drives, plus=scene.options.name)
    warnings = tuple(_warnings(scene, selection))
    if scene.check_mode:
        result = vm_result(scene, MEMORY, "taken", **about, commands=[command.to_result()])
        return Outcome(True, result, before, after, warnings)
    if scene.group is not None:
        await scene.group.meet(scene.vm.name)
    ended = await run_job(scene, command)
    await _stand_up(scene, ended)
    if ended.error is not None:
        raise SnapshotFailed(snapshot=scene.options.name, vm=scene.vm.name, reason=f"{ended.error}.")
    spread = await _grouped(scene, ended)
    about.update(consistency="memory", point=_text(ended.instant), transaction_ms=ended.standstill_ms)
    return Outcome(True, vm_result(scene, MEMORY, "taken", **about, group_spread_ms=spread), before, after, warnings)


def _keeper(drives: t.Sequence[Drive]) -> Drive:
    """The drive whose image gets the memory: the first that is not the firmware's small one."""
    large = (drive for drive in drives if not str(drive.qdev).startswith("/machine/system.flash"))
    return next(large, drives[0])


async def _refuse_impossible(scene: Scene) -> None:
    """What QEMU would refuse, asked before the guest is stopped for it.

    :raise MemoryUnsupported: it is older than 6.0.
    :raise MemoryBlocked: a device cannot be saved.
    """
    vm = scene.vm
    if not (await read_schema(scene.session)).has_command("snapshot-save"):
        raise MemoryUnsupported(vm=vm.name, version=vm.version, command="snapshot-save")
    blocked = (await scene.session.command("query-migrate")).get("blocked-reasons")
    if blocked:
        raise MemoryBlocked(vm=vm.name, reasons="; ".join(reason.strip().rstrip(".") for reason in blocked))


def _warnings(scene: Scene, selection: Selection) -> t.Iterator[str]:
    """The guest's memory goes back and its disk does not: that is how file systems are destroyed."""
    chosen = {drive.name for drive in selection.drives}
    for drive in scene.vm.drives:
        if drive.name not in chosen and not drive.empty and drive.qdev is not None and not drive.active.read_only:
            yield (
                f"Drive {drive.name} is left out. Going back brings the guest an older memory over a newer disk, "
                "which damages a file system that is mounted from it."
            )


async def _stand_up(scene: Scene, ended: Ended) -> None:
    """A guest that ran before runs again, also when QEMU could not save it."""
    if not scene.vm.running or (ended.stopped is None) or ended.resumed is not None:
        return
    status = await scene.session.command("query-status")
    if not status["running"]:
        await scene.session.command("cont")


async def _grouped(scene: Scene, ended: Ended) -> float | None:
    if scene.group is not None:
        instant = ended.instant + time.monotonic() - time.time()
        scene.group.note(instant, instant)
    return await settle(scene)


def _text(moment: float) -> str:
    return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def absent(scene: Scene) -> Outcome:
    """Remove the snapshot with its memory from every drive that has it."""
    scene, recovered = await tidied(scene)
    held = common.holdings(scene, common.reach(scene), MEMORY)
    if not held:
        result = vm_result(scene, None, "absent", recovered=recovered)
        return Outcome(bool(recovered), result, {}, {}, common.left_alone(scene, MEMORY))
    refuse_while_jobs_run(scene, "removing a snapshot")
    # The one with the memory last: should QEMU die in between, what is left still shows which kind it is.
    order = sorted(held, key=lambda holding: holding.snapshot.vm_state_size)
    command = job_command(scene, "snapshot-delete", [holding.drive.active.node for holding in order])
    drives = [holding.drive for holding in held]
    before, after = common.inside(drives), common.inside(drives, minus=scene.options.name)
    about: dict[str, t.Any] = {"drives": common.drive_results(drives), "recovered": recovered}
    if scene.check_mode:
        result = vm_result(scene, MEMORY, "removed", **about, commands=[command.to_result()])
        return Outcome(True, result, before, after)
    ended = await run_job(scene, command)
    if ended.error is not None:
        return await _not_removed(scene, [drive.name for drive in drives], ended.error)
    return Outcome(True, vm_result(scene, MEMORY, "removed", **about), before, after)


async def _not_removed(scene: Scene, had: t.Sequence[str], said: str) -> Outcome:
    """QEMU removes drive by drive and ends at the first that fails; which, only a look tells."""
    vm = await read_vm(scene.session, scene.vm.name)
    name = scene.options.name
    left = [
        drive.name
        for drive in vm.drives
        if drive.name in had and any(snapshot.name == name for snapshot in drive.active.snapshots)
    ]
    done = [drive for drive in had if drive not in left]
    lists = {"done": ", ".join(done) or "no drive", "left": ", ".join(left) or "no drive"}
    return Outcome(bool(done), error=SnapshotNotRemoved(vm=vm.name, snapshot=name, said=said, **lists))


__all__ = ["absent", "names", "present", "reverted"]
