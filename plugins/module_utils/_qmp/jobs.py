# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The only waiter: follows block jobs to their end, by events and, against a lost event, by looking now and then.

Jobs are started with ``auto-dismiss: false``, so that a result outlives the client that started them; whoever has
made use of the result dismisses them. Streams are not (see _ops/chain_job): they go by themselves, and what
is known of them then is the error that their event told, if it was heard.
"""

from __future__ import annotations

import asyncio
import time
import typing as t
from dataclasses import dataclass

from .._errors import CommandFailed
from .session import Session

_LOOK_EVERY = 2.0
_ENDED = ("concluded", "null")


@dataclass(frozen=True)
class Job:
    """A job as query-jobs tells it. ``done`` and ``total`` are bytes and estimates (QAPI: JobInfo)."""

    id: str
    type: str
    status: str
    done: int
    total: int
    error: str | None = None
    io_status: str = "ok"

    @property
    def failed(self) -> bool:
        return self.status == "concluded" and self.error is not None

    @property
    def succeeded(self) -> bool:
        return self.status == "concluded" and self.error is None

    @property
    def stalled(self) -> bool:
        """Paused by QEMU because of an I/O error, not by a user: nothing will make it go on by itself."""
        return self.status == "paused" and self.io_status != "ok"

    def to_result(self) -> dict[str, t.Any]:
        return {
            "id": self.id,
            "type": self.type,
            "status": self.status,
            "done": self.done,
            "total": self.total,
            "error": self.error,
            "io_status": self.io_status,
        }


async def read_jobs(session: Session) -> dict[str, Job]:
    """All jobs of this QEMU by id."""
    raw = await session.command("query-jobs")
    states: dict[str, str] = {}
    if any(job["status"] == "paused" for job in raw):
        block_jobs = await session.command("query-block-jobs")
        states = {job["device"]: job["io-status"] for job in block_jobs}
    return {
        job["id"]: Job(
            id=job["id"],
            type=job["type"],
            status=job["status"],
            done=job.get("current-progress", 0),
            total=job.get("total-progress", 0),
            error=job.get("error"),
            io_status=states.get(job["id"], "ok"),
        )
        for job in raw
    }


class Watch:
    """Follows a set of jobs. Make it (``with watch(session)``) before the jobs start, or their events are missed."""

    def __init__(self, session: Session, listener: t.Any) -> None:
        self._session = session
        self._listener = listener
        self._said: dict[str, str] = {}

    def said(self, job_id: str) -> str | None:
        """The error a job ended with, also when QEMU no longer knows the job (one that is dismissed by itself)."""
        for event in self._listener.clear():
            self._note(event)
        return self._said.get(job_id)

    def _note(self, event: t.Any) -> None:
        if event["event"] == "BLOCK_JOB_COMPLETED" and "error" in event["data"]:
            self._said[event["data"]["device"]] = event["data"]["error"]

    async def until_ended(
        self, ids: t.Collection[str], deadline: float | None, *, fresh: bool = False
    ) -> dict[str, Job | None]:
        """Wait until every job has ended, or one has failed or stalled, or the deadline (time.monotonic) has passed.

        Answers the state of each job then; ``None`` for a job that QEMU no longer knows. ``fresh``: the jobs were
        started under this watch, so their events tell when there is something to look at.
        """
        if fresh:
            await self._next_event(set(ids), _left(deadline))
        while True:
            known = await read_jobs(self._session)
            jobs = {job_id: known.get(job_id) for job_id in ids}
            if _settled(jobs.values()):
                return jobs
            left = _left(deadline)
            if left <= 0:
                return jobs
            await self._next_event(set(ids), left)

    async def until_stage(self, job_id: str, deadline: float | None, *stages: str) -> Job | None:
        """Wait until a job that ends only when it is told to is at such a stage, or has ended.

        ``ready``: an active commit, a mirror; ``pending``: its work is done, and it waits for job-finalize. Answers its
        state then, or at the deadline; ``None`` when QEMU no longer knows it.
        """
        while True:
            job = (await read_jobs(self._session)).get(job_id)
            if job is None or job.stalled or job.status in (*stages, *_ENDED):
                return job
            left = _left(deadline)
            if left <= 0:
                return job
            await self._next_event({job_id}, left)

    async def _next_event(self, ids: set[str], seconds: float) -> None:
        """Return when something happened to one of the jobs, or after ``seconds``."""
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            if left <= 0:
                return
            try:
                event = await asyncio.wait_for(self._listener.get(), left)
            except asyncio.TimeoutError:
                return
            self._note(event)
            data = event["data"]
            about = data.get("id", data.get("device"))
            # Other states pass by themselves. A job that stalls says so with BLOCK_JOB_ERROR, which has no status;
            # one that is merely paused is so for an instant while its graph changes, or because somebody wants it.
            if about in ids and data.get("status", "concluded") in ("ready", "pending", *_ENDED):
                return


def _left(deadline: float | None) -> float:
    """Seconds until the next look."""
    return _LOOK_EVERY if deadline is None else min(_LOOK_EVERY, deadline - time.monotonic())


def _settled(jobs: t.Iterable[Job | None]) -> bool:
    states = list(jobs)
    if any(job is None or job.failed or job.stalled for job in states):
        return True
    return all(job is not None and job.status in _ENDED for job in states)


class watch:
    """Context manager that gives a Watch whose listener is in place."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._context = session.events("JOB_STATUS_CHANGE", "BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED")

    def __enter__(self) -> Watch:
        return Watch(self._session, self._context.__enter__())

    def __exit__(self, *exc: t.Any) -> None:
        self._context.__exit__(*exc)


async def run_to_end(session: Session, start: str, job_id: str, **arguments: t.Any) -> None:
    """Start a short job (blockdev-create), wait for its end and dismiss it. Raises CommandFailed when it failed."""
    with session.events("JOB_STATUS_CHANGE") as listener:
        await session.command(start, job_id=job_id, **arguments)
        deadline = time.monotonic() + session.timeout
        job = (await Watch(session, listener).until_ended([job_id], deadline, fresh=True))[job_id]
    if job is None or not job.succeeded:
        said = "it did not end in time" if job is None or job.error is None else job.error
        raise CommandFailed(command=start, about=f" for {job_id}", said=said)
    await session.command("job-dismiss", id=job_id)


async def cancel(session: Session, ids: t.Collection[str]) -> None:
    """Cancel the jobs that still run, wait for their end, and dismiss all of them. Unknown ids are done already."""
    if not ids:
        return
    asked: set[str] = set()
    deadline = time.monotonic() + session.timeout
    with watch(session) as watcher:
        while True:
            jobs = [job for job in (await read_jobs(session)).values() if job.id in ids]
            running = {job.id: job for job in jobs if job.status not in _ENDED}
            if not running or time.monotonic() > deadline:
                break
            for name in sorted(running.keys() - asked):
                asked.add(name)
                await _cancel_one(session, running[name])
            await watcher._next_event(set(running), 0.5)
    for job in jobs:
        if job.status == "concluded":
            await session.command("job-dismiss", id=job.id)


async def _cancel_one(session: Session, job: Job) -> None:
    try:
        # job-cancel is always forced, so it also ends a job that is paused by an error.
        await session.command("job-cancel", id=job.id)
    except CommandFailed:
        # It may have ended in between; if it still runs, QEMU's refusal matters.
        now = (await read_jobs(session)).get(job.id)
        if now is not None and now.status not in _ENDED:
            raise
