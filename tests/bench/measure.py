# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Samples of contenders that take turns, and what can be said of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Report = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """``run`` does its own preparation and cleaning up and answers the seconds of what is measured.

    ``rounds`` limits a slow one to the first rounds; the others go on without it.
    """

    name: str
    run: Callable[[], float]
    rounds: int | None = None


@dataclass
class Group:
    """One table: contenders measured in the same rounds.

    ``amount`` in bytes, when MB/s make sense; not for those that ``copies_nothing`` names.
    """

    title: str
    reference: str
    amount: int | None = None
    samples: dict[str, dict[int, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    copies_nothing: tuple[str, ...] = ()

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name].values())

    def ratio(self, name: str, reference: str | None = None) -> float:
        """Median of the ratios within one round, over the rounds that both took part in."""
        mine, other = self.samples[name], self.samples[reference or self.reference]
        return statistics.median(mine[number] / other[number] for number in mine.keys() & other.keys())

    def difference(self, name: str, reference: str | None = None) -> float:
        """Median of the differences (seconds) within one round."""
        mine, other = self.samples[name], self.samples[reference or self.reference]
        return statistics.median(mine[number] - other[number] for number in mine.keys() & other.keys())


def measure(
    group: Group, contenders: Sequence[Contender], rounds: int, report: Report, before: Callable[[], None] | None = None
) -> Group:
    """Let the contenders take turns; each round begins with another one. ``before`` prepares each round."""
    for number in range(rounds):
        if before is not None:
            before()
        shift = number % len(contenders)
        for contender in (*contenders[shift:], *contenders[:shift]):
            if contender.rounds is not None and number >= contender.rounds:
                continue
            os.sync()  # what the one before left to be written must not be charged to this one
            seconds = contender.run()
            group.samples.setdefault(contender.name, {})[number] = seconds
            report(f"{group.title}: round {number + 1}/{rounds}: {contender.name}: {seconds:.2f} s")
    group.samples = {c.name: group.samples[c.name] for c in contenders}
    return group
