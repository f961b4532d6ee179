# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""One merge of a chain: records, job, bitmaps, then records and files again, so that a kill anywhere loses nothing.

A job is held before its end (``auto-finalize: false``; an active commit is ready and waits anyway): that is when the
image that stays can be written and nobody has switched over yet, so the bitmaps go on without a gap.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
import typing as t
from contextlib import suppress

from .._errors import BlockOpsError, CommandFailed, ImageInvalid
from .._image.header import read_header
from .._image.snapshot_record import MERGED, MERGING, STREAMING, remove_record, write_record
from .._qmp.jobs import Job, Watch, cancel, watch
from .._qmp.nodes import flush
from .._qmp.session import Command
from . import snapshot_boot
from .chain_bitmaps import carrying
from .chain_merges import Merge, actives, record_of
from .chain_options import ChainJobFailed, ChainJobStalled, ChainJobUnfinished, ChainOptions
from .overlay import backing_name, remove_overlay
from .snapshot_boot import Rewriting
from .snapshot_options import Scene
from .snapshot_recovery_plan import inheritance, settled_down
from .vm import read_drives, read_nodes, read_vm


@dataclasses.dataclass
class Done:
    """What has happened so far, also when something fails after it."""

    merges: list[Merge] = dataclasses.field(default_factory=list)
    deleted: list[str] = dataclasses.field(default_factory=list)
    kept: list[str] = dataclasses.field(default_factory=list)
    definition: list[dict[str, t.Any]] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def sentence(self) -> str:
        if not self.merges:
            return ""
        names = ", ".join(dict.fromkeys(merge.drive.name for merge in self.merges))
        return f" Done before it: {len(self.merges)} (drives {names})."


def command(merge: Merge, options: ChainOptions, root: str) -> Command:
    """The job. Its end is ours to give, see above. ``root``: the node that the drive is attached to by then."""
    arguments: dict[str, t.Any] = {"job-id": merge.job, "on-error": options.on_error}
    if options.bandwidth is not None:
        arguments["speed"] = options.bandwidth
    if merge.how == "commit":
        arguments.update({"device": root, "top-node": merge.dropped[0].node})
        arguments.update({"base-node": merge.target.node, "auto-dismiss": False})
        if merge.above is not None:
            arguments.update({"auto-finalize": False, "backing-file": _spelled(merge.above.file, merge.target.file)})
        return Command("block-commit", arguments)
    # Not kept for us to look at: until it is dismissed the stream's filter is left in the graph without a child,
    # and query-named-block-nodes, by whomever, then ends QEMU (7.2: bdrv_refresh_filename).
    arguments.update({"device": merge.target.node, "auto-finalize": False, "auto-dismiss": True})
    if merge.below is not None:
        arguments["base-node"] = merge.below.node
        arguments["backing-file"] = _spelled(merge.target.file, merge.below.file)
    return Command("block-stream", arguments)


def _spelled(overlay: str, below: str) -> str:
    """How the header of an image names the next one: relative when it named the last one so, absolute otherwise."""
    try:
        old = read_header(os.path.realpath(overlay)).backing_file
    except ImageInvalid:
        old = None
    if old is None or not below.startswith("/"):
        return backing_name(overlay, below)
    relative = not old.startswith("/") and ":" not in old.split("/", 1)[0]
    return os.path.relpath(below, os.path.dirname(overlay)) if relative else below


async def run_merge(scene: Scene, options: ChainOptions, merge: Merge, done: Done) -> Scene:
    """Start or adopt the job, follow it to its end, and settle what it leaves. Answers the VM as it is then.

    :raise ChainJobFailed, ChainJobStalled, ChainJobUnfinished: and the chain is what it was.
    """
    boot = await snapshot_boot.look(scene)
    rewriting = boot.plan(boot.moves(actives([merge])))
    await _run(scene, options, merge, rewriting, done)
    done.merges.append(merge)
    known = {entry["path"] for entry in done.definition}
    done.definition += [entry for entry in rewriting.result(False) if entry["path"] not in known]
    return dataclasses.replace(scene, vm=await read_vm(scene.session, scene.entry.name))


async def _run(scene: Scene, options: ChainOptions, merge: Merge, rewriting: Rewriting, done: Done) -> None:
    started = merge.job not in scene.vm.jobs
    if started:
        # Before the first byte: from then on a commit has changed the image below, which must not be gone back to.
        await asyncio.to_thread(_announce, merge)
    with watch(scene.session) as watcher:
        await (_start(scene, options, merge, done) if started else _adopt(scene, options, merge))
        deadline = None if options.job_timeout is None else time.monotonic() + options.job_timeout
        stage = "ready" if merge.active_commit else "pending"
        job = await watcher.until_stage(merge.job, deadline, stage)
        if job is None or job.status != "concluded" or job.error is not None:
            await _judge(scene, options, merge, job, done, stage, said=watcher.said(merge.job))
            await _carry(scene, merge, done)
            if not merge.active_commit:
                await _flush(scene, merge)
            await scene.session.command("job-complete" if merge.active_commit else "job-finalize", id=merge.job)
        await _ended(scene, options, merge, watcher, done, deadline)
    if merge.active_commit:
        await _flush(scene, merge)
    rewriting.write()
    await _book(scene, merge, done)


def _announce(merge: Merge) -> None:
    for layer, below in zip(
        merge.dropped, (*merge.dropped[1:], merge.target if merge.how == "commit" else merge.below)
    ):
        record = record_of(layer)
        if record is None:
            continue
        stays = layer.file not in merge.doomed
        if merge.how == "commit":
            target = {"image": merge.target.file, "image_format": merge.target.driver}
            write_record(record.in_state(MERGING, job=merge.job, stays=stays, **target))
        elif below is not None:
            write_record(dataclasses.replace(record, image=below.file, image_format=below.driver, stays=stays))
    record = record_of(merge.target)
    if merge.how == "stream" and record is not None and record.state != MERGING:
        below = merge.dropped[0]
        write_record(record.in_state(STREAMING, image=below.file, image_format=below.driver))


async def _start(scene: Scene, options: ChainOptions, merge: Merge, done: Done) -> None:
    drive = scene.vm.drive(merge.drive.name) or merge.drive
    try:
        await scene.session.execute(command(merge, options, drive.root))
    except CommandFailed as exc:
        raise _failed(scene, merge, exc.data["said"], done) from exc


async def _adopt(scene: Scene, options: ChainOptions, merge: Merge) -> None:
    """A job that a killed run has left goes on; one that is paused, by an I/O error or by somebody, is resumed."""
    if options.bandwidth is not None:
        await scene.session.command("block-job-set-speed", device=merge.job, speed=options.bandwidth)
    if scene.vm.jobs[merge.job].status == "paused":
        with suppress(CommandFailed):  # paused for an instant, by itself
            await scene.session.command("job-resume", id=merge.job)


async def _judge(
    scene: Scene,
    options: ChainOptions,
    merge: Merge,
    job: Job | None,
    done: Done,
    *good: str,
    said: str | None = None,
) -> None:
    """Nothing, when the job is where it should be. One that failed is dismissed, one that stalled as was asked."""
    if job is not None and job.error is None and not job.stalled and job.status in good:
        return
    about = {"images": merge.images, "drive": merge.drive.name, "vm": scene.vm.name, "how": merge.how}
    about["done"] = done.sentence()
    if job is not None and job.error is None and not job.stalled and job.status not in ("concluded", "null"):
        raise ChainJobUnfinished(timeout=options.job_timeout or 0.0, job=merge.job, **about)
    if job is not None and job.stalled and options.on_error in ("stop", "enospc"):
        raise ChainJobStalled(reason=job.io_status, on_error=options.on_error, job=merge.job, **about)
    said = job.error if job is not None else said or "QEMU no longer knows the job: it was cancelled"
    if job is not None and job.stalled:
        said = f"paused by an I/O error ({job.io_status})"
    await cancel(scene.session, [merge.job])
    raise _failed(scene, merge, said or "it ended, and the chain is what it was: it was cancelled", done)


def _failed(scene: Scene, merge: Merge, said: str, done: Done) -> BlockOpsError:
    state = {
        "commit": "Snapshots among these images may have been written to: they can be dropped, but not gone back to.",
        "stream": "All snapshots are whole.",
    }
    return ChainJobFailed(
        images=merge.images,
        drive=merge.drive.name,
        vm=scene.vm.name,
        how=merge.how,
        reason=said,
        done=done.sentence(),
        state=state[merge.how],
    )


async def _carry(scene: Scene, merge: Merge, done: Done) -> None:
    """The tracking bitmaps go on. Should that fail, the next backup notices, and is a full one."""
    drives, _nodes = await read_drives(scene.session)
    layers = {layer.node: layer for drive in drives for layer in drive.layers}
    if merge.target.node not in layers:
        return
    dropped = [layers[layer.node] for layer in merge.dropped if layer.node in layers]
    transaction = carrying(layers[merge.target.node], dropped, active=merge.becomes_active)
    if transaction is None:
        return
    try:
        await scene.session.execute(transaction)
    except CommandFailed as exc:
        done.warnings.append(f"The next backup of drive {merge.drive.name} will be a full one: {exc}")


async def _flush(scene: Scene, merge: Merge) -> None:
    """Of an active image, before those it came from are forgotten: a stream leaves what it copied in QEMU's caches.

    Images that become read-only are flushed by QEMU itself; a commit that is ready was, but not what came after that.
    """
    if merge.becomes_active:
        await flush(scene.session, merge.target.node)


async def _ended(
    scene: Scene, options: ChainOptions, merge: Merge, watcher: Watch, done: Done, deadline: float | None
) -> None:
    """Its end, and the proof that it did what it was to do: the chain itself."""
    job = (await watcher.until_ended([merge.job], deadline))[merge.job]
    if job is not None and (job.error is not None or job.status not in ("concluded", "null")):
        await _judge(scene, options, merge, job, done)
    drives, _nodes = await read_drives(scene.session)
    nodes = {layer.node for drive in drives if drive.name == merge.drive.name for layer in drive.layers}
    if merge.target.node in nodes and not nodes & {layer.node for layer in merge.dropped}:
        return
    said = watcher.said(merge.job) or "it ended, and the chain is what it was: it was cancelled"
    await cancel(scene.session, [merge.job])
    raise _failed(scene, merge, said, done)


async def _book(scene: Scene, merge: Merge, done: Done) -> None:
    """The images are merged; now the records and files follow, in an order that a kill can interrupt anywhere."""
    last = await asyncio.to_thread(_book_commit if merge.how == "commit" else _book_stream, merge)
    if merge.how == "commit":
        # It holds on to its nodes. That the images are merged, which its result tells, is in the records by now.
        await scene.session.command("job-dismiss", id=merge.job)
    nodes = await read_nodes(scene.session)
    for layer in merge.dropped:
        if layer.node in nodes:
            # Ours, or given by -blockdev, it stays attached though nothing uses it. One QEMU opened itself is gone.
            with suppress(CommandFailed):
                await scene.session.command("blockdev-del", node_name=layer.node)
    for file in merge.deleted:
        await asyncio.to_thread(remove_overlay, file)
        done.deleted.append(file)
    done.kept += merge.kept
    if last is not None:
        await asyncio.to_thread(last)


def _book_commit(merge: Merge) -> None:
    for layer in merge.dropped:
        record = record_of(layer)
        if record is not None:
            write_record(record.in_state(MERGED, job=None, stays=layer.file not in merge.doomed))
    record = record_of(merge.above) if merge.above is not None else None
    if record is not None:
        write_record(dataclasses.replace(record, image=merge.target.file, image_format=merge.target.driver))


def _book_stream(merge: Merge) -> t.Callable[[], None] | None:
    """The target takes the place of the lowest image, and with it its record: that of an older snapshot, or none.

    Answers what is to be written when the files have gone.
    """
    record, lowest = record_of(merge.target), record_of(merge.dropped[-1])
    gone = [found for found in map(record_of, merge.dropped) if found is not None]
    if record is None or lowest is None:
        if record is not None:
            remove_record(merge.target.file)
        for each in gone:
            write_record(each.in_state(MERGED))
        return None
    own, *others = inheritance(record, gone)
    for each in (own, *others):
        write_record(each)
    return lambda: write_record(settled_down(own))
