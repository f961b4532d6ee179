# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Cleaning up after runs that were killed: always first, always idempotent, and only what the records call ours."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from contextlib import suppress

from .._errors import CommandFailed
from .._image.snapshot_record import MERGED, PREPARING, REVERTING, remove_record, write_record
from .._qmp.nodes import flush
from .cold_boot import plan_definitions
from .overlay import remove_overlay
from .snapshot_boot import Rewriting
from .snapshot_options import Scene
from .snapshot_recovery_plan import Recovery, moves_off, plan
from .snapshot_view import View, look
from .vm import read_vm


async def recover(scene: Scene) -> tuple[Scene, View, list[str]]:
    """Clean up, or in check mode say what would be. Answers the scene and the view as they are then.

    :raise RevertInterrupted: a revert stopped half way, and this run is not there to finish it.
    """
    view = await asyncio.to_thread(look, scene)
    recovery = plan(scene, view)
    if not recovery.needed:
        return scene, view, []
    scene = dataclasses.replace(scene, stale=frozenset((record.drive, record.overlay) for record in recovery.doomed))
    mending = await asyncio.to_thread(_mending, scene, recovery)
    if not scene.check_mode:
        await asyncio.to_thread(mending.write)  # first, so that none ever names a file that is not there
    scene = dataclasses.replace(scene, mended=tuple(mending.result(scene.check_mode)))
    if scene.check_mode:
        return _without(scene, recovery), _as_if_done(view, recovery), recovery.sentences()
    await _execute(scene, recovery)
    scene = dataclasses.replace(scene, vm=await read_vm(scene.session, scene.entry.name))
    return scene, await asyncio.to_thread(look, scene), recovery.sentences()


def _mending(scene: Scene, recovery: Recovery) -> Rewriting:
    """No start-up file may name an overlay that is about to go, whether or not this run was told of the file.

    :raise DefinitionUnsafe: a file names one in a way that cannot be changed for sure.
    """
    changes = [*plan_definitions(scene.definition, recovery.mends)]
    told = {os.path.realpath(path) for path in scene.definition}
    others = {path for record in recovery.doomed for path in record.definition if os.path.realpath(path) not in told}
    files = sorted(path for path in others if os.path.exists(path))
    changes += plan_definitions(files, tuple(moves_off(scene, recovery.doomed)))
    return Rewriting(changes)


def _without(scene: Scene, recovery: Recovery) -> Scene:
    vm = dataclasses.replace(
        scene.vm,
        status="running" if recovery.resume else scene.vm.status,
        nodes=tuple(node for node in scene.vm.nodes if node not in recovery.nodes),
        jobs={name: job for name, job in scene.vm.jobs.items() if name not in recovery.jobs},
    )
    gone = {record.overlay for record in recovery.doomed} | set(recovery.forget)
    return dataclasses.replace(scene, vm=vm, gone=frozenset(gone))


def _as_if_done(view: View, recovery: Recovery) -> View:
    settled = {record.overlay: record for record in recovery.settled}
    gone = {record.overlay for record in recovery.doomed} | set(recovery.forget)
    return View(
        tuple(
            dataclasses.replace(placed, record=settled.get(placed.record.overlay, placed.record))
            for placed in view.placed
            if placed.record.overlay not in recovery.unmark
        ),
        tuple(record for record in view.loose if record.overlay not in gone),
        view.directories,
    )


async def _execute(scene: Scene, recovery: Recovery) -> None:
    if recovery.resume:
        await scene.session.command("cont")  # first: the records that say so go with what they are about
    for record in recovery.doomed:
        if record.state not in (PREPARING, REVERTING):
            # What the job's result or the chain tells has to be known before the job, or the other record, is gone.
            await asyncio.to_thread(write_record, record.in_state(MERGED))
    for record in recovery.settled:
        await asyncio.to_thread(write_record, record)
    for job in recovery.jobs:
        await scene.session.command("job-dismiss", id=job)
    for node in (*recovery.nodes, *reversed(recovery.nodes)):
        # One may be the backing image of another, which has to go first; whatever is still used stays.
        with suppress(CommandFailed):
            await scene.session.command("blockdev-del", node_name=node)
    for drive in filter(None, (scene.vm.drive(record.drive) for record in recovery.doomed)):
        if not drive.empty and not drive.active.read_only:
            await flush(scene.session, drive.active.node)  # what a stream copied may be in QEMU's memory only
    for record in recovery.doomed:
        await asyncio.to_thread(remove_overlay, record.overlay)
    for record in recovery.last:
        await asyncio.to_thread(write_record, record)
    for overlay in (*recovery.forget, *recovery.unmark):
        await asyncio.to_thread(remove_record, overlay)
