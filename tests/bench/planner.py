# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the choice between commit and stream saves: the same generated chains pruned by each of the three ways.

The bytes are those of the plan (check mode), and those that QEMU then wrote, as the kernel counts them.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.case import Bench
from bench.goals import Goal
from bench.machines import MIB, make_disk
from bench.measure import Group
from bench.tools import ToolFailed, fresh
from lab import images
from lab.drive import Drive
from lab.qemu import Qemu
from support.module import run_module

WAYS = ("auto", "commit", "stream")
_UNIT = 64 * 1024
# As an administrator asks for it. Snapshot sN is the view from below overlay N + 1.
_WISHES: dict[str, dict[str, Any]] = {
    "no snapshot stays": {"keep": []},
    "every third snapshot stays": {"keep": ["s1", "s4"]},
    "at most 3 images": {"max_depth": 3},
}


@dataclass(frozen=True)
class _Bytes:
    planned: int
    written: int
    seconds: float


def run(bench: Bench, home: Path) -> tuple[Group, list[Goal]]:
    """The table, and the goals: never more bytes than the better of always-commit and always-stream."""
    drives, depth, scale = (2, 4, 16) if bench.quick else (8, 8, 256)
    chains = _Chains(home, drives, depth, scale)
    wishes = dict(list(_WISHES.items())[:1]) if bench.quick else _WISHES
    group = Group(f"planner: {drives} chains of {depth} images of random sizes, one call of qmp_block_commit", "")
    goals = []
    for wish, options in wishes.items():
        found = _pruned(bench, chains, wish, options, group)
        best = min(found["commit"].planned, found["stream"].planned)
        goals.append(Goal(f"planner, {wish}: bytes, times the better other way's", found["auto"].planned / best, 1))
    return group, goals


def _pruned(bench: Bench, chains: _Chains, wish: str, options: dict[str, Any], group: Group) -> dict[str, _Bytes]:
    """By each of the ways, on fresh copies; a line for each in the table."""
    found: dict[str, _Bytes] = {}
    for way in WAYS:
        found[way] = chains.prune({"merge": way, **options})
        planned, written = found[way].planned / 1e6, found[way].written / 1e6
        line = f"{wish}, merge={way}: {planned:.0f} MB planned, {written:.0f} MB written, {found[way].seconds:.2f} s"
        group.notes.append(line)
        bench.report(line)
    return found


class _Chains:
    """Each drive has a chain: a base that is somebody's, and overlays of this collection, few of them large."""

    def __init__(self, home: Path, drives: int, depth: int, scale: int) -> None:
        self._pristine = home / "pristine"
        self._place = home / "run"
        self._actives: list[str] = []
        self._pristine.mkdir(parents=True)
        dice = random.Random(8)
        for number in range(drives):
            self._actives.append(self._chain(f"d{number}", depth, scale, dice))

    def _chain(self, drive: str, depth: int, scale: int, dice: random.Random) -> str:
        size = 4 * scale * _UNIT
        below = make_disk(self._pristine / f"{drive}.qcow2", size, size // 4 // MIB * MIB, 1)
        for number in range(depth - 1):
            path = images.create(self._pristine / f"{drive}.s{number}.qcow2", backing=below.name)
            held = round(scale ** dice.random())  # as many small ones as large ones on a logarithmic scale
            chosen = dice.sample(range(size // _UNIT), held)
            images.fill(path, [(place * _UNIT, _UNIT, number + 1) for place in chosen])
            below = path
        return below.name

    def prune(self, options: dict[str, Any]) -> _Bytes:
        fresh(self._place)
        shutil.copytree(self._pristine, self._place, dirs_exist_ok=True)
        for path in sorted(self._place.glob("*.s*.qcow2")):
            self._record(path)
        drives = [Drive(name.partition(".")[0], self._place / name) for name in self._actives]
        with Qemu("vm", drives, self._place) as vm:
            params = {"vms": [{"name": vm.name, "socket": str(vm.socket)}], **options}
            expected = _total(run_module("qmp_block_commit", params, check=True).ok().data)
            before = _written(vm)
            begin = time.monotonic()
            done = run_module("qmp_block_commit", params).ok().data
            seconds = time.monotonic() - begin
            result = _Bytes(expected, _written(vm) - before, seconds)
        for drive in done["vms"][0]["drives"]:
            self._judge(drive)
        return result

    def _record(self, path: Path) -> None:
        """As qmp_snapshot writes it beside an overlay."""
        drive, name, _suffix = path.name.split(".")
        below = images.info(path)["backing-filename"]
        record = {"name": name, "drive": drive, "overlay": str(path), "image": str(self._place / below)}
        record |= {"image_format": "qcow2", "created": "2026-01-01T00:00:00Z", "state": "present"}
        text = json.dumps({"format": 1, "consistency": "crash", **record})
        path.with_name(f"{path.name}.snapshot.json").write_text(text)

    def _judge(self, drive: dict[str, Any]) -> None:
        pristine = next(name for name in self._actives if name.startswith(f"{drive['name']}."))
        if not images.compare(drive["after"][0], self._pristine / pristine):
            raise ToolFailed(f"the disk is not what it was: {drive}")


def _total(data: dict[str, Any]) -> int:
    return sum(int(drive["bytes"]) for drive in data["vms"][0]["drives"])


def _written(vm: Qemu) -> int:
    """Bytes that the process has written, wherever to."""
    fields = Path(f"/proc/{vm.pid}/io").read_text().split()
    return int(fields[fields.index("wchar:") + 1])
