# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Incrementals: beside other tools, with nothing changed, and against the size of the disk and of the change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from bench.case import Bench, Outcome
from bench.goals import Goal
from bench.libvirtd import Libvirt, libvirt
from bench.machines import GIB, MIB, Machine, machine, machines
from bench.measure import Contender, Group, measure
from bench.tools import Bare, Module, ToolFailed

OURS, BARE = "qmp_drive_backup", "bare QMP script"
CHANGE = 64 * MIB
_SEEDS = count(1000)


def run(bench: Bench) -> Outcome:
    size, change = (GIB // 2, CHANGE // 8) if bench.quick else (4 * GIB, CHANGE)
    home = bench.directory / "incremental"
    home.mkdir()
    title = f"incremental: {change // MIB} x 1 MiB changed at random places of {size // MIB} MiB"
    changed = Group(title, BARE, change)
    nothing = Group(f"incremental: nothing changed on {size // MIB} MiB", BARE)
    with ExitStack() as stack:
        vm = stack.enter_context(machine(home, size, size // 4))
        session = stack.enter_context(libvirt(home / "libvirt", size, size // 4)) if bench.has_libvirt() else None
        contenders = _contenders(bench, vm, home, session, change)
        measure(changed, contenders, bench.rounds(7), bench.report, lambda: _dirty(vm, session, change))
        measure(nothing, contenders, bench.rounds(5), bench.report)
    changed.notes.append("every tool has its own bitmap over the same writes; whole processes are timed")
    goals = [Goal(f"incremental: seconds over the bare script ({BARE})", changed.difference(OURS), 0.5, " s")]
    groups = [changed, nothing]
    if not bench.quick:
        groups += [_by_size(bench), _by_change(bench)]
    return Outcome(groups, [] if bench.quick else goals)


def _contenders(bench: Bench, vm: Machine, home: Path, session: Libvirt | None, change: int) -> list[Contender]:
    """Each has taken its full when this returns."""
    verified, plain, bare = Module(home / "verified"), Module(home / "plain", {"verify": False}), Bare(home / "bare")
    for module in (verified, plain):
        module.full([vm])
    bare.full([vm])
    found = [
        Contender(BARE, lambda: bare.incremental([vm])),
        Contender(OURS, lambda: verified.run([vm])),
        Contender(f"{OURS} verify=false", lambda: plain.run([vm])),
    ]
    peer = bench.qmpbackup("incremental/qmpbackup")
    if peer is not None:
        peer.full([vm])
        found.append(Contender("qmpbackup inc", lambda: peer.incremental([vm])))
    if session is not None:
        session.nbdbackup("full")
        found.append(Contender("virtnbdbackup inc", _checked(session, change), rounds=5))
    return found


def _checked(session: Libvirt, change: int) -> Callable[[], float]:
    """virtnbdbackup's first incremental must hold the change: the monitor does not tell whether it was written."""
    first = iter((True,))

    def increment() -> float:
        seconds = session.nbdbackup("inc")
        if next(first, False) and session.newest_increment() < change:
            raise ToolFailed("virtnbdbackup: the incremental is smaller than the change")
        return seconds

    return increment


def _dirty(vm: Machine, session: Libvirt | None, change: int) -> None:
    seed = next(_SEEDS)
    vm.dirty(change, seed)
    if session is not None:
        session.dirty(change, vm.size, seed)


def _by_size(bench: Bench) -> Group:
    """The same change on sparse disks of 1 to 64 GiB."""
    home = bench.directory / "sizes"
    home.mkdir()
    sizes = [1, 4, 16, 64]
    reference = f"{OURS}, {sizes[0]} GiB"
    group = Group(f"incremental: {CHANGE // MIB} MiB changed, by size of the (sparse) disk", reference, CHANGE)
    with machines(home, [size * GIB for size in sizes], 0) as made:
        contenders = []
        for number, vm in enumerate(made):
            module = Module(home / f"repository{number}")
            module.full([vm])
            contenders.append(Contender(f"{OURS}, {sizes[number]} GiB", _changing(module, vm, CHANGE)))
        return measure(group, contenders, bench.rounds(3), bench.report)


def _by_change(bench: Bench) -> Group:
    """Different changes of the same disk."""
    home = bench.directory / "changes"
    home.mkdir()
    changes = [1, 16, 64, 256]
    group = Group("incremental: 4 GiB disk, by amount of change", f"{OURS}, {changes[0]} MiB")
    with machine(home, 4 * GIB, 0) as vm:
        module = Module(home / "repository")
        module.full([vm])
        contenders = [Contender(f"{OURS}, {mib} MiB", _changing(module, vm, mib * MIB)) for mib in changes]
        return measure(group, contenders, bench.rounds(3), bench.report)


def _changing(module: Module, vm: Machine, change: int) -> Callable[[], float]:
    def change_and_back_up() -> float:
        vm.dirty(change, next(_SEEDS))
        return module.run([vm])

    return change_and_back_up
