# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tasks of qmp_snapshot to be killed, and what has to be so after a kill and after the same task ran again."""

from __future__ import annotations

import os
import signal
import typing as t
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.killer import Trap
from support.snapshots import SnapshotBench

SLOW = bool(os.environ.get("BLOCKOPS_SLOW"))
PREDICTED = ("changed", "status", "drives", "deleted", "kept", "recovered", "boot_drift")


class BenchFactory(t.Protocol):
    def __call__(self, **options: t.Any) -> SnapshotBench: ...


@pytest.fixture
def snapshots(workdir: Path) -> Iterator[BenchFactory]:
    with ExitStack() as stack:

        def make(**options: t.Any) -> SnapshotBench:
            bench = SnapshotBench(workdir, **options)
            stack.callback(bench.vm.close)
            return bench

        yield make


@dataclass(frozen=True)
class Scenario:
    """A task to kill. ``before``: snapshots that are there, oldest first; ``after``: those when it has been done."""

    task: dict[str, t.Any]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    stride: int = 8
    extra: dict[str, t.Any] = field(default_factory=dict)

    @property
    def reverts(self) -> bool:
        return bool(self.task["state"] == "reverted")

    def prepare(self, bench: SnapshotBench) -> None:
        """From any earlier round to where this task begins."""
        bench.sweep()
        for name in reversed(bench.names()):
            bench.one(name=name, state="absent", merge="commit")
        bench.points.clear()
        for name in self.before:
            bench.change()
            bench.take(name)
        bench.change()
        if self.task["state"] == "present":
            bench.points[self.task["name"]] = dict(bench.truth)


REVERT = {"name": "s1", "state": "reverted", "allow_reset": True}
SCENARIOS = {
    "present": Scenario({"name": "s1", "state": "present"}, (), ("s1",)),
    "present-second": Scenario({"name": "s2", "state": "present"}, ("s1",), ("s1", "s2"), stride=13),
    "absent-active": Scenario({"name": "s1", "state": "absent", "merge": "commit"}, ("s1",), ()),
    "absent-middle": Scenario({"name": "s1", "state": "absent", "merge": "commit"}, ("s1", "s2"), ("s2",)),
    "absent-stream": Scenario({"name": "s2", "state": "absent", "merge": "stream"}, ("s1", "s2"), ("s1",)),
    "reverted-keep": Scenario({**REVERT, "discarded": "keep"}, ("s1",), ("s1",)),
    "reverted-delete": Scenario({**REVERT, "discarded": "delete"}, ("s1",), ("s1",)),
    "reverted-deep": Scenario({**REVERT, "discarded": "delete"}, ("s1", "s2"), ("s1",), stride=13),
}


def steps_of(bench: SnapshotBench, scenario: Scenario, log: Path) -> list[str]:
    """The boundaries of a run that is not disturbed: the second one, for which copies of the definition are there."""
    for _round in range(2):
        scenario.prepare(bench)
        log.unlink(missing_ok=True)
        bench.run(Trap(log=str(log)), **scenario.task).ok()
        if scenario.reverts:
            bench.settle(bench.points[scenario.task["name"]])
    return log.read_text().splitlines()


def kill(bench: SnapshotBench, trap: Trap, **task: t.Any) -> None:
    """Run into the trap. (A run with less to do than the one whose steps were counted may come to its end.)"""
    result = bench.run(trap, **task)
    assert result.rc == -signal.SIGKILL or (trap.number is not None and not result.failed), f"{trap}: {result}"


def guest_goes_on(bench: SnapshotBench, scenario: Scenario) -> None:
    """After a kill: what the guest reads is of one moment, and it writes on, unless it was stopped."""
    if bench.status == "running":
        candidates = [bench.truth]
        if scenario.reverts:
            candidates.append(bench.points[scenario.task["name"]])
        bench.settle(*candidates)
        bench.change()
    else:
        assert scenario.reverts
        point = bench.points[scenario.task["name"]]
        assert all(bench.sees(drive, bench.truth) or bench.sees(drive, point) for drive in bench.bases)


def finish_task(bench: SnapshotBench, scenario: Scenario, context: str, *, power_cut: bool = False) -> dict[str, t.Any]:
    """The same task again does what check mode said, and ends where the task was to end.

    After a ``power_cut`` nothing may tell that an overlay was merged: it stays then, and the run says so.
    """
    predicted = bench.predicted(**scenario.task)
    assert "error" not in predicted, f"{context}: {predicted}"
    before = dict(bench.truth)
    if scenario.task["state"] == "present" and predicted["status"] == "taken":
        bench.points[scenario.task["name"]] = before  # the killed run had not come to its point
    result = bench.run(**scenario.task).ok()
    done: dict[str, t.Any] = result.data["vms"][0]
    if power_cut and scenario.task["state"] == "absent":
        for orphan in bench.orphans():
            assert any(f"{orphan} " in warning and "not in use" in warning for warning in result.warnings), context
        bench.sweep()
    for key in PREDICTED:
        assert done[key] == predicted[key], f"{context}: check mode: {key} {predicted[key]}; the run: {done[key]}"
    written = [entry["path"] for entry in done["definition"]]
    assert written == [entry["path"] for entry in predicted["definition"]], context
    if scenario.reverts:
        bench.settle(bench.points[scenario.task["name"]], before)
    bench.expect(*scenario.after, kept=kept(bench, scenario))
    if bench.defined:
        bench.expect_bootable()
    return done


def kept(bench: SnapshotBench, scenario: Scenario) -> list[str]:
    """The branches that reverts have kept aside, if they were to."""
    return bench.orphans() if scenario.task.get("discarded") == "keep" else []
