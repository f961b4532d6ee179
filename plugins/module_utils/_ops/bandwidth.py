# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""A bandwidth budget of the whole host, shared evenly by the jobs that run at the moment."""

from __future__ import annotations

import typing as t

from .._errors import CommandFailed, CommandTimedOut, VmGone
from .._qmp.session import Session


class Bandwidth:
    """``total`` bytes per second for all jobs of this call together; ``None`` for no limit."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._running: dict[Session, tuple[str, ...]] = {}

    def share(self, joining: int = 0) -> int:
        """Bytes per second of one job when ``joining`` more begin; 0 is QEMU's word for no limit."""
        if self._total is None:
            return 0
        jobs = joining + sum(len(ids) for ids in self._running.values())
        return max(1, self._total // max(1, jobs))

    async def join(self, session: Session, jobs: t.Sequence[str]) -> None:
        """Count these jobs in and give every running job its new share."""
        self._running[session] = tuple(jobs)
        await self._apply()

    async def adopt(self, session: Session, jobs: t.Sequence[str]) -> None:
        """Count the jobs of an earlier run in: from now on the limit of this run holds for them, also "none"."""
        await self.join(session, jobs)
        if self._total is None:
            for job in jobs:
                await _set_speed(session, job, 0)

    async def leave(self, session: Session) -> None:
        """Count the session's jobs out and let the others have their share."""
        if self._running.pop(session, None):
            await self._apply()

    async def _apply(self) -> None:
        if self._total is None:
            return
        speed = self.share()
        for session, jobs in list(self._running.items()):
            for job in jobs:
                await _set_speed(session, job, speed)


async def _set_speed(session: Session, job: str, speed: int) -> None:
    try:
        await session.command("block-job-set-speed", device=job, speed=speed)
    except (CommandFailed, CommandTimedOut, VmGone):
        # It has just ended, or its VM has: whoever waits for it will find out, and it no longer takes bandwidth.
        return
