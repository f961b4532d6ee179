# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One budget for the whole host, whoever joins and leaves."""

from __future__ import annotations

import asyncio
import typing as t

from ansible_collections.blockops.qemu.plugins.module_utils._errors import VmGone
from ansible_collections.blockops.qemu.plugins.module_utils._ops.bandwidth import Bandwidth


class Speeds:
    """Stands for a Session: remembers the last speed of each job."""

    def __init__(self, gone: bool = False) -> None:
        self.now: dict[str, int] = {}
        self._gone = gone

    async def command(self, command: str, *, device: str, speed: int) -> None:
        assert command == "block-job-set-speed"
        if self._gone:
            raise VmGone(socket="/s", doing="x")
        self.now[device] = speed


async def start(bandwidth: Bandwidth, session: t.Any, jobs: list[str]) -> int:
    speed = await bandwidth.join(session, jobs)
    await bandwidth.begun(session, speed)
    return speed


def test_the_budget_is_shared_evenly() -> None:
    async def scenario() -> None:
        budget = Bandwidth(1200)
        first, second = Speeds(), Speeds()
        assert await start(budget, first, ["a", "b"]) == 600
        assert await start(budget, second, ["c"]) == 400
        assert first.now == {"a": 400, "b": 400}
        await budget.leave(t.cast(t.Any, second))
        assert first.now == {"a": 600, "b": 600}
        await budget.leave(t.cast(t.Any, second))

    asyncio.run(scenario())


def test_no_limit_is_zero_and_frees_an_adopted_job() -> None:
    async def scenario() -> None:
        budget, session = Bandwidth(None), Speeds()
        assert await start(budget, session, ["a"]) == 0
        assert session.now == {}
        await budget.adopt(t.cast(t.Any, session), ["slow"])
        assert session.now == {"slow": 0}

    asyncio.run(scenario())


def test_never_zero_and_never_stopped_by_a_vm_that_has_gone() -> None:
    async def scenario() -> None:
        budget = Bandwidth(1)
        assert await start(budget, Speeds(gone=True), ["a", "b"]) == 1
        assert await start(budget, Speeds(), ["c"]) == 1

    asyncio.run(scenario())
