# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""qmp_dirty_bitmap: observe, plan, and change one bitmap on all drives of a VM in one transaction."""

from __future__ import annotations

import dataclasses
import typing as t

from .._block.graph import Bitmap, Drive
from .._errors import BlockOpsError, CommandFailed
from .._qmp.session import Command, Session
from ._outcome import Outcome
from .claim import act_on
from .dirty_bitmap_plan import ABSENT, MERGED, BitmapOptions, Change, below, plan
from .snapshot_options import Scene
from .snapshot_view import select
from .vm import VmEntry, read_vm

_WHAT = "changing dirty bitmaps"


class BitmapRefused(BlockOpsError):
    template = "QEMU refused to bring bitmap {bitmap} of VM {vm} to state={state}: {said}"
    advice = "Nothing has changed: the drives of a VM change together or not at all. Run again, which looks anew."


class BitmapStays(BlockOpsError):
    """Seen in some releases with inconsistent ones: QEMU agrees to remove a bitmap and keeps it."""

    template = "QEMU agreed to remove bitmap {bitmap} of drives {drives} of VM {vm}, but it is still there."
    advice = "When the VM is off, qemu-img bitmap --remove takes it out of the image."


class DirtyBitmapVms:
    """The operation on one entry of ``vms``."""

    def __init__(self, options: BitmapOptions) -> None:
        self._options = options.checked()

    async def __call__(self, params: dict[str, t.Any]) -> Outcome:
        # Alone: a snapshot taken meanwhile would leave a new bitmap on an image that the guest no longer writes to.
        return await act_on(VmEntry.from_params(params), self._options, self._on)

    async def _on(self, session: Session, entry: VmEntry) -> Outcome:
        options = self._options
        vm = await read_vm(session, entry.name)
        scene = Scene(session, vm, entry, options.for_snapshots())
        selection = select(scene, self._judge, _WHAT, "Correct the options drives and persistent.")
        changes = plan(options, vm.name, selection.drives, vm.drives)
        texts = _texts(changes)
        command = Command("transaction", {"actions": [action for change in changes for action in change.actions]})
        needed = any(change.changed for change in changes)
        if needed and not options.check_mode:
            changes = await self._execute(scene, command, changes)
        result = {
            "name": vm.name,
            "bitmap": options.name,
            "status": options.state if _changed(changes) else "unchanged",
            "drives": [self._drive(change) for change in changes],
            "skipped": list(selection.skipped),
            "commands": [command.to_result()] if needed else [],
        }
        return Outcome(_changed(changes), result, *texts)

    def _judge(self, drive: Drive) -> str | None:
        if drive.empty:
            return "it holds no image"
        if drive.active.read_only:
            return "the guest cannot write to it"
        if self._options.persistent and self._options.state != ABSENT and not drive.active.keeps_bitmaps:
            return f"an image of format {drive.active.driver} of its kind stores no bitmaps, and persistent is true"
        return None

    async def _execute(self, scene: Scene, command: Command, changes: list[Change]) -> list[Change]:
        """Do it, and answer what has become of it."""
        about = {"bitmap": self._options.name, "vm": scene.vm.name}
        try:
            await scene.session.execute(command)
        except CommandFailed as exc:
            raise BitmapRefused(state=self._options.state, said=f"{exc.data['said']}.", **about) from exc
        now = await read_vm(scene.session, scene.entry.name)
        after = [self._as_it_is(change, now.drive(change.drive.name)) for change in changes]
        if self._options.state == ABSENT:
            stays = [change.drive.name for change in after if change.after is not None]
            if stays:
                raise BitmapStays(drives=", ".join(stays), **about)
        return after

    def _as_it_is(self, change: Change, drive: Drive | None) -> Change:
        if drive is None or drive.empty:
            return change
        after = drive.active.bitmap(self._options.name)
        same = change.before is not None and after is not None and change.before.count == after.count
        # Merging adds only, so nothing was added if there is not more than before.
        actions = () if self._options.state == MERGED and same else change.actions
        return dataclasses.replace(change, drive=drive, after=after, actions=actions, counted=True)

    def _drive(self, change: Change) -> dict[str, t.Any]:
        return {
            "name": change.drive.name,
            "node": change.drive.active.node,
            "changed": change.changed,
            "bitmap": _bitmap(change.after, change.counted),
            "below": below(self._options, change.drive),
        }


def _changed(changes: t.Iterable[Change]) -> bool:
    return any(change.changed for change in changes)


def _bitmap(bitmap: Bitmap | None, counted: bool) -> dict[str, t.Any] | None:
    if bitmap is None:
        return None
    return {
        "state": bitmap.state,
        "count": bitmap.count if counted else None,
        "granularity": bitmap.granularity,
        "persistent": bitmap.persistent,
    }


def _texts(changes: list[Change]) -> tuple[dict[str, t.Any], dict[str, t.Any]]:
    return (
        {change.drive.name: _text(change.before) for change in changes},
        {change.drive.name: _text(change.after) for change in changes},
    )


def _text(bitmap: Bitmap | None) -> dict[str, t.Any] | None:
    """For diff mode. How much is dirty changes all the time; whether anything is does not."""
    if bitmap is None:
        return None
    known = {"state": bitmap.state, "empty": not bitmap.count}
    return {**known, "granularity": bitmap.granularity, "persistent": bitmap.persistent}
