# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A full backup of one big disk."""

from __future__ import annotations

from contextlib import ExitStack

from bench.case import Bench, Outcome
from bench.goals import Goal
from bench.libvirtd import libvirt
from bench.machines import GIB, MIB, Machine, machine
from bench.measure import Contender, Group, measure
from bench.tools import Bare, Module, convert

OURS, PLAIN = "qmp_drive_backup", "qmp_drive_backup verify=false"
CONVERT = "qemu-img convert -W -m 16 -t none"
PROVED = "the same, then qemu-img check and sha256sum"
TUNED = "bare QMP script, direct target"
PEER = "qmpbackup full"


def run(bench: Bench) -> Outcome:
    size, data = (GIB // 2, GIB // 4) if bench.quick else (4 * GIB, 2 * GIB)
    group = Group(f"full: {size // MIB} MiB qcow2, {data // MIB} MiB of random data", CONVERT, data)
    home = bench.directory / "full"
    home.mkdir()
    with ExitStack() as stack:
        vm = stack.enter_context(machine(home, size, data))
        contenders = _contenders(bench, vm)
        if bench.has_libvirt():
            session = stack.enter_context(libvirt(home / "libvirt", size, data))
            contenders.append(Contender("libvirt: virsh backup-begin", session.push, rounds=3))
            contenders.append(Contender("virtnbdbackup full", lambda: session.nbdbackup("full"), rounds=2))
        measure(group, contenders, bench.rounds(4), bench.report)
    group.notes.append("ratio: to qemu-img convert, which needs the VM off and records nothing")
    group.notes.append("verify=true reads the whole image back (SHA-256) and runs qemu-img check")
    return Outcome([group], [] if bench.quick else _goals(group))


def _contenders(bench: Bench, vm: Machine) -> list[Contender]:
    home = bench.directory / "full"
    verified, plain = Module(home / "verified"), Module(home / "plain", {"verify": False})
    default, tuned = Bare(home / "default", direct=False), Bare(home / "tuned")
    found = [
        Contender(CONVERT, lambda: convert(vm, home / "converted.qcow2")),
        Contender(PROVED, lambda: convert(vm, home / "converted.qcow2", proved=True)),
        Contender(OURS, lambda: verified.full([vm])),
        Contender(PLAIN, lambda: plain.full([vm])),
        Contender(TUNED, lambda: tuned.full([vm])),
        Contender("bare QMP script, QEMU's defaults", lambda: default.full([vm])),
    ]
    peer = bench.qmpbackup("full/qmpbackup")
    if peer is not None:
        found.append(Contender(PEER, lambda: peer.full([vm])))
    return found


def _goals(group: Group) -> list[Goal]:
    """The goals hold for the default as well, although convert and qmpbackup do not read back what they wrote."""
    goals = []
    for name in (PLAIN, OURS):
        goals.append(Goal(f"full, {name}: times the time of convert", group.ratio(name), 1.5))
        if PEER in group.samples:
            goals.append(Goal(f"full, {name}: times as fast as qmpbackup", 1 / group.ratio(name, PEER), 2, least=True))
    goals.append(Goal(f"full, {OURS}: times the time of convert, check and sha256sum", group.ratio(OURS, PROVED), 1.5))
    return goals
