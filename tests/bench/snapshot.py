# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots: how long a guest with four disks is frozen, fifty VMs in one call, and the way back beside a power-off."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.case import Bench, Outcome
from bench.goals import Goal
from bench.machines import MIB, Machine, machines
from bench.measure import Contender, Group, measure
from bench.tools import ToolFailed, command, playbook
from lab import images
from lab.instant import instant_vms
from lab.vm import DISK_SIZE, LabVm
from support.module import run_module

DISKS = 4
OURS, BARE = "qmp_snapshot, one call", "bare QMP script"
PLAY, _EMPTY = "qmp_snapshot, one ansible-playbook task", "ansible-playbook, one ping"
LIVE, OFF = "qmp_snapshot state=reverted", "power off, new overlay by qemu-img, power on"
PARALLEL = 8
_SCRIPT = Path(__file__).parent / "bare_snapshot.py"


def run(bench: Bench) -> Outcome:
    home = bench.directory / "snapshot"
    home.mkdir()
    windows, ratio = _windows(bench, home)
    many = _many(bench, home)
    back = _back(bench, home)
    goals = [
        Goal("freeze window of a snapshot of 4 drives: median, times the bare script's", ratio, 1.2),
        Goal("snapshots of the fleet, one call: times the bare script", many.ratio(OURS), 1.5),
    ]
    return Outcome([windows, many, back], [] if bench.quick else goals)


# -- the frozen window -------------------------------------------------------------------------------------------------


def _windows(bench: Bench, home: Path) -> tuple[Group, float]:
    group = Group(f"freeze window of a snapshot: {DISKS} disks, four ext4 file systems in the guest", "")
    ours: list[float] = []
    bare: list[float] = []
    place = home / "window"
    place.mkdir()
    with instant_vms(1, place, disks=DISKS) as (vm,):
        for number in range(bench.rounds(50)):
            for first in (number % 2 == 0, number % 2 == 1):
                if first:
                    ours.append(_our_window(vm))
                else:
                    bare.append(_bare_window(vm, place, number))
            bench.report(f"snapshot window {number + 1}: module {ours[-1]:.0f} ms, bare script {bare[-1]:.0f} ms")
    group.notes.append(_line("qmp_snapshot quiesce=required", ours))
    group.notes.append(_line("bare script: freeze, transaction, thaw", bare))
    ratio = statistics.median(ours) / statistics.median(bare)
    group.notes.append(f"ratio of the medians: {ratio:.2f}; of the worst: {max(ours) / max(bare):.2f}")
    return group, ratio


def _line(name: str, values: Sequence[float]) -> str:
    return f"{name}: median {statistics.median(values):.0f} ms, worst {max(values):.0f} ms of {len(values)}"


def _our_window(vm: LabVm) -> float:
    entry = {"name": vm.name, "socket": str(vm.socket), "agent_socket": str(vm.agent_socket)}
    answer = run_module("qmp_snapshot", {"name": "s", "vms": [entry], "quiesce": "required"}).ok().data["vms"][0]
    run_module("qmp_snapshot", {"name": "s", "vms": [entry], "state": "absent"}).ok()
    if answer["consistency"] != "filesystem":
        raise ToolFailed(f"the guest was not frozen: {answer}")
    return float(answer["freeze_ms"])


def _bare_window(vm: LabVm, home: Path, number: int) -> float:
    drives = []
    for letter in "abcd"[:DISKS]:
        below = home / f"{vm.name}-vd{letter}.qcow2"
        overlay = home / f"bare-vd{letter}-{number}.qcow2"
        drives.append({"node": f"vd{letter}-node", "overlay": str(overlay), "below": str(below), "size": DISK_SIZE})
    one = {"socket": str(vm.socket), "agent": str(vm.agent_socket), "drives": drives}
    window = _bare([one])["windows"][0]
    _bare([one], drop=True)
    for drive in drives:
        Path(str(drive["overlay"])).unlink()
    return float(window)


def _bare(vms: Sequence[dict[str, Any]], *, drop: bool = False) -> dict[str, Any]:
    job = {"parallel": PARALLEL, "vms": list(vms), "drop": drop}
    _seconds, printed = command(sys.executable, _SCRIPT, stdin=json.dumps(job))
    answer: dict[str, Any] = json.loads(printed)
    return answer


# -- many VMs ----------------------------------------------------------------------------------------------------------


def _many(bench: Bench, home: Path) -> Group:
    number = 4 if bench.quick else 50
    place = home / "many"
    place.mkdir()
    group = Group(f"snapshots of {number} VMs on one host, no guest frozen", BARE)
    with machines(place, [64 * MIB] * number, MIB) as made:
        contenders = [
            Contender(BARE, lambda: _bare_many(made)),
            Contender(OURS, lambda: _ours_many(made)),
            Contender(PLAY, lambda: _play_many(made, place)),
            Contender(_EMPTY, lambda: playbook(place, [{"ansible.builtin.ping": {}}])),
        ]
        measure(group, contenders, bench.rounds(5), bench.report)
    group.notes.append("the bare script flushes nothing; the module makes each overlay and its record durable first")
    return group


def _entries(made: Sequence[Machine]) -> dict[str, Any]:
    return {"name": "s", "vms": [machine.entry() for machine in made], "quiesce": "off", "max_parallel": PARALLEL}


def _ours_many(made: Sequence[Machine]) -> float:
    begin = time.monotonic()
    run_module("qmp_snapshot", _entries(made)).ok()
    seconds = time.monotonic() - begin
    _drop_many(made)
    return seconds


def _play_many(made: Sequence[Machine], place: Path) -> float:
    seconds = playbook(place, [{"blockops.qemu.qmp_snapshot": _entries(made)}])
    _drop_many(made)
    return seconds


def _drop_many(made: Sequence[Machine]) -> None:
    run_module("qmp_snapshot", {**_entries(made), "state": "absent"}).ok()


def _bare_many(made: Sequence[Machine]) -> float:
    vms = []
    for machine in made:
        overlay = machine.image.with_name("bare.qcow2")
        drive = {"node": machine.node, "overlay": str(overlay), "below": str(machine.image), "size": machine.size}
        vms.append({"socket": str(machine.qemu.socket), "drives": [drive]})
    begin = time.monotonic()
    _bare(vms)
    seconds = time.monotonic() - begin
    _bare(vms, drop=True)
    for machine in made:
        machine.image.with_name("bare.qcow2").unlink()
    return seconds


# -- the way back ------------------------------------------------------------------------------------------------------


def _back(bench: Bench, home: Path) -> Group:
    place = home / "back"
    place.mkdir()
    group = Group("back to a snapshot: from the task's start until the guest has booted and its agent answers", OFF)
    with LabVm("back", place) as vm:
        vm.wait_agent()
        entry = {"name": vm.name, "socket": str(vm.socket), "definition": [str(vm.definition)]}
        run_module("qmp_snapshot", {"name": "s", "vms": [entry], "quiesce": "off"}).ok()
        still: list[float] = []
        reset: list[float] = []
        contenders = [Contender(OFF, lambda: _power_off(vm, entry)), Contender(LIVE, lambda: _live(vm, entry, still))]
        measure(group, contenders, bench.rounds(5), bench.report, lambda: _spoil(vm))
        for _round in range(bench.rounds(3)):
            reset.append(_reset(vm))
    group.notes.append(
        f"{LIVE}: the old guest is stopped and the reset one goes on {statistics.median(still):.0f} ms later"
    )
    group.notes.append(
        f"system_reset alone, nothing changed: booted after {statistics.median(reset):.2f} s (TCG, no KVM)"
    )
    return group


def _spoil(vm: LabVm) -> None:
    vm.exec("dd if=/dev/urandom of=/mnt/vda/upgrade bs=1M count=4 2>/dev/null && sync")


def _reset(vm: LabVm) -> float:
    """What the guest and its firmware need after a reset, whatever is done to its disks."""
    begin = time.monotonic()
    vm.command("system_reset")
    vm.wait_agent()
    return time.monotonic() - begin


def _live(vm: LabVm, entry: dict[str, Any], still: list[float]) -> float:
    begin = time.monotonic()
    params = {"name": "s", "vms": [entry], "state": "reverted", "allow_reset": True, "discarded": "delete"}
    still.append(run_module("qmp_snapshot", params).ok().data["vms"][0]["transaction_ms"])
    vm.wait_agent()
    return time.monotonic() - begin


def _power_off(vm: LabVm, entry: dict[str, Any]) -> float:
    """As the talk does it by hand: switch off, replace the active image by a new overlay on the snapshot, start."""
    (path,) = vm.directory.glob("*-vda.s*.qcow2")
    below = vm.directory / f"{vm.name}-vda.qcow2"
    begin = time.monotonic()
    run_module("qmp_vm_power", {"state": "stopped", "vms": [entry], "powerdown_timeout": 0}).ok()
    path.unlink()
    images.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", path)
    vm.start()
    vm.wait_agent()
    return time.monotonic() - begin
