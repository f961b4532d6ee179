# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The second half of a backup: wait for the jobs, then publish; or unwind it so that nothing is lost.

Everything needed stands in the partial directory's intent and in QEMU, so the run that finishes a backup need not be
the one that started it. The bitmap of the backup before goes only after publishing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import typing as t
from datetime import datetime, timezone

from .._block.names import run_of
from .._errors import BlockOpsError, JobFailed, JobStalled, JobTimeout, JobVanished, VmGone
from .._qmp.jobs import Job, Watch, cancel, read_jobs, watch
from .._qmp.nodes import detach_target
from .._qmp.session import Session
from .._repository import chain, space
from .._repository.manifest import DriveRecord, Manifest
from .._repository.partial import Partial
from .._repository.store import VmStore
from .backup_options import BackupOptions
from .backup_proof import proved, together
from .backup_start import job_id, target_names
from .leftovers import Scope, sweep
from .quiesce import Frozen
from .vm import read_nodes


@dataclasses.dataclass(frozen=True)
class Run:
    """A started backup: the partial it is made in and the manifest drafted for it."""

    store: VmStore
    partial: Partial
    draft: Manifest

    @property
    def numbers(self) -> range:
        return range(len(self.draft.drives))

    @property
    def jobs(self) -> dict[str, DriveRecord]:
        """The drive of each job, by job id."""
        return {job_id(self.draft.repository, self.draft.id, n): self.draft.drives[n] for n in self.numbers}

    def at_point(self, frozen: Frozen) -> Run:
        """This run once its point in time is known."""
        draft = dataclasses.replace(
            self.draft,
            point=frozen.point or self.draft.point,
            consistency=frozen.consistency,
            freeze_ms=frozen.freeze_ms,
            warnings=(*self.draft.warnings, *frozen.warnings),
        )
        return dataclasses.replace(self, draft=draft)


async def finish(session: Session, run: Run, options: BackupOptions, watcher: Watch | None = None) -> Manifest:
    """Wait for the jobs and publish. When anything fails, unwind and raise what failed.

    Raises JobTimeout without unwinding: the jobs go on, and the next run adopts them.
    """
    deadline = None if options.job_timeout is None else time.monotonic() + options.job_timeout
    try:
        jobs = await _wait(session, run, deadline, watcher)
        _judge(run, jobs, options)
        ends = await _detach(session, run)
        drives = await together(_seal(run, n, jobs, ends, options) for n in run.numbers)
        manifest = await _published(run, drives, options)
    except JobTimeout:
        raise
    except VmGone:
        # Jobs and nodes went with QEMU; the new bitmaps too, or the next run finds and removes them.
        await asyncio.to_thread(run.partial.remove)
        raise
    except BlockOpsError:
        # Only the last flush of publishing can fail behind the rename: then it is a backup, and keeps its bitmap.
        if run.store.catalogue().get(run.draft.id) is None:
            await unwind(session, run)
        raise
    return await _forget(session, run, manifest)


async def _wait(session: Session, run: Run, deadline: float | None, watcher: Watch | None) -> dict[str, Job | None]:
    if watcher is not None:
        return await watcher.until_ended(run.jobs, deadline, fresh=True)
    with watch(session) as own:
        return await own.until_ended(run.jobs, deadline)


def _judge(run: Run, jobs: dict[str, Job | None], options: BackupOptions) -> None:
    """Raise the first failure. Any failed drive fails them all: a backup is one point of the whole VM."""
    for name, job in jobs.items():
        drive = run.jobs[name].name
        if job is None:
            raise JobVanished(drive=drive)
        if job.failed:
            raise JobFailed(drive=drive, said=job.error)
        if job.stalled:
            raise JobStalled(drive=drive, said=job.io_status)
    running = [job for job in jobs.values() if job is not None and not job.succeeded]
    if running:
        done, total = sum(job.done for job in running), sum(job.total for job in running)
        raise JobTimeout(backup=run.draft.id, timeout=options.job_timeout or 0.0, done=done, total=total)


async def _detach(session: Session, run: Run) -> dict[int, int]:
    """Detach all targets, which flushes them to disk; the highest offset written in each (0 when it was gone)."""
    nodes = await read_nodes(session)
    ends = {}
    for number in run.numbers:
        names = target_names(run.draft.repository, run.draft.id, number)
        if names.image in nodes:
            ends[number] = await detach_target(session, names)
        else:
            # A run that was killed while detaching left the file node, or nothing.
            if names.file in nodes:
                await session.command("blockdev-del", node_name=names.file)
            ends[number] = 0
    return ends


async def _seal(
    run: Run, number: int, jobs: dict[str, Job | None], ends: dict[int, int], options: BackupOptions
) -> DriveRecord:
    """Bring one image into its final state and prove it; nothing writes to it from here on."""
    record = run.draft.drives[number]
    path = run.partial.image_path(record.file)
    await asyncio.to_thread(space.trim, path, ends[number])
    own = options.ownership
    size = await asyncio.to_thread(run.partial.seal, record.file, own.uid, own.gid, own.file_mode)
    digest = await proved(path) if options.verify else None
    job = jobs[job_id(run.draft.repository, run.draft.id, number)]
    return dataclasses.replace(record, size=size, sha256=digest, copied=0 if job is None else job.done)


async def _published(run: Run, drives: t.Sequence[DriveRecord], options: BackupOptions) -> Manifest:
    manifest = dataclasses.replace(
        run.draft,
        drives=tuple(drives),
        finished=datetime.now(timezone.utc),
        sequence=chain.next_sequence(run.store.catalogue().manifests),
    )
    own = options.ownership
    # In a thread, as sealing: what waits for the disk must not keep the other VMs waiting.
    await asyncio.to_thread(run.partial.publish, manifest, uid=own.uid, gid=own.gid, mode=own.file_mode)
    return manifest


async def _forget(session: Session, run: Run, manifest: Manifest) -> Manifest:
    """After publishing: the jobs' results and the bitmaps nobody builds on any more.

    The backup is safe by now, so nothing here is its failure; the next run forgets the rest.
    """
    catalogue = run.store.catalogue()
    scope = Scope(run.draft.repository, catalogue.manifests, unreadable=catalogue.unreadable)
    try:
        await sweep(session, scope, files=False)
    except VmGone:
        return manifest
    except BlockOpsError as exc:
        warning = f"Backup {manifest.id} is published, but what it no longer needs in QEMU is not all removed: {exc}"
        return dataclasses.replace(manifest, warnings=(*manifest.warnings, warning))
    return manifest


async def unwind(session: Session, run: Run) -> None:
    """Undo a started backup: jobs, nodes, its bitmaps, its directory. The bitmaps before it still know every change."""
    with contextlib.suppress(VmGone):  # everything inside it goes with it
        await sweep(session, Scope(run.draft.repository, only=run_of(run.draft.id)))
    await asyncio.to_thread(run.partial.remove)


async def end_copy(session: Session, run: Run, options: BackupOptions) -> Manifest:
    """End a ``sync=none`` copy, which runs until it is cancelled, and publish what it saved until now."""
    jobs: dict[str, Job | None] = {name: job for name, job in (await read_jobs(session)).items() if name in run.jobs}
    try:
        await cancel(session, run.jobs)
        ends = await _detach(session, run)
        drives = await together(_seal(run, n, jobs, ends, options) for n in run.numbers)
        manifest = await _published(run, drives, options)
    except VmGone:
        await asyncio.to_thread(run.partial.remove)
        raise
    except BlockOpsError:
        await unwind(session, run)
        raise
    return await _forget(session, run, manifest)
