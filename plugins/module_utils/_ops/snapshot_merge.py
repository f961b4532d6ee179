# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Dropping an external snapshot: merge its overlay with the image below, one drive after the other."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import typing as t
from contextlib import suppress

from .._errors import BlockOpsError, CommandFailed
from .._image.snapshot_record import MERGED, MERGING, PRESENT, STREAMING, remove_record, write_record
from .._qmp.jobs import Job, Watch, cancel, watch
from .._qmp.nodes import flush
from . import snapshot_boot
from ._outcome import Outcome
from .overlay import remove_overlay
from .snapshot_boot import Rewriting
from .snapshot_merge_plan import Merge, plan_merge, renumbering
from .snapshot_merge_report import Done, actives, merged_drive, nothing, orphans, predicted, report
from .snapshot_options import Scene
from .snapshot_recovery import recover
from .snapshot_report import chains, vm_result
from .snapshot_view import refuse_while_jobs_run
from .vm import read_drives, read_nodes, read_vm


class MergeFailed(BlockOpsError):
    template = "Dropping snapshot {snapshot} of drive {drive} of VM {vm} by {merge} failed: {reason}.{done}"
    advice = (
        "The drive's chain is what it was and the guest runs on. {state} Mend the cause and run the same task again."
    )


class MergeUnfinished(BlockOpsError):
    template = "Dropping snapshot {snapshot} of drive {drive} of VM {vm} is not finished after {timeout:g} s.{done}"
    advice = "The job {job} goes on inside QEMU. Run the same task again to follow it and finish."


async def absent(scene: Scene) -> Outcome:
    """Merge the snapshot's overlays, wherever they are among the chosen drives."""
    began = scene.vm
    scene, view, recovered = await recover(scene)
    targets = view.of(scene.options.name, scene.entry.drives or scene.options.drives)
    excluded = scene.entry.exclude_drives or scene.options.exclude_drives
    targets = [placed for placed in targets if placed.drive.name not in excluded]
    boot = await snapshot_boot.look(scene)
    if not targets:
        return nothing(scene, view, boot, recovered)
    merges = [plan_merge(scene, view, placed) for placed in targets]
    refuse_while_jobs_run(scene, "dropping a snapshot", {merge.job for merge in merges})
    rewriting = boot.plan(boot.moves(actives(merges)))
    before = chains(began.drive(merge.placed.drive.name) or merge.placed.drive for merge in merges)
    if scene.check_mode:
        return predicted(scene, merges, boot, rewriting, before, recovered)
    done = Done(warnings=list(orphans(scene, view)))
    try:
        for name in [merge.placed.drive.name for merge in merges]:
            scene = await _merge_drive(scene, name, done)
    except BlockOpsError as exc:
        result = vm_result(scene, "external", "present", done.drives, recovered=recovered)
        result.update(deleted=done.deleted, kept=done.kept, definition=done.definition)
        return Outcome(bool(done.drives or recovered), result, warnings=tuple(done.warnings), error=exc)
    return report(scene, before, done, recovered, await snapshot_boot.look(scene), rewriting)


async def _merge_drive(scene: Scene, name: str, done: Done) -> Scene:
    """One drive, planned anew because the one before took its time."""
    view = (await recover(scene))[1]
    for placed in view.of(scene.options.name, [name]):
        merge = plan_merge(scene, view, placed)
        boot = await snapshot_boot.look(scene)
        rewriting = boot.plan(boot.moves(actives([merge])))
        await _merge(scene, merge, rewriting, done)
        named = {entry["path"] for entry in done.definition}
        done.definition += [entry for entry in rewriting.result(False) if entry["path"] not in named]
        done.drives.append(merged_drive(merge))
        scene = dataclasses.replace(scene, vm=await read_vm(scene.session, scene.entry.name))
    return scene


async def _merge(scene: Scene, merge: Merge, rewriting: Rewriting, done: Done) -> None:
    record = merge.placed.record
    if merge.job not in scene.vm.jobs:
        # Before the first byte: from then on a commit has changed the snapshot itself, which must not be gone back to.
        state = MERGING if merge.how == "commit" else STREAMING
        await asyncio.to_thread(write_record, record.in_state(state))
    with watch(scene.session) as watcher:
        job = await _run(scene, merge, watcher, done)
        if merge.active_commit and job.status == "ready":
            await scene.session.command("job-complete", id=merge.job)
            job = await _ended(scene, merge, watcher, done)
    await _book(scene, merge, rewriting, job, done)
    await _renumber(scene, merge, done)


async def _run(scene: Scene, merge: Merge, watcher: Watch, done: Done) -> Job:
    """Start the job, or adopt the one a killed run has started, and wait for its end or for being ready."""
    if merge.job not in scene.vm.jobs:
        try:
            await scene.session.execute(merge.command)
        except CommandFailed as exc:
            raise _failed(scene, merge, exc.data["said"], done) from exc
    elif scene.options.bandwidth is not None:
        await scene.session.command("block-job-set-speed", device=merge.job, speed=scene.options.bandwidth)
    if merge.active_commit:
        job = await watcher.until_ready(merge.job, _deadline(scene))
        return await _judged(scene, merge, job, done, ("ready", "concluded"))
    return await _ended(scene, merge, watcher, done)


async def _ended(scene: Scene, merge: Merge, watcher: Watch, done: Done) -> Job:
    job = (await watcher.until_ended([merge.job], _deadline(scene)))[merge.job]
    if job is None and merge.how == "stream":
        # A stream's job goes by itself; whether it came to its end is seen by the chain.
        said = watcher.said(merge.job)
        status = "null" if await _streamed(scene, merge) else "concluded"
        job = Job(merge.job, "stream", status, 0, 0, error=None if status == "null" else said or "it was cancelled")
    return await _judged(scene, merge, job, done, ("concluded", "null"))


async def _streamed(scene: Scene, merge: Merge) -> bool:
    """Whether the image below is no longer in the drive's chain."""
    drives, _nodes = await read_drives(scene.session)
    drive = next((drive for drive in drives if drive.name == merge.placed.drive.name), None)
    nodes = {layer.node for layer in drive.layers} if drive is not None else set()
    return merge.placed.overlay.node in nodes and merge.placed.image.node not in nodes


async def _judged(scene: Scene, merge: Merge, job: Job | None, done: Done, good: t.Container[str]) -> Job:
    """The job, when it is where it should be. One that failed is dismissed, one that stalled cancelled."""
    if job is not None and job.error is None and not job.stalled and job.status in good:
        return job
    if job is not None and job.error is None and not job.stalled:
        raise MergeUnfinished(
            snapshot=merge.placed.record.name,
            drive=merge.placed.drive.name,
            vm=scene.vm.name,
            timeout=scene.options.job_timeout or 0.0,
            done=done.sentence(),
            job=merge.job,
        )
    said = "QEMU no longer knows the job" if job is None else job.error or f"paused by an I/O error ({job.io_status})"
    await cancel(scene.session, [merge.job])
    raise _failed(scene, merge, said, done)


def _failed(scene: Scene, merge: Merge, said: str, done: Done) -> MergeFailed:
    state = {
        "commit": "The snapshot itself may have been written to: it can be dropped, but no longer gone back to.",
        "stream": "The snapshot is whole.",
    }
    return MergeFailed(
        snapshot=merge.placed.record.name,
        drive=merge.placed.drive.name,
        vm=scene.vm.name,
        merge=merge.how,
        reason=said,
        done=done.sentence(),
        state=state[merge.how],
    )


def _deadline(scene: Scene) -> float | None:
    return None if scene.options.job_timeout is None else time.monotonic() + scene.options.job_timeout


async def _book(scene: Scene, merge: Merge, rewriting: Rewriting, job: Job, done: Done) -> None:
    """The images are merged; now the records and files follow, in an order that a kill can interrupt anywhere."""
    placed = merge.placed
    if merge.how == "stream":
        # QEMU takes the image below out of the header first, and writes the tables of what it copied when it likes.
        await flush(scene.session, placed.overlay.node)
    doomed = placed.record if merge.how == "commit" else merge.inherits
    if doomed is not None:
        await asyncio.to_thread(write_record, doomed.in_state(MERGED))
    rewriting.write()
    if merge.how == "stream":
        await _inherit(merge)
    if job.status == "concluded":
        # It holds on to its nodes. That the images are merged, which its result tells, is in the records by now.
        await scene.session.command("job-dismiss", id=job.id)
    gone = placed.overlay if merge.how == "commit" else placed.image
    if gone.node in await read_nodes(scene.session):
        # Ours, or given by -blockdev, it stays attached though nothing uses it. One that QEMU opened itself is gone.
        with suppress(CommandFailed):
            await scene.session.command("blockdev-del", node_name=gone.node)
    if doomed is not None:
        await asyncio.to_thread(remove_overlay, doomed.overlay)
        done.deleted.append(doomed.overlay)
    if merge.left is not None:
        done.kept.append(merge.left)


async def _inherit(merge: Merge) -> None:
    """The overlay now is what the image below was: the overlay of an older snapshot, or nobody's but the VM's."""
    overlay = merge.placed.record.overlay
    if merge.inherits is None:
        await asyncio.to_thread(remove_record, overlay)
    else:
        record = dataclasses.replace(merge.inherits, overlay=overlay, state=PRESENT)
        await asyncio.to_thread(write_record, record)


async def _renumber(scene: Scene, merge: Merge, done: Done) -> None:
    command = renumbering(merge)
    if command is None:
        return
    try:
        await scene.session.execute(command)
    except CommandFailed as exc:
        name = merge.placed.drive.name
        done.warnings.append(f"The next backup of drive {name} will be a full one: {exc}")
