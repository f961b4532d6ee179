# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every case gets, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bench.goals import Goal
from bench.libvirtd import find_libvirt
from bench.measure import Group, Report
from bench.qmpbackup import Qmpbackup, find_qmpbackup


@dataclass
class Bench:
    """``directory`` is on the file system that is measured; ``quick`` asks for small disks and one round."""

    directory: Path
    quick: bool
    report: Report
    absent: list[str] = field(default_factory=list)

    def rounds(self, full: int) -> int:
        return 1 if self.quick else full

    def qmpbackup(self, name: str) -> Qmpbackup | None:
        """qmpbackup with targets of its own; noted as absent when it is."""
        tool, why = find_qmpbackup(self.directory / name)
        self._note(why)
        return tool

    def has_libvirt(self) -> bool:
        """libvirt and virtnbdbackup take half a minute to set up, so a quick run leaves them out."""
        why = "libvirt and virtnbdbackup (left out of a quick run)" if self.quick else find_libvirt()
        self._note(why)
        return not why

    def _note(self, why: str) -> None:
        if why and why not in self.absent:
            self.absent.append(why)


@dataclass(frozen=True)
class Outcome:
    """Tables and goals of one case."""

    groups: list[Group]
    goals: list[Goal]
