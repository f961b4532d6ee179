# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""QEMU's jobs that save, load and delete a VM's memory: running one to its end, and finding those of a killed run.

They are jobs in name only: QEMU does the work in its main loop, where it also answers its monitors. While memory is
written, nobody gets an answer, not even to the command that began it; and a client that dies stops nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import typing as t
from contextlib import suppress
from dataclasses import dataclass

from .._block.names import snapshot_object
from .._errors import BlockOpsError, CommandTimedOut
from .._qmp.jobs import Job, Watch, watch
from .._qmp.session import Command
from .snapshot_options import Scene
from .vm import read_vm

_ROLES = {"snapshot-save": "save", "snapshot-load": "load", "snapshot-delete": "delete"}
_ENDED = ("concluded", "null")
_LEAST_LOOK = 1.0  # seconds that QEMU has to answer whether a job has ended, however little time is left


class SnapshotGoesOn(BlockOpsError):
    template = "QEMU has not ended {command} of snapshot {snapshot} of VM {vm} after {timeout:g} s."
    advice = (
        "It goes on inside QEMU, where nothing can stop it; until then the guest stands still and no monitor answers. "
        "Run again when it has ended, to use what it made."
    )


@dataclass(frozen=True)
class Ended:
    """How such a job ended. ``error`` is QEMU's, or ``None``. Times are seconds since 1970, as QEMU tells them.

    ``stopped`` and ``resumed``: when the guest stood still and ran again; ``None`` when it was not running.
    """

    error: str | None
    began: float
    seconds: float
    stopped: float | None
    resumed: float | None

    @property
    def instant(self) -> float:
        """The moment whose memory was saved."""
        return self.began if self.stopped is None else self.stopped

    @property
    def standstill_ms(self) -> float:
        """How long the guest stood still (if it did not run: how long QEMU did nothing else)."""
        if self.stopped is None or self.resumed is None:
            return round(self.seconds * 1000, 1)
        return round((self.resumed - self.stopped) * 1000, 1)


def job_command(scene: Scene, name: str, devices: t.Sequence[str], vmstate: str | None = None) -> Command:
    """The order of one such job. ``devices`` are node names, and so is ``vmstate``, the one that holds the memory."""
    arguments: dict[str, t.Any] = {"job-id": _job_id(scene, _ROLES[name]), "tag": scene.options.name}
    if vmstate is not None:
        arguments["vmstate"] = vmstate
    return Command(name, {**arguments, "devices": list(devices)})


def _job_id(scene: Scene, role: str) -> str:
    return snapshot_object(scene.options.name, "vm", role)


def leftover_jobs(scene: Scene) -> list[Job]:
    """Jobs of this snapshot that a killed run began."""
    ids = [_job_id(scene, role) for role in _ROLES.values()]
    return [scene.vm.jobs[job_id] for job_id in ids if job_id in scene.vm.jobs]


async def run_job(scene: Scene, command: Command) -> Ended:
    """Begin the job, wait for its end and dismiss it.

    :raise SnapshotGoesOn: it has not ended in time.
    """
    session, limit = scene.session, scene.options.job_timeout
    began, started = time.time(), time.monotonic()
    job_id = command.arguments["job-id"]
    with session.events("STOP", "RESUME") as standing, watch(session) as watcher:
        with suppress(CommandTimedOut):  # the answer comes when the work is done
            await session.execute(command, timeout=limit)
        job = await _ended(scene, watcher, job_id, command.name, None if limit is None else started + limit)
        events = standing.clear()
    error = job.error if job is not None else "its job vanished, and its result with it; another tool dismissed it"
    ended = Ended(error, began, time.monotonic() - started, _moment(events, "STOP"), _moment(events, "RESUME"))
    if job is not None:
        await session.command("job-dismiss", id=job_id)
    return ended


async def tidied(scene: Scene) -> tuple[Scene, list[str]]:
    """Wait for jobs that a killed run began, and dismiss them: the VM as it is then, and what was found."""
    found = leftover_jobs(scene)
    if not found:
        return scene, []
    limit = scene.options.job_timeout
    deadline = None if limit is None else time.monotonic() + limit
    notes = []
    with watch(scene.session) as watcher:
        for left in found:
            job = await _ended(scene, watcher, left.id, left.type, deadline)
            said = f" failed: {job.error}" if job is not None and job.error is not None else ""
            notes.append(f"{left.type} of a run that was killed{said}")
            if job is not None and not scene.check_mode:
                await scene.session.command("job-dismiss", id=left.id)
    return dataclasses.replace(scene, vm=await read_vm(scene.session, scene.vm.name)), notes


async def _ended(scene: Scene, watcher: Watch, job_id: str, command: str, deadline: float | None) -> Job | None:
    """The job at its end. A question that QEMU does not answer is asked again, until the deadline."""
    while True:
        left = None if deadline is None else max(_LEAST_LOOK, deadline - time.monotonic())
        try:
            jobs = await asyncio.wait_for(watcher.until_ended([job_id], deadline), left)
        except (CommandTimedOut, asyncio.TimeoutError):
            pass
        else:
            job = jobs[job_id]
            if job is None or job.status in _ENDED:
                return job
        if deadline is not None and time.monotonic() > deadline:
            limit = scene.options.job_timeout
            about = {"command": command, "vm": scene.vm.name, "snapshot": scene.options.name}
            raise SnapshotGoesOn(timeout=limit, **about)


def _moment(events: t.Iterable[t.Mapping[str, t.Any]], name: str) -> float | None:
    stamps = [event["timestamp"] for event in events if event["event"] == name]
    return stamps[0]["seconds"] + stamps[0]["microseconds"] / 1e6 if stamps else None
