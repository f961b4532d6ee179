# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The planner of chains: tables of situations, and random chains against every sequence of jobs there is."""

from __future__ import annotations

import functools
import heapq
import random
import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._block.chain_plan import (
    AUTO,
    COMMIT,
    STREAM,
    ChainPlan,
    Image,
    groups,
    plan_chain,
)

SIZE = 1000


def chain(*data: int, ours: t.Container[int] = (), needed: t.Container[int] = ()) -> list[Image]:
    return [Image(each, SIZE, number in ours, number in needed) for number, each in enumerate(data)]


def jobs(plan: ChainPlan) -> list[tuple[str, int, int, int]]:
    return [(step.how, step.top, step.base, step.data) for step in plan.steps]


ALL = range(100)
TABLE: dict[str, tuple[list[Image], set[int], str, list[tuple[str, int, int, int]]]] = {
    "nothing to drop": (chain(1, 2, 3), set(), AUTO, []),
    "small overlays onto a large base": (chain(1, 2, 90), {1, 2}, AUTO, [(COMMIT, 0, 2, 3)]),
    "a small image of ours below a large one": (chain(50, 2, ours=ALL), {1}, AUTO, [(STREAM, 0, 1, 2)]),
    "a small image that is not ours": (chain(50, 2), {1}, AUTO, [(COMMIT, 0, 1, 50)]),
    "both ways, around the largest": (
        chain(1, 2, 80, 3, 4, ours=ALL), {1, 2, 3, 4}, AUTO, [(COMMIT, 0, 2, 3), (STREAM, 2, 4, 7)],
    ),
    "two groups, the topmost first": (
        chain(1, 9, 1, 9, ours=ALL), {1, 3}, AUTO, [(COMMIT, 0, 1, 1), (COMMIT, 2, 3, 1)],
    ),
    "of equals the lower one stays": (chain(5, 5, ours=ALL), {1}, AUTO, [(COMMIT, 0, 1, 5)]),
    "told to stream": (chain(1, 2, 90), {1, 2}, STREAM, [(STREAM, 0, 2, 92)]),
    "told to commit": (chain(90, 2, 1, ours=ALL), {1, 2}, COMMIT, [(COMMIT, 0, 2, 92)]),
    "no more than the disk holds": (chain(700, 800, 900), {1, 2}, COMMIT, [(COMMIT, 0, 2, SIZE)]),
    "a needed base is read, when told to": (chain(1, 9, needed={1}), {1}, STREAM, [(STREAM, 0, 1, 9)]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_situations(name: str) -> None:
    images, drops, how, expected = TABLE[name]
    assert jobs(plan_chain(images, drops, how)) == expected


BLOCKED: dict[str, tuple[list[Image], str]] = {
    "a base that others need": (chain(1, 9, needed={1}), AUTO),
    "an overlay that others need": (chain(1, 9, ours=ALL, needed={0}), COMMIT),
    "an overlay with internal snapshots": ([Image(1, SIZE, inner=True), Image(9, SIZE, ours=True)], COMMIT),
    "streaming under internal snapshots": ([Image(1, SIZE, inner=True), Image(9, SIZE, ours=True)], STREAM),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_cannot_be_joined_is_told(name: str) -> None:
    images, how = BLOCKED[name]
    plan = plan_chain(images, {1}, how)
    assert plan.blocked == ((0, 1),) and not plan.steps


def test_groups() -> None:
    assert list(groups(6, {1, 3, 4})) == [(0, 1), (2, 4)]
    assert list(groups(3, {1, 2, 3, 7})) == [(0, 2)]
    assert list(groups(1, {1})) == []


# --- against brute force

State = tuple[tuple[int, frozenset[int]], ...]  # each image left: its number, and the images that are in it


def cheapest(images: t.Sequence[Image], drops: t.Collection[int], how: str) -> int | None:
    """The fewest bytes of any sequence of jobs, on any range at any moment, that ends with just the wanted chain."""
    start: State = tuple((number, frozenset([number])) for number in range(len(images)))
    done = len(images) - len(set(drops))
    queue, best = [(0, 0, start)], {start: 0}
    tick = 0
    while queue:
        cost, _tick, state = heapq.heappop(queue)
        if cost > best[state]:
            continue
        if len(state) == done:
            return cost
        for copied, after in moves(images, frozenset(drops), how, state):
            if cost + copied < best.get(after, cost + copied + 1):
                best[after] = cost + copied
                tick += 1
                heapq.heappush(queue, (cost + copied, tick, after))
    return None


def moves(images: t.Sequence[Image], drops: frozenset[int], how: str, state: State) -> t.Iterator[tuple[int, State]]:
    for first in range(len(state)):
        for last in range(first + 1, len(state)):
            # The boundary above an image is that above the topmost image that is in it.
            if any(min(state[place][1]) not in drops for place in range(first + 1, last + 1)):
                break
            inside = frozenset().union(*(state[place][1] for place in range(first, last + 1)))
            rest = (state[:first], state[last + 1 :])
            above, below = state[first:last], state[first + 1 : last + 1]
            if may_commit(images, how, above, state[last]):
                yield volume(images, above), (*rest[0], (state[last][0], inside), *rest[1])
            if may_stream(images, how, state[first], below):
                yield volume(images, below), (*rest[0], (state[first][0], inside), *rest[1])


def may_commit(images: t.Sequence[Image], how: str, above: State, target: tuple[int, frozenset[int]]) -> bool:
    alone = not any(images[number].needed or images[number].inner for number, _inside in above)
    return how != STREAM and alone and not images[target[0]].needed


def may_stream(images: t.Sequence[Image], how: str, target: tuple[int, frozenset[int]], below: State) -> bool:
    if how == COMMIT or images[target[0]].inner:
        return False
    # What came out of an image that is not ours would leave it behind, by whatever detour.
    free = (images[number] for _number, inside in below for number in inside)
    return how == STREAM or all(image.ours and not image.needed and not image.inner for image in free)


def volume(images: t.Sequence[Image], moved: State) -> int:
    content = functools.reduce(frozenset.union, (inside for _number, inside in moved))
    return min(SIZE, sum(images[number].data for number in content))


def random_chain(chooser: random.Random) -> tuple[list[Image], set[int]]:
    count = chooser.randint(1, 7)
    images = [
        Image(
            data=chooser.choice([0, 1, chooser.randint(1, 50), chooser.randint(1, 600)]),
            size=SIZE,
            ours=chooser.random() < 0.7,
            needed=chooser.random() < 0.12,
            inner=chooser.random() < 0.08,
        )
        for _number in range(count)
    ]
    return images, {boundary for boundary in range(1, count) if chooser.random() < 0.6}


@pytest.mark.parametrize("how", [AUTO, COMMIT, STREAM])
def test_nothing_copies_less(how: str) -> None:
    chooser, possible = random.Random(how), 0
    for _round in range(1000):
        images, drops = random_chain(chooser)
        plan, bound = plan_chain(images, drops, how), cheapest(images, drops, how)
        if plan.blocked:
            assert bound is None, (images, drops, bound)
            continue
        assert plan.data == bound, (images, drops, plan)
        check(images, drops, plan)
        possible += 1
    assert possible > 300


def check(images: t.Sequence[Image], drops: t.Collection[int], plan: ChainPlan) -> None:
    """The jobs are taken by a chain of contents: what stays reads as before, and no kept view is ever written to."""
    left = {number: {number} for number in range(len(images))}
    for step in plan.steps:
        for number in step.dropped:
            left[step.target] |= left.pop(number)
        for boundary in set(range(1, len(images))) - set(drops):
            below = [content for number, content in left.items() if min(content) >= boundary]
            assert set().union(*below) == set(range(boundary, len(images))), (boundary, step)
    assert len(left) == len(images) - len(set(drops))


def test_a_long_chain_is_planned_at_once() -> None:
    images = [Image(number % 7, SIZE, ours=True) for number in range(200)]
    plan = plan_chain(images, set(range(1, 200)))
    assert plan.dropped == set(range(200)) - {step.target for step in plan.steps}
