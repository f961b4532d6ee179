# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fifty VMs with small disks on one host: one call of the module, or one task of a playbook, for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.case import Bench, Outcome
from bench.goals import Goal
from bench.machines import MIB, Machine, machines
from bench.measure import Contender, Group, measure
from bench.tools import Bare, Module, playbook

OURS, BARE, PLAY = "qmp_drive_backup, one call", "bare QMP script", "qmp_drive_backup, one ansible-playbook task"
PARALLEL = 8


def run(bench: Bench) -> Outcome:
    number, data = (4, 8 * MIB) if bench.quick else (50, 64 * MIB)
    home = bench.directory / "fleet"
    home.mkdir()
    fulls = Group(f"fleet: fulls of {number} VMs with {data // MIB} MiB each", BARE, number * data)
    incrementals = Group(f"fleet: incrementals of {number} VMs, 1 MiB changed on each", BARE)
    fulls.copies_nothing = (_EMPTY,)
    with machines(home, [2 * data] * number, data) as made:
        fleet = _Fleet(bench, made, home)
        measure(fulls, fleet.fulls(), bench.rounds(3), bench.report)
        measure(incrementals, fleet.incrementals(), bench.rounds(3), bench.report, fleet.dirty)
    for group in (fulls, incrementals):
        group.notes.append(f"{PARALLEL} VMs at a time; qmpbackup takes them one by one, as its command does")
        group.notes.append(f"the task: ansible-playbook from start to end; with one empty task it is '{_EMPTY}'")
    return Outcome([fulls, incrementals], [] if bench.quick else _goals(fulls, incrementals))


_EMPTY = "ansible-playbook, one ping"


def _goals(fulls: Group, incrementals: Group) -> list[Goal]:
    plain = f"{OURS} verify=false"
    return [
        Goal(f"fleet fulls, {plain}: times the bare script", fulls.ratio(plain), 1.5),
        Goal(f"fleet fulls, {OURS}: times the bare script", fulls.ratio(OURS), 1.5),
        Goal(f"fleet incrementals, {OURS}: seconds over the bare script", incrementals.difference(OURS), 1.0, " s"),
    ]


class _Fleet:
    """The tools, each with its own place."""

    def __init__(self, bench: Bench, made: Sequence[Machine], home: Path) -> None:
        self._made = made
        self._home = home
        options: dict[str, Any] = {"max_parallel": PARALLEL}
        self._module = Module(home / "verified", options)
        self._plain = Module(home / "plain", {**options, "verify": False})
        self._tasks = Module(home / "tasks", options)
        self._bare = Bare(home / "bare", parallel=PARALLEL)
        self._peer = bench.qmpbackup("fleet/qmpbackup")
        self._seed = 0

    def dirty(self) -> None:
        self._seed += 1
        for machine in self._made:
            machine.dirty(MIB, self._seed)

    def fulls(self) -> list[Contender]:
        found = [
            Contender(BARE, lambda: self._bare.full(self._made)),
            Contender(OURS, lambda: self._module.full(self._made)),
            Contender(f"{OURS} verify=false", lambda: self._plain.full(self._made)),
            Contender(PLAY, lambda: self._play("full")),
            Contender(_EMPTY, self._empty),
        ]
        peer = self._peer
        if peer is not None:
            found.append(Contender("qmpbackup full, one by one", lambda: peer.full(self._made), rounds=1))
        return found

    def incrementals(self) -> list[Contender]:
        found = [
            Contender(BARE, lambda: self._bare.incremental(self._made)),
            Contender(OURS, lambda: self._module.run(self._made)),
            Contender(f"{OURS} verify=false", lambda: self._plain.run(self._made)),
            Contender(PLAY, lambda: self._play("auto")),
            Contender(_EMPTY, self._empty),
        ]
        peer = self._peer
        if peer is not None:
            found.append(Contender("qmpbackup inc, one by one", lambda: peer.incremental(self._made), rounds=1))
        return found

    def _play(self, level: str) -> float:
        params = self._tasks.params(self._made, level)
        return playbook(self._home, [{"blockops.qemu.qmp_drive_backup": params}])

    def _empty(self) -> float:
        return playbook(self._home, [{"ansible.builtin.ping": {}}])
