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

    async def join(self, session: Session, jobs: t.Sequence[str]) -> int:
        """Count jobs in that are about to begin: those that run make room first. What each of the new ones may take.

        Bytes per second; 0 is QEMU's word for no limit. Call ``begun`` when they have begun.
        """
        self._running[session] = tuple(jobs)
        await self._apply(but=session)
        return self._share()

    async def begun(self, session: Session, speed: int) -> None:
        """The session's jobs have begun with ``speed`` each; others may have joined or left since it was told."""
        if self._share() != speed:
            await self._apply()

    async def adopt(self, session: Session, jobs: t.Sequence[str]) -> None:
        """Count the jobs of an earlier run in: from now on the limit of this run holds for them, also "none"."""
        self._running[session] = tuple(jobs)
        await self._apply()
        if self._total is None:
            for job in jobs:
                await _set_speed(session, job, 0)

    async def leave(self, session: Session) -> None:
        """Count the session's jobs out and let the others have their share."""
        if self._running.pop(session, None):
            await self._apply()

    def _share(self) -> int:
        if self._total is None:
            return 0
        return max(1, self._total // max(1, sum(len(ids) for ids in self._running.values())))

    async def _apply(self, but: Session | None = None) -> None:
        if self._total is None:
            return
        for session, jobs in list(self._running.items()):
            for job in jobs if session is not but else ():
                await _set_speed(session, job, self._share())  # asked anew: others join and leave meanwhile


async def _set_speed(session: Session, job: str, speed: int) -> None:
    try:
        await session.command("block-job-set-speed", device=job, speed=speed)
    except (CommandFailed, CommandTimedOut, VmGone):
        # It has just ended, or its VM has: whoever waits for it will find out, and it no longer takes bandwidth.
        return
