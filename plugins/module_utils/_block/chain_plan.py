# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""How images are dropped from a chain: which jobs, in which direction, and what they copy. Pure.

Images are numbered from the active one (0) down. Boundary ``k`` lies between the images ``k - 1`` and ``k``; the view
from image ``k`` down is a snapshot as long as its boundary stays. Dropping boundaries joins neighbours into groups. Of
each group one image stays, the target: what lies above it is committed down, what lies below it is streamed up.

No other order of jobs copies less. Every image of a group but the one that stays has to be copied once, and a range of
images is copied by one job, so nothing is copied twice. What is left to choose is the target.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

COMMIT, STREAM, AUTO = "commit", "stream", "auto"


@dataclass(frozen=True)
class Image:
    """One image as the planner sees it.

    ``data``: bytes in it at most; ``size``: what its disk holds at most. ``needed``: others are based on it or have it
    open, so it must neither change nor go. ``inner``: it holds internal snapshots, which go with it, or with the image
    below it. ``ours``: this collection made it, so it can be deleted when nothing uses it.
    """

    data: int
    size: int
    ours: bool = False
    needed: bool = False
    inner: bool = False


@dataclass(frozen=True)
class Step:
    """One job on the images ``top`` to ``base``: a commit leaves ``base``, a stream leaves ``top``."""

    how: str
    top: int
    base: int
    data: int

    @property
    def target(self) -> int:
        return self.base if self.how == COMMIT else self.top

    @property
    def dropped(self) -> range:
        """The images that leave the chain."""
        return range(self.top, self.base) if self.how == COMMIT else range(self.top + 1, self.base + 1)


@dataclass(frozen=True)
class ChainPlan:
    """``steps`` in the order to take; ``blocked``: groups (first and last image) that cannot be joined as was asked."""

    steps: tuple[Step, ...]
    blocked: tuple[tuple[int, int], ...] = ()

    @property
    def data(self) -> int:
        return sum(step.data for step in self.steps)

    @property
    def dropped(self) -> set[int]:
        return {number for step in self.steps for number in step.dropped}


def plan_chain(images: t.Sequence[Image], drops: t.Collection[int], how: str = AUTO) -> ChainPlan:
    """The jobs that drop the boundaries ``drops`` and keep all others, copying the fewest bytes.

    ``how``: with ``commit`` the lowest image of each group stays, with ``stream`` the topmost. ``auto`` streams only
    out of images that are ours, or a file would be left that nobody deletes.
    """
    steps: list[Step] = []
    blocked: list[tuple[int, int]] = []
    for first, last in groups(len(images), drops):
        best = _join(images, first, last, how)
        if best is None:
            blocked.append((first, last))
        else:
            steps += best
    return ChainPlan(tuple(steps), tuple(blocked))


def groups(count: int, drops: t.Collection[int]) -> t.Iterator[tuple[int, int]]:
    """First and last image of each group that becomes one, the topmost group first."""
    first = 0
    for boundary in range(1, count + 1):
        if boundary in drops and boundary < count:
            continue
        if boundary - 1 > first:
            yield first, boundary - 1
        first = boundary


def _join(images: t.Sequence[Image], first: int, last: int, how: str) -> list[Step] | None:
    """The cheapest way to make one image of ``first`` to ``last``; of equals the one with fewer jobs, then commit."""
    targets = _targets(first, last, how)
    ways = [way for target in targets for way in _way(images, first, target, last, how)]
    return min(ways, key=_price, default=None)


def _price(way: t.Sequence[Step]) -> tuple[int, int, int]:
    return sum(step.data for step in way), len(way), -way[0].target


def _targets(first: int, last: int, how: str) -> t.Iterable[int]:
    return {COMMIT: [last], STREAM: [first]}.get(how, range(first, last + 1))


def _way(images: t.Sequence[Image], first: int, target: int, last: int, how: str) -> t.Iterator[list[Step]]:
    """At most one: committed down to the target first, so that the stream need not copy what is overwritten."""
    above, below = images[first:target], images[target + 1 : last + 1]
    size = max(image.size for image in images[first : last + 1])
    if above and (images[target].needed or any(image.needed or image.inner for image in above)):
        return
    if below and images[target].inner:
        return  # its inner snapshots would lose the images that they, too, lie on
    if below and how == AUTO and not all(image.ours and not image.needed and not image.inner for image in below):
        return
    way = []
    if above:
        way.append(Step(COMMIT, first, target, min(size, sum(image.data for image in above))))
    if below:
        way.append(Step(STREAM, target, last, min(size, sum(image.data for image in below))))
    yield way
