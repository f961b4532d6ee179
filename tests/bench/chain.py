# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Chains of running VMs made shorter: commit and stream beside bare QMP, and what a guest gains by a short chain.

How many bytes the planner saves is in :mod:`bench.planner`.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import planner
from bench.case import Bench, Outcome
from bench.goals import Goal
from bench.machines import GIB, MIB, make_disk
from bench.measure import Contender, Group, measure
from bench.tools import ToolFailed, command, fresh
from lab import images
from lab.drive import Drive
from lab.qemu import Qemu
from support.module import run_module

BARE, FLUSHED = "bare QMP script", "bare QMP script that flushes"
MODULES = {"commit": "qmp_block_commit", "stream": "qmp_block_stream"}
_SCRIPT = Path(__file__).parent / "bare_chain.py"
_CLUSTER = 64 * 1024
_SPEED = re.compile(r"and ([0-9.e+]+) ops/sec")


def run(bench: Bench) -> Outcome:
    home = bench.directory / "chain"
    home.mkdir()
    live = [_live(bench, home, how) for how in MODULES]
    saved, goals = planner.run(bench, home / "planner")
    goals = [
        Goal(
            f"{MODULES[how]}: times the bare script that makes as much durable", group.ratio(MODULES[how], equal), 1.05
        )
        for how, group, equal in zip(MODULES, live, (BARE, FLUSHED))
    ] + goals
    return Outcome([*live, saved, *_reads(bench, home)], [] if bench.quick else goals)


# -- one merge ---------------------------------------------------------------------------------------------------------


def _live(bench: Bench, home: Path, how: str) -> Group:
    amount = 32 * MIB if bench.quick else 2 * GIB
    data = make_disk(home / f"{how}.qcow2", 2 * amount, amount, 1)
    if how == "commit":
        images.run_tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", data)
    merge = _Merge(home, how, data, 2 * amount)
    what = "the active image into its empty base" if how == "commit" else "the base into its empty overlay"
    group = Group(f"{how}: {amount // MIB} MiB of {what}, while the VM has them open", BARE, amount)
    contenders = [Contender(BARE, lambda: merge.run(lambda vm: merge.bare(vm, flush=False)))]
    if how == "stream":
        contenders.append(Contender(FLUSHED, lambda: merge.run(lambda vm: merge.bare(vm, flush=True))))
    contenders.append(Contender(MODULES[how], lambda: merge.run(merge.module)))
    measure(group, contenders, bench.rounds(5), bench.report)
    inside = {name: f"{statistics.median(found):.2f} s" for name, found in merge.inside.items()}
    group.notes.append(f"without the interpreters' start, by their own clocks: {inside}")
    if how == "stream":
        group.notes.append("QEMU flushes what was committed, but not what was streamed; the module does")
    data.unlink()
    return group


class _Merge:
    """The image that holds ``data`` and an empty one beside it, made anew each time; ``inside``: their own clocks."""

    def __init__(self, home: Path, how: str, data: Path, size: int) -> None:
        self._place = home / f"{how}.run"
        self._how = how
        self._data = data
        self._size = size
        self.inside: dict[str, list[float]] = {}

    def run(self, act: Callable[[Qemu], float]) -> float:
        place = fresh(self._place)
        base, active = place / "base.qcow2", place / "active.qcow2"
        # Nothing is written to the image that is read, so it need not be copied: it gets one more name.
        if self._how == "commit":
            images.create(base, self._size)
            os.link(self._data, active)
        else:
            os.link(self._data, base)
            images.create(active, self._size, backing=base.name)
        _read(self._data)
        os.sync()
        with Qemu("vm", [Drive("d0", active)], place) as vm:
            seconds = act(vm)
        left, gone = (base, active) if self._how == "commit" else (active, base)
        gone.unlink()  # the one that is left needs it no more
        self._judge(left)
        return seconds

    def _judge(self, left: Path) -> None:
        """It holds what the other one held: the committed image's own chain is this one, so it is asked alone."""
        source = f'json:{{"driver":"qcow2","backing":null,"file":{{"driver":"file","filename":"{self._data}"}}}}'
        done = images.run_tool("qemu-img", "compare", source, left, accept=(0, 1))
        if done.returncode:
            raise ToolFailed(f"{left} does not hold what was merged into it: {done.stdout}")

    def bare(self, vm: Qemu, *, flush: bool) -> float:
        job = {"socket": str(vm.socket), "node": vm.drives["d0"].node, "how": self._how, "flush": flush}
        seconds, printed = command(sys.executable, _SCRIPT, stdin=json.dumps(job))
        self.inside.setdefault(FLUSHED if flush else BARE, []).append(json.loads(printed)["seconds"])
        return seconds

    def module(self, vm: Qemu) -> float:
        params: dict[str, Any] = {"vms": [{"name": vm.name, "socket": str(vm.socket)}]}
        if self._how == "commit":
            params["base"] = str(self._place / "base.qcow2")
        begin = time.monotonic()
        answer = run_module(MODULES[self._how], params, timeout=600).ok().data["vms"][0]
        seconds = time.monotonic() - begin
        if len(answer["drives"][0]["after"]) != 1:
            raise ToolFailed(f"the chain is not one image: {answer}")
        self.inside.setdefault(MODULES[self._how], []).append(answer["seconds"])
        return seconds


def _read(path: Path) -> None:
    """Into the page cache, for all contenders alike."""
    with path.open("rb", buffering=0) as stream:
        while stream.read(8 * MIB):
            pass


# -- what the guest gains ----------------------------------------------------------------------------------------------


def _reads(bench: Bench, home: Path) -> list[Group]:
    size, depth = (16 * MIB, 8) if bench.quick else (512 * MIB, 64)
    place = home / "reads"
    place.mkdir()
    active = _deep(place, size, depth)
    before, after = f"a chain of {depth}", "the same disk after qmp_block_commit"
    passes = {"all of the disk, 1 MiB at a time": _whole(size), "4 KiB at random places": _random(size, bench.quick)}
    groups = [
        Group(f"reads of a guest: {title}", before, sum(length for _offset, length in reads))
        for title, reads in passes.items()
    ]
    with Qemu("deep", [Drive("d0", active)], place) as vm:
        _sample(groups, passes, vm, before, bench)
        params = {"vms": [{"name": vm.name, "socket": str(vm.socket)}], "base": str(place / "0.qcow2")}
        begin = time.monotonic()
        drive = run_module("qmp_block_commit", params, timeout=600).ok().data["vms"][0]["drives"][0]
        seconds = time.monotonic() - begin
        if (len(drive["before"]), len(drive["after"])) != (depth, 1):
            raise ToolFailed(f"not made one image: {drive}")
        _sample(groups, passes, vm, after, bench)
    groups[-1].notes.append(f"{depth - 1} images committed in {seconds:.2f} s: {drive['bytes'] / 1e6:.0f} MB at most")
    groups[-1].notes.append("seconds as QEMU counts them, one read after the other, all in the page cache")
    return groups


def _deep(place: Path, size: int, depth: int) -> Path:
    """A full base, and overlays that each changed 16 random clusters."""
    dice = random.Random(64)
    below = make_disk(place / "0.qcow2", size, size, 1)
    for number in range(1, depth):
        path = images.create(place / f"{number}.qcow2", backing=below.name)
        chosen = dice.sample(range(size // _CLUSTER), 16)
        images.fill(path, [(cluster * _CLUSTER, _CLUSTER, number) for cluster in chosen])
        below = path
    return below


def _whole(size: int) -> list[tuple[int, int]]:
    return [(offset, MIB) for offset in range(0, size, MIB)]


def _random(size: int, quick: bool) -> list[tuple[int, int]]:
    dice = random.Random(4)
    return [(dice.randrange(size // 4096) * 4096, 4096) for _number in range(100 if quick else 1000)]


def _sample(groups: list[Group], passes: dict[str, list[tuple[int, int]]], vm: Qemu, name: str, bench: Bench) -> None:
    """Before and after cannot take turns; the first pass fills the caches and does not count."""
    for group, reads in zip(groups, passes.values()):
        _guest(vm, reads)
        group.samples[name] = {number: _guest(vm, reads) for number in range(bench.rounds(5))}
        bench.report(f"{group.title}: {name}: {group.median(name):.3f} s")


def _guest(vm: Qemu, reads: list[tuple[int, int]]) -> float:
    """Seconds that the reads took inside QEMU, without the monitor's share."""
    seconds = 0.0
    for offset, length in reads:
        printed = vm.qemu_io("d0", f"read {offset} {length}")
        speed = _SPEED.search(printed)
        if speed is None:
            raise ToolFailed(f"no read: {printed}")
        seconds += 1 / float(speed[1])
    return seconds
