# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs that wait for each other: all come through, or all learn who did not."""

from __future__ import annotations

import asyncio
import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import InputInvalid
from ansible_collections.blockops.qemu.plugins.module_utils._ops.rendezvous import GroupBroken, Rendezvous

STAGES = 3


async def party(
    group: Rendezvous, name: str, log: list[str], *, fails_at: int | None = None, stages: int = STAGES
) -> None:
    with group.member(name):
        for stage in range(stages):
            if stage == fails_at:
                raise InputInvalid(message="it broke")
            await asyncio.sleep(0.001 * len(name))
            await group.meet(name)
            log.append(f"{name} {stage}")


async def run(*parties: t.Awaitable[None]) -> list[BaseException | None]:
    return await asyncio.wait_for(asyncio.gather(*parties, return_exceptions=True), 5)


@pytest.mark.parametrize("members", [1, 2, 7])
def test_nobody_enters_a_stage_before_all_have_left_the_last(members: int) -> None:
    log: list[str] = []
    group = Rendezvous(members)
    parties = [party(group, "v" * (number + 1), log) for number in range(members)]
    assert asyncio.run(run(*parties)) == [None] * members
    assert [line.split()[1] for line in log] == [str(stage) for stage in range(STAGES) for _member in range(members)]


@pytest.mark.parametrize("stage", range(STAGES))
def test_one_that_fails_releases_the_others(stage: int) -> None:
    log: list[str] = []
    group = Rendezvous(3)
    ended = asyncio.run(run(party(group, "a", log), party(group, "bb", log, fails_at=stage), party(group, "ccc", log)))
    assert [type(each) for each in ended] == [GroupBroken, InputInvalid, GroupBroken]
    assert "bb failed" in str(ended[0])
    assert len(log) == 3 * stage


def test_one_that_has_nothing_to_do_leaves_early() -> None:
    log: list[str] = []
    group = Rendezvous(3)
    ended = asyncio.run(run(party(group, "a", log), party(group, "bb", log, stages=0), party(group, "ccc", log)))
    assert ended == [None, None, None]
    assert len(log) == 2 * STAGES


def test_one_that_does_not_come_in_time_breaks_the_group() -> None:
    async def scenario() -> None:
        group = Rendezvous(2)
        with pytest.raises(GroupBroken, match="in time"), group.member("a"):
            await group.meet("a", 0.01)
        with pytest.raises(GroupBroken, match="in time"), group.member("b"):
            await group.meet("b")

    asyncio.run(scenario())


def test_the_one_that_did_not_come_is_named() -> None:
    async def late(group: Rendezvous) -> None:
        with group.member("late"):
            await asyncio.sleep(0.05)
            await group.meet("late")

    async def early(group: Rendezvous) -> None:
        with group.member("early"):
            await group.meet("early", 0.01)

    async def scenario() -> list[t.Any]:
        group = Rendezvous(2)
        return await run(late(group), early(group))

    for ended in asyncio.run(scenario()):
        assert isinstance(ended, GroupBroken) and ended.data["culprit"] == "late"


def test_the_spread_spans_all_points() -> None:
    group = Rendezvous(3)
    assert group.spread_ms is None
    for first, last in ((5.0, 5.002), (5.001, 5.004), (4.999, 5.001)):
        group.note(first, last)
    assert group.spread_ms == 5.0
