# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""qmpbackup, from the checkout that the environment's QMPBACKUP names (it is in no package registry).

Its requirements (qemu.qmp, colorlog) are looked for in a ``.venv`` of that checkout, then in this interpreter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machines import Machine
from bench.tools import ToolFailed, command, fresh


@dataclass(frozen=True)
class Qmpbackup:
    """One command per VM, one after the other, with its defaults; a target directory for each VM."""

    program: tuple[str, str]
    directory: Path

    def full(self, machines: Sequence[Machine]) -> float:
        for machine in machines:
            fresh(self._target(machine))
        return sum(self._run(machine, "full") for machine in machines)

    def incremental(self, machines: Sequence[Machine]) -> float:
        return sum(self._run(machine, "inc") for machine in machines)

    def _target(self, machine: Machine) -> Path:
        return self.directory / machine.qemu.name

    def _run(self, machine: Machine, level: str) -> float:
        words = [
            "--socket",
            str(machine.qemu.socket),
            "backup",
            "--level",
            level,
            "--target",
            str(self._target(machine)),
        ]
        return command(*self.program, *words)[0]


def find_qmpbackup(directory: Path) -> tuple[Qmpbackup | None, str]:
    """The tool, or why it is absent."""
    chosen = os.environ.get("QMPBACKUP")
    if not chosen:
        return None, "qmpbackup (QMPBACKUP=DIR names no checkout)"
    script = Path(chosen).absolute() / "qmpbackup"
    own = script.parent / ".venv" / "bin" / "python"
    program = (str(own if own.exists() else sys.executable), str(script))
    try:
        command(*program, "--help")
    except (ToolFailed, OSError) as exc:
        return None, f"qmpbackup ({chosen}: {str(exc).strip().splitlines()[-1]})"
    return Qmpbackup(program, directory), ""
