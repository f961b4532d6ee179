# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU ends by SIGKILL at any step of qmp_snapshot, with the module or without it, and is started from its definition.

What the guest had flushed is there again, the drives are of one moment, and the same task ends where it was to end.
"""

from __future__ import annotations

import signal
import typing as t
from pathlib import Path

import pytest

from support.backup import Truth
from support.killer import Trap
from support.snapshot_tasks import (
    SCENARIOS,
    SLOW,
    BenchFactory,
    Scenario,
    finish_task,
    kept,
    kill,
    snapshots,
    steps_of,
)
from support.snapshots import SnapshotBench

__all__ = ["snapshots"]

NAMES = ("present", "absent-active", "absent-middle", "absent-stream", "reverted-keep", "reverted-delete")
STRIDE = 1 if SLOW else 9


def after_power_cut(bench: SnapshotBench, scenario: Scenario, context: str) -> None:
    """Start from the definition: the guest sees one moment, and the same task ends where it was to end."""
    truth: list[Truth] = [dict(bench.truth)]
    if scenario.reverts:
        truth.append(bench.points["s1"])
    bench.vm.start()
    bench.settle(*truth)
    bench.change()
    finish_task(bench, scenario, context, power_cut=True)
    bench.change()
    bench.expect(*scenario.after, kept=kept(bench, scenario))
    for drive in bench.bases:
        assert bench.chain(drive)[-1] == bench.bases[drive]


@pytest.mark.parametrize("name", NAMES)
def test_module_and_qemu_are_both_killed(snapshots: BenchFactory, workdir: Path, name: str) -> None:
    bench, scenario = snapshots(defined=True), SCENARIOS[name]
    steps = steps_of(bench, scenario, workdir / "steps")
    for number in range(NAMES.index(name) % STRIDE, len(steps), STRIDE):
        context = f"killed before {steps[number]} ({number})"
        print(context)
        scenario.prepare(bench)
        bench.flush()
        kill(bench, Trap(number=number), **scenario.task)
        bench.vm.kill9()
        after_power_cut(bench, scenario, context)
    bench.finish()


@pytest.mark.parametrize("name", NAMES)
def test_qemu_is_killed_and_the_module_tells(snapshots: BenchFactory, workdir: Path, name: str) -> None:
    bench, scenario = snapshots(defined=True), SCENARIOS[name]
    steps = steps_of(bench, scenario, workdir / "steps")
    for number in range(NAMES.index(name) % STRIDE, len(steps), 1 if SLOW else 2 * STRIDE):
        context = f"QEMU killed before {steps[number]} ({number})"
        print(context)
        scenario.prepare(bench)
        bench.flush()
        with bench.stopped(Trap(number=number, sends=signal.SIGSTOP), **scenario.task) as running:
            bench.vm.kill9()
        result = running.finish()
        answer: dict[str, t.Any] = result.data["vms"][0]
        if result.failed:
            assert answer["error"]["kind"] == "VmGone", f"{context}: {answer}"
        after_power_cut(bench, scenario, context)
    bench.finish()
