# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the collection wants to reach, held against what was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """``value`` must be at most (or, with ``least``, at least) ``limit``."""

    text: str
    value: float
    limit: float
    unit: str = ""
    least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def line(self) -> str:
        word = "at least" if self.least else "at most"
        verdict = "met" if self.met else "MISSED"
        return f"{self.text}: {self.value:.2f}{self.unit} ({word} {self.limit:g}{self.unit}): {verdict}"
