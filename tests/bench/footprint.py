# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How much memory the module's process takes at its peak."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.case import Bench, Outcome
from bench.goals import Goal
from bench.machines import GIB, MIB, Machine, machine, machines
from bench.measure import Group
from bench.tools import Module

LIMIT = 60


def run(bench: Bench) -> Outcome:
    number, data = (4, 8 * MIB) if bench.quick else (50, 64 * MIB)
    home = bench.directory / "footprint"
    home.mkdir()
    group = Group("footprint: peak resident set of the module's process", "")
    goals = []

    def take(what: str, made: Sequence[Machine], module: Module, level: str) -> None:
        peak, cpu = _peak(home, made, module, level)
        group.notes.append(f"{what}: {peak:.1f} MiB, {cpu:.2f} s of CPU (module and qemu-img)")
        goals.append(Goal(f"footprint, {what}", peak, LIMIT, " MiB"))
        bench.report(group.notes[-1])

    with machine(home, GIB, 64 * MIB if bench.quick else GIB // 2, "one") as vm:
        module = Module(home / "one")
        take("full of one VM", [vm], module, "full")
        vm.dirty(64 * MIB, 1)
        take("incremental of one VM", [vm], module, "auto")
    with machines(home, [2 * data] * number, data, "many") as made:
        module = Module(home / "many", {"max_parallel": 8})
        take(f"fulls of {number} VMs", made, module, "full")
        take(f"incrementals of {number} VMs", made, module, "auto")
    return Outcome([group], goals)


def _peak(home: Path, made: Sequence[Machine], module: Module, level: str) -> tuple[float, float]:
    """MiB at the peak and seconds of CPU, by way of peak.py in the place of the interpreter."""
    report, wrapper = home / "peak", home / "python"
    peak = Path(__file__).parent / "peak.py"
    python = Path(sys.executable)
    wrapper.write_text(f'#!/bin/sh\nexec "{python}" -S -E "{peak}" "{report}" "{python}" "$@"\n')
    wrapper.chmod(0o755)
    module.run(made, level, python=str(wrapper))
    kilobytes, cpu = report.read_text().split()
    return int(kilobytes) / 1024, float(cpu)
