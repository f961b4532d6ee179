# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pruning a repository: merges beside ``qemu-img commit`` of as many bytes, and the plan of ten thousand backups.

``qemu-img commit`` writes into a published image, proves nothing, and a kill halfway spoils both points. So the same by
hand on copies, with a proof, takes part as well.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from bench.case import Bench, Outcome
from bench.goals import Goal
from bench.machines import GIB, MIB, machine, make_disk
from bench.measure import Contender, Group, measure
from bench.tools import Module, ToolFailed, command, fresh
from lab import images
from support.fabricate import Fabricated, fabricate
from support.module import run_module

OURS = "backup_prune merge=true"
COMMIT, HAND = "qemu-img commit of as many bytes", "by hand on copies: cp, qemu-img commit, compare, sha256sum"
_RULES = {"keep_last": 7, "keep_daily": 30, "keep_weekly": 52, "keep_monthly": 36, "keep_yearly": 20}


def run(bench: Bench) -> Outcome:
    home = bench.directory / "prune"
    home.mkdir()
    amount = 32 * MIB if bench.quick else 2 * GIB
    backups = _Backups.make(home, amount)
    onto_nothing, onto_full = _onto_nothing(bench, backups), _onto_full(bench, backups)
    plans = _plans(bench, home)
    goals = [
        Goal("merge into a new full: times qemu-img commit of as many bytes", onto_nothing.ratio(OURS), 1),
        Goal("plan of 10 000 backups, seconds of the whole module", plans.median(_PLAN), 5, " s"),
    ]
    return Outcome([onto_nothing, onto_full, plans], [] if bench.quick else goals)


# -- merges ------------------------------------------------------------------------------------------------------------


@dataclass
class _Backups:
    """A full of ``amount`` bytes and two increments of an eighth each, as qmp_drive_backup makes them."""

    home: Path
    amount: int
    repository: Path
    ids: list[str] = field(default_factory=list)

    @classmethod
    def make(cls, home: Path, amount: int) -> _Backups:
        made = cls(home, amount, home / "repository")
        with machine(home, 2 * amount, amount) as vm:
            module = Module(made.repository)
            for seed, level in enumerate(("full", "auto", "auto")):
                if seed:
                    vm.dirty(amount // 8, seed)
                module.run([vm], level)
        manifests = [json.loads(path.read_text()) for path in (made.repository / "vm0").glob("*/manifest.json")]
        made.ids = [each["id"] for each in sorted(manifests, key=lambda each: int(each["sequence"]))]
        return made

    def image(self, number: int) -> Path:
        return self.repository / "vm0" / self.ids[number] / "d0.qcow2"

    def prune(self, left: int, **options: Any) -> float:
        """On a tree of other names for the same files: nothing that is published is ever written to."""
        place = self.home / "pruned"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.repository, place, copy_function=os.link)
        os.sync()
        params = {"repository": str(place), "keep_last": 1, "merge": True, **options}
        begin = time.monotonic()
        run_module("backup_prune", params, timeout=600).ok()
        seconds = time.monotonic() - begin
        there = sorted(path.parent.name for path in (place / "vm0").glob("*/manifest.json"))
        if len(there) != left or not images.compare(place / "vm0" / self.ids[2] / "d0.qcow2", self.image(2)):
            raise ToolFailed(f"not merged, or not the same any more: {there}")
        return seconds

    def by_hand(self, low: int) -> float:
        """Backup ``low`` and all after it become one image, which takes the place of none of them yet."""
        place = fresh(self.home / "hand")
        target, name = place / "low.qcow2", Path("..") / self.repository.name / "vm0" / self.ids[0] / "d0.qcow2"
        os.sync()
        seconds = command("cp", self.image(low), target)[0]
        below = target
        words = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b"]
        if low:
            seconds += command(*words, name, target)[0]
        for number in range(low + 1, 3):
            path = place / f"{number}.qcow2"
            seconds += command("cp", self.image(number), path)[0] + command(*words, below.name, path)[0]
            below = path
        seconds += command("qemu-img", "commit", "-q", "-f", "qcow2", "-b", target.name, below, cwd=place)[0]
        seconds += command("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", target, self.image(2))[0]
        return seconds + command("sha256sum", target)[0]

    def in_place(self, low: int) -> float:
        """Of a copy that is made before the clock starts."""
        place = self.home / "commit"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.repository, place)
        for path in place.rglob("*.qcow2"):
            path.chmod(0o600)
        os.sync()
        base = f"../{self.ids[low]}/d0.qcow2"
        top = place / "vm0" / self.ids[2] / "d0.qcow2"
        options = ["-d"] if low == 1 else ["-b", base]
        return command("qemu-img", "commit", "-q", "-f", "qcow2", *options, top)[0]

    def commit(self, data: Path) -> float:
        """``data``, which is only read, into an empty base."""
        place = fresh(self.home / "commit")
        images.create(place / "base.qcow2", 2 * self.amount)
        os.link(data, place / "top.qcow2")
        os.sync()
        return command("qemu-img", "commit", "-q", "-d", "-f", "qcow2", place / "top.qcow2")[0]


def _onto_nothing(bench: Bench, backups: _Backups) -> Group:
    amount = backups.amount
    data = make_disk(backups.home / "data.qcow2", 2 * amount, amount, 5)
    images.run_tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", data)
    title = f"merge of a full of {amount // MIB} MiB and an increment into the next one"
    group = Group(title, COMMIT, amount)
    small = "qemu-img commit of the two increments into the full itself"
    contenders = [
        Contender(COMMIT, lambda: backups.commit(data)),
        Contender(small, lambda: backups.in_place(0)),
        Contender(HAND, lambda: backups.by_hand(0)),
        Contender(OURS, lambda: backups.prune(1)),
        Contender(f"{OURS} verify=false", lambda: backups.prune(1, verify=False)),
    ]
    group.copies_nothing = (small,)
    measure(group, contenders, bench.rounds(3), bench.report)
    group.notes.append("the module reads back, compares and hashes what it wrote; verify: also what it reads")
    data.unlink()
    return group


def _onto_full(bench: Bench, backups: _Backups) -> Group:
    title = f"merge of an increment of {backups.amount // 8 // MIB} MiB into the next one, above a full that is kept"
    reference = "qemu-img commit into the older increment itself"
    group = Group(title, reference)
    keep: dict[str, Any] = {"protect": [backups.ids[0]]}
    contenders = [
        Contender(reference, lambda: backups.in_place(1)),
        Contender(HAND, lambda: backups.by_hand(1)),
        Contender(OURS, lambda: backups.prune(2, **keep)),
        Contender(f"{OURS} verify=false", lambda: backups.prune(2, verify=False, **keep)),
    ]
    return measure(group, contenders, bench.rounds(3), bench.report)


# -- the plan ----------------------------------------------------------------------------------------------------------

_PLAN, _PLAN_MERGE, _EMPTY = "backup_prune, check mode", "the same with merge=true", "backup_prune of 1 backup"


def _plans(bench: Bench, home: Path) -> Group:
    count = 200 if bench.quick else 10_000
    many, one = _many(home / "many", count), fabricate(home / "one", points=1).path
    group = Group(f"plan of {count} backups, hourly, a full every 100", _EMPTY)

    def plan(repository: Path, number: int, **options: Any) -> float:
        params = {"repository": str(repository), **_RULES, **options}
        begin = time.monotonic()
        answer = run_module("backup_prune", params, check=True, timeout=600).ok().data["vms"][0]
        seconds = time.monotonic() - begin
        if len(answer["backups"]) != number:
            raise ToolFailed(f"{len(answer['backups'])} backups were planned instead of {number}")
        return seconds

    contenders = [
        Contender(_EMPTY, lambda: plan(one, 1)),
        Contender(_PLAN, lambda: plan(many, count)),
        Contender(_PLAN_MERGE, lambda: plan(many, count, merge=True), rounds=1),
    ]
    return measure(group, contenders, bench.rounds(5), bench.report)


def _many(path: Path, count: int) -> Path:
    """Manifests and headers that fit; the fulls are other names of one image, and the increments are empty."""
    made = fabricate(path, points=1)
    first = datetime.now(timezone.utc) - timedelta(hours=count)
    increment = _increment(made)
    for number in range(count):
        moment = first + timedelta(hours=number)
        manifest, when = made.manifest(0), f"{moment:%Y-%m-%dT%H:%M:%S}.000000Z"
        manifest.update(sequence=number + 1, point=when, started=when, finished=when)
        if number:
            made.ids.append(f"{moment:%Y%m%dT%H%M%SZ}-{number:08x}")
            manifest["id"] = made.ids[number]
            (made.directory / made.ids[number]).mkdir()
        if number % 100:
            parent = made.ids[number - 1]
            manifest.update(level="incremental", sync="bitmap")
            manifest["drives"][0].update(level="incremental", parent=parent, size=len(increment))
            _write_sparsely(made.image(number), increment.replace(made.ids[0].encode(), parent.encode()))
        elif number:
            os.link(made.image(0), made.image(number))
        made.manifest_path(number).write_text(json.dumps(manifest))
    return path


def _increment(made: Fabricated) -> bytes:
    """An empty image above backup 0; all ids are of one length, so any other can take its place in the header."""
    image = made.directory / made.ids[0] / "increment.qcow2"
    images.create(image, backing=f"../{made.ids[0]}/disk0.qcow2")
    content = image.read_bytes()
    image.unlink()
    return content


def _write_sparsely(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.truncate(len(content))
        for position in range(0, len(content), 4096):
            block = content[position : position + 4096]
            if block.strip(b"\0"):
                stream.seek(position)
                stream.write(block)
