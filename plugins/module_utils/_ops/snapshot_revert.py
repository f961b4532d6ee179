# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Going back to an external snapshot while QEMU runs on.

A fresh overlay on the snapshot takes the place of the active image under each device (the device's property ``drive``,
set by qom-set), the guest is reset, and goes on. QEMU never ends; the old branch is detached and kept or deleted.
"""

from __future__ import annotations

import asyncio
import time
import typing as t
from contextlib import suppress

from .._block.graph import Drive
from .._errors import BlockOpsError, CommandFailed, CommandTimedOut, VmGone
from .._image.snapshot_record import DISCARDED, PRESENT, REVERTING, read_record, write_record
from .._qmp.session import Session
from . import snapshot_boot
from ._outcome import Outcome
from .overlay import make, remove_overlay, take_back
from .snapshot_boot import BootFiles, Rewriting
from .snapshot_options import ResetNotAllowed, Scene
from .snapshot_recovery import recover
from .snapshot_report import chains, drive_result, vm_result
from .snapshot_revert_plan import POWER_OFF, Turn, fate, fresh, plan_all, targets
from .snapshot_view import Placed, refuse_while_jobs_run
from .vm import read_nodes


class RevertFailed(BlockOpsError):
    template = "VM {vm} was not brought back to snapshot {snapshot}: {reason}"
    advice = "Nothing has changed: every drive is on the image it had, and the guest goes on as before. " + POWER_OFF


class RevertStuck(BlockOpsError):
    template = (
        "Going back to snapshot {snapshot} of VM {vm} failed half way ({reason}), and so did the way back ({undo})."
    )
    advice = "The VM IS STOPPED, because its drives are of different moments. Run the same task again, or power it off."


async def reverted(scene: Scene) -> Outcome:
    """Bring all drives that have the snapshot back to it."""
    scene, view, recovered = await recover(scene)
    refuse_while_jobs_run(scene, "going back to a snapshot")  # first: a job's filter would look like one that stays
    placed = targets(scene, view)
    half_done = any(each.record.state == REVERTING for each in placed)
    boot = await snapshot_boot.look(scene)
    if not half_done and all(fresh(each) for each in placed):
        return _current(scene, placed, boot, recovered)
    turns = plan_all(scene, placed)
    _ask_leave(scene, turns)
    actives = {turn.drive.name: (turn.path, "qcow2") for turn in turns}
    rewriting = boot.plan(boot.moves(actives))
    kept, deleted = fate(scene, view, turns)
    result = vm_result(scene, "external", "reverted", [_drive_result(turn) for turn in turns], recovered=recovered)
    result.update(kept=kept, deleted=deleted, boot_drift=boot.drift(actives))
    before = chains(turn.drive for turn in turns)
    after = {turn.drive.name: _files_after(turn) for turn in turns}
    diff = rewriting.diff(before, after)
    if scene.check_mode:
        result.update(definition=rewriting.result(True), commands=_decisive(scene, turns))
        return Outcome(True, result, *diff, warnings=rewriting.warnings)
    result["transaction_ms"] = await _go_back(scene, turns, rewriting)
    trouble = await _dispose(scene, turns, deleted)
    result["commands"] = [command.to_result() for command in scene.session.sent]
    result["definition"] = rewriting.result(False)
    warnings = (*trouble, *rewriting.warnings, *boot.warnings(actives, rewriting))
    return Outcome(True, result, *diff, warnings=warnings)


def _ask_leave(scene: Scene, turns: t.Iterable[Turn]) -> None:
    """The guest is reset and loses what it wrote: never without having been told to. Check mode only tells."""
    if scene.options.allow_reset or scene.check_mode:
        return
    lost = sum(turn.lost for turn in turns)
    resets = ", and resets the guest" if scene.vm.running else ""
    raise ResetNotAllowed(snapshot=scene.options.name, vm=scene.vm.name, lost=lost, resets=resets)


async def _go_back(scene: Scene, turns: list[Turn], rewriting: Rewriting) -> float:
    """Make and attach every overlay, then stop, swap, reset, continue: the guest stands still for the swap alone.

    Answers for how many milliseconds that was.
    """
    overlays = [turn.overlay for turn in turns if turn.overlay is not None]
    resume = scene.vm.running or any(turn.placed.record.running for turn in turns if turn.overlay is None)
    if scene.vm.running and not overlays:
        rewriting.write()
        return 0.0  # a killed run came as far as this: the guest was reset and runs
    try:
        for overlay in overlays:
            like = overlay.below.file if overlay.below.protocol == "file" else None
            await make(scene.session, overlay, overlay.below.node, like)
            if overlay.bitmaps:
                await scene.session.command("transaction", actions=overlay.bitmap_actions())
        rewriting.write()
        began = time.monotonic()
        if scene.vm.running:
            await scene.session.command("stop")
        await _swap(scene, turns)
    except (VmGone, CommandTimedOut):
        raise
    except BlockOpsError as exc:
        if isinstance(exc, RevertStuck):
            raise
        if len(overlays) < len(turns):
            # A killed run had brought some drives back already: the guest must not go on with the others as they are.
            undo = "a run before this one had brought some drives back"
            raise RevertStuck(snapshot=scene.options.name, vm=scene.vm.name, reason=str(exc), undo=undo) from exc
        if scene.vm.running:
            await scene.session.command("cont")
        rewriting.undo()
        await take_back(scene.session, overlays, await read_nodes(scene.session))
        raise RevertFailed(vm=scene.vm.name, snapshot=scene.options.name, reason=str(exc)) from exc
    await _reset(scene.session)
    if resume:
        await scene.session.command("cont")
    return round((time.monotonic() - began) * 1000, 1)


async def _reset(session: Session) -> None:
    """Reset the stopped guest and wait until it is: one that went on before would write what it remembers."""
    with session.events("RESET") as listener:
        await session.command("system_reset")
        try:
            await asyncio.wait_for(listener.get(), session.timeout)
        except asyncio.TimeoutError as exc:
            raise CommandTimedOut(command="system_reset", timeout=session.timeout) from exc


async def _swap(scene: Scene, turns: list[Turn]) -> None:
    """Put every overlay under its device. If one cannot be, those before it go back to what they had."""
    swapped: list[Turn] = []
    try:
        for turn in turns:
            if turn.overlay is not None:
                await _put_under(scene, turn.drive, turn.overlay.node)
                swapped.append(turn)
    except CommandFailed as exc:
        try:
            for turn in swapped:
                await _put_under(scene, turn.drive, turn.drive.active.node)
        except CommandFailed as undo:
            stuck = {"reason": str(exc), "undo": str(undo)}
            raise RevertStuck(snapshot=scene.options.name, vm=scene.vm.name, **stuck) from exc
        raise


async def _put_under(scene: Scene, drive: Drive, node: str) -> None:
    """Give the device another image (QOM property ``drive``; query-block tells the device's path or its id)."""
    qdev = drive.qdev or ""
    path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
    await scene.session.command("qom-set", path=path, property="drive", value=node)


async def _dispose(scene: Scene, turns: list[Turn], deleted: t.Sequence[str]) -> list[str]:
    """Detach the old branches, and delete or mark their files. What cannot be done is a warning: the VM is back."""
    warnings: list[str] = []
    nodes = await read_nodes(scene.session)
    for turn in turns:
        for layer in turn.drive.layers[: turn.placed.index + 1] if turn.overlay is not None else ():
            if layer.node in nodes:
                with suppress(CommandFailed):  # it went with the one above
                    await scene.session.command("blockdev-del", node_name=layer.node)
        for file in turn.branch:
            try:
                await asyncio.to_thread(_dispose_of, file, file in deleted)
            except BlockOpsError as exc:
                warnings.append(f"The discarded overlay {file} was left as it is: {exc}")
    # Only now is it over: killed before, the next run still knows what is to be disposed of.
    for turn in turns:
        record = read_record(turn.path)
        if record is not None:
            await asyncio.to_thread(write_record, record.in_state(PRESENT, discards=()))
    return warnings


def _dispose_of(file: str, delete: bool) -> None:
    if delete:
        remove_overlay(file)
        return
    record = read_record(file)
    if record is not None:
        write_record(record.in_state(DISCARDED))


def _current(scene: Scene, placed: list[Placed], boot: BootFiles, recovered: list[str]) -> Outcome:
    rewriting = boot.plan(boot.moves({}))
    if not scene.check_mode:
        rewriting.write()
    drives = [drive_result(each.drive, each.image.file, overlay=each.overlay.file, bytes_=0) for each in placed]
    result = vm_result(scene, "external", "current", drives, recovered=recovered)
    result.update(definition=rewriting.result(scene.check_mode), boot_drift=boot.drift({}))
    same = chains(each.drive for each in placed)
    warnings = (*rewriting.warnings, *boot.warnings({}, rewriting))
    return Outcome(bool(recovered) or rewriting.needed, result, *rewriting.diff(same, same), warnings=warnings)


def _drive_result(turn: Turn) -> dict[str, t.Any]:
    overlay = turn.overlay
    return drive_result(
        turn.drive,
        turn.placed.image.file,
        overlay=turn.path,
        node=overlay.node if overlay is not None else None,
        bytes_=turn.lost,
        bitmaps=[name for name, _granularity in overlay.bitmaps] if overlay is not None else (),
    )


def _files_after(turn: Turn) -> list[str]:
    below = turn.drive.layers[turn.placed.index + 1 :]
    return [turn.path, *(layer.file for layer in below)]


def _decisive(scene: Scene, turns: t.Iterable[Turn]) -> list[dict[str, t.Any]]:
    """Check mode's view: what is done to the VM, without the preparations."""
    swaps = [
        {
            "execute": "qom-set",
            "arguments": {"path": turn.drive.qdev, "property": "drive", "value": turn.overlay.node},
        }
        for turn in turns
        if turn.overlay is not None
    ]
    around = {"execute": "stop"}, {"execute": "system_reset"}, {"execute": "cont"}
    return [around[0], *swaps, around[1], around[2]] if scene.vm.running else [*swaps, around[1]]
