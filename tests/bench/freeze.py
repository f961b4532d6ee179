# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a guest with four disks is frozen for its point in time: the real guest of the lab, with its agent."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.case import Bench, Outcome
from bench.measure import Group
from bench.tools import ToolFailed, command
from lab.instant import instant_vms
from lab.vm import DISK_SIZE, LabVm
from support.module import run_module

DISKS = 4


def run(bench: Bench) -> Outcome:
    home = bench.directory / "freeze"
    home.mkdir()
    group = Group(f"freeze window: {DISKS} disks, four ext4 file systems in the guest", "")
    ours: list[float] = []
    bare: list[float] = []
    with instant_vms(1, home, disks=DISKS) as (vm,):
        for number in range(bench.rounds(10)):
            ours.append(_ours(vm, home))
            bare.append(_bare(vm, home, number))
            bench.report(f"freeze: round {number + 1}: module {ours[-1]:.0f} ms, bare script {bare[-1]:.0f} ms")
    group.notes.append(_line("qmp_drive_backup quiesce=required, incremental", ours))
    group.notes.append(_line("bare script: freeze, transaction of fulls, thaw", bare))
    return Outcome([group], [])


def _line(name: str, values: Sequence[float]) -> str:
    return f"{name}: median {statistics.median(values):.0f} ms, worst {max(values):.0f} ms of {len(values)}"


def _ours(vm: LabVm, home: Path) -> float:
    entry = {"name": vm.name, "socket": str(vm.socket), "agent_socket": str(vm.agent_socket)}
    params = {"repository": str(home / "repository"), "vms": [entry], "quiesce": "required"}
    answer = run_module("qmp_drive_backup", params).ok().data["vms"][0]
    if answer["consistency"] != "filesystem":
        raise ToolFailed(f"the guest was not frozen: {answer}")
    return float(answer["freeze_ms"])


def _bare(vm: LabVm, home: Path, number: int) -> float:
    drives: list[dict[str, Any]] = []
    for letter in "abcd"[:DISKS]:
        target = home / f"bare-vd{letter}-{number}.qcow2"
        drives.append({"node": f"vd{letter}-node", "target": str(target), "size": DISK_SIZE})
    one = {"socket": str(vm.socket), "agent": str(vm.agent_socket), "drives": drives}
    job = {"parallel": 1, "direct": True, "vms": [one]}
    _seconds, printed = command(sys.executable, Path(__file__).parent / "bare.py", stdin=json.dumps(job))
    return float(json.loads(printed)["windows"][0])
