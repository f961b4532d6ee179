# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Going back to a memory snapshot: drives, devices and memory become what they were, and the guest goes on from there.

QEMU loads no snapshot into an image that has dirty bitmaps ("Device has active dirty bitmaps"), and finds that out
when other drives are back already. So whatever can be known is looked at before anything is touched.
"""

from __future__ import annotations

import asyncio
import typing as t

from .._block.names import is_ours, parse_bitmap
from .._errors import BlockOpsError, CommandTimedOut
from .._qmp.nodes import remove_bitmaps
from . import snapshot_inside as common
from ._outcome import Outcome
from .snapshot_errors import BitmapsInTheWay
from .snapshot_inside import MEMORY, Holding
from .snapshot_job import job_command, run_job, tidied
from .snapshot_options import ResetNotAllowed, Scene
from .snapshot_report import vm_result
from .snapshot_view import refuse_while_jobs_run

# States that a guest comes to against its administrator's will: it ran, and is to run again.
_CRASHED = ("guest-panicked", "io-error", "watchdog", "restore-vm")
# These, QEMU lets go on only after a reset.
_ENDED = ("shutdown", "internal-error")


class MemoryNotLoaded(BlockOpsError):
    """``status`` is QEMU's run state now."""

    template = "VM {vm} was not brought back to its memory snapshot {snapshot}: {said}. Its state now is '{status}'."
    advice = (
        "Unless that is 'running', DO NOT let it continue: some of its drives may be back already, and others not. "
        "Mend the cause and run again, or power it off and use the role vm_rollback."
    )


async def reverted(scene: Scene) -> Outcome:
    """Bring the VM back to the snapshot, with all drives that it has."""
    scene, recovered = await tidied(scene)
    held = _targets(scene)
    refuse_while_jobs_run(scene, "going back to a snapshot")
    bitmaps = _bitmaps(scene, held)
    if not (scene.options.allow_reset or scene.check_mode):
        lost = "its present memory and all"
        raise ResetNotAllowed(snapshot=scene.options.name, vm=scene.vm.name, lost=lost, resets="")
    keeper = next(holding for holding in held if holding.snapshot.vm_state_size)
    nodes = [holding.drive.active.node for holding in held]
    command = job_command(scene, "snapshot-load", nodes, keeper.drive.active.node)
    drives = common.drive_results(holding.drive for holding in held)
    before, after = {"state": "as it is now"}, {"state": f"as in memory snapshot {scene.options.name}"}
    warnings = tuple(_warnings(scene, held, bitmaps))
    if scene.check_mode:
        known: dict[str, t.Any] = {"recovered": recovered, "commands": [command.to_result()]}
        return Outcome(True, vm_result(scene, MEMORY, "reverted", drives, **known), before, after, warnings)
    await remove_bitmaps(scene.session, bitmaps)
    if scene.vm.status in _ENDED:
        await _reset(scene)
    ended = await run_job(scene, command)
    status = (await scene.session.command("query-status"))["status"]
    if ended.error is not None:
        about = {"vm": scene.vm.name, "snapshot": scene.options.name, "said": ended.error, "status": status}
        changed = bool(bitmaps) or status != scene.vm.status
        return Outcome(changed, warnings=warnings, error=MemoryNotLoaded(**about))
    if _is_to_run(scene) and status != "running":
        await scene.session.command("cont")
    result = vm_result(scene, MEMORY, "reverted", drives, recovered=recovered, transaction_ms=ended.standstill_ms)
    return Outcome(True, result, before, after, warnings)


def _targets(scene: Scene) -> list[Holding]:
    """The snapshot on every drive that the guest writes to, but for those that the options leave out.

    :raise SnapshotMissing: there is none, or not the drive with the memory.
    :raise SnapshotIncomplete: a drive lacks it.
    """
    if scene.options.name not in common.names_of(scene.vm, MEMORY):
        raise common.missing(scene, MEMORY)
    chosen = common.choose(scene, MEMORY).drives
    held = common.holdings(scene, chosen, MEMORY)
    if not any(holding.snapshot.vm_state_size for holding in held):
        raise common.missing(scene, MEMORY)
    common.refuse_incomplete(scene, held, chosen)
    common.refuse_ids(scene, held)
    return held


def _bitmaps(scene: Scene, held: t.Iterable[Holding]) -> list[tuple[str, str]]:
    """Our own bitmaps, which have to go: after going back they would not know what differs from the last backup.

    :raise BitmapsInTheWay: there are others.
    """
    doomed: list[tuple[str, str]] = []
    for holding in held:
        image = holding.drive.active
        foreign = [bitmap.name for bitmap in image.bitmaps if not is_ours(bitmap.name)]
        if foreign:
            about = {"vm": scene.vm.name, "drive": holding.drive.name, "bitmaps": ", ".join(sorted(foreign))}
            of = f"Drive {holding.drive.name} of VM {scene.vm.name}"
            raise BitmapsInTheWay(of=of, way_out="block-dirty-bitmap-remove", **about)
        doomed += [(image.node, bitmap.name) for bitmap in image.bitmaps]
    return doomed


def _warnings(scene: Scene, held: t.Iterable[Holding], bitmaps: t.Iterable[tuple[str, str]]) -> t.Iterator[str]:
    nodes = {node for node, name in bitmaps if parse_bitmap(name) is not None}
    full = [holding.drive.name for holding in held if holding.drive.active.node in nodes]
    if full:
        yield (
            f"The next backup of {', '.join(full)} is a full one: QEMU goes back only without the dirty bitmaps that "
            "an incremental one needs."
        )
    if not scene.vm.running and not _is_to_run(scene):
        yield f"The VM does not run (its state was '{scene.vm.status}'), and stays so; 'cont' lets it go on."


def _is_to_run(scene: Scene) -> bool:
    return scene.vm.running or scene.vm.status in _CRASHED or scene.vm.status in _ENDED


async def _reset(scene: Scene) -> None:
    """QEMU resets its machine a moment after it has answered."""
    session = scene.session
    with session.events("RESET") as resets:
        await session.command("system_reset")
        try:
            await asyncio.wait_for(resets.get(), session.timeout)
        except asyncio.TimeoutError as exc:
            raise CommandTimedOut(command="system_reset", timeout=session.timeout) from exc
