# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""kill -9 of qmp_snapshot at every step, then the same task again: the guest's data is whole, and nothing is left.

``BLOCKOPS_SLOW=1`` kills at every boundary; without, at every few, beginning elsewhere for each scenario.
"""

from __future__ import annotations

import signal
import typing as t
from pathlib import Path

import pytest

from support.killer import Trap
from support.snapshot_tasks import (
    PREDICTED,
    REVERT,
    SCENARIOS,
    SLOW,
    BenchFactory,
    finish_task,
    guest_goes_on,
    kept,
    kill,
    snapshots,
    steps_of,
)

__all__ = ["snapshots"]


@pytest.mark.parametrize("defined", [False, True], ids=["", "definition"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_at_any_step_loses_nothing(snapshots: BenchFactory, workdir: Path, name: str, defined: bool) -> None:
    bench, scenario = snapshots(defined=defined), SCENARIOS[name]
    steps = steps_of(bench, scenario, workdir / "steps")
    for number in range(list(SCENARIOS).index(name) % scenario.stride, len(steps), 1 if SLOW else scenario.stride):
        context = f"killed before {steps[number]} ({number})"
        print(context)
        scenario.prepare(bench)
        kill(bench, Trap(number=number), **scenario.task)
        guest_goes_on(bench, scenario)
        finish_task(bench, scenario, context)
        if not scenario.reverts:
            assert not bench.one(**scenario.task)["changed"], context
        bench.change()
        bench.expect(*scenario.after, kept=kept(bench, scenario))
    bench.finish()


@pytest.mark.parametrize("name", ["present", "absent-active", "absent-stream", "reverted-keep"])
def test_a_kill_of_the_run_that_recovers_loses_nothing(snapshots: BenchFactory, workdir: Path, name: str) -> None:
    bench, scenario = snapshots(), SCENARIOS[name]
    first = {
        "present": "qmp transaction",
        "absent-active": "after qmp job-complete",
        "absent-stream": "after qmp block-stream",
        "reverted-keep": "after qmp stop",
    }[name]
    scenario.prepare(bench)
    kill(bench, Trap(label=first), **scenario.task)
    log = workdir / "steps"
    bench.run(Trap(log=str(log)), **scenario.task).ok()
    if scenario.reverts:
        bench.settle(bench.points["s1"])
    steps = log.read_text().splitlines()
    for number in range(0, len(steps), 1 if SLOW else 8):
        context = f"killed at {first}, then before {steps[number]} ({number})"
        print(context)
        scenario.prepare(bench)
        kill(bench, Trap(label=first), **scenario.task)
        bench.run(Trap(number=number), **scenario.task)  # one that ended before is as good
        guest_goes_on(bench, scenario)
        finish_task(bench, scenario, context)
    bench.finish()


# Where a revert leaves the guest stopped, what the next task is, and the error it may end with.
OTHERS = [
    ("present", "qmp transaction", {"state": "absent"}, None),
    ("present", "after qmp transaction", {"state": "absent"}, None),
    ("present", "qmp transaction", {"name": "s2", "state": "present"}, None),
    ("absent-active", "qmp job-complete", {"name": "s2", "state": "present"}, "JobsRunning"),
    ("absent-active", "after qmp job-complete", {"state": "present"}, "SnapshotIncomplete"),
    ("absent-active", "qmp job-complete", {**REVERT}, "JobsRunning"),
    ("reverted-keep", "after qmp stop", {"name": "s2", "state": "present"}, None),
    ("reverted-keep", "after qmp stop", {"name": "s2", "state": "absent"}, None),
    ("reverted-keep", "after qmp qom-set", {"name": "s2", "state": "present"}, "RevertInterrupted"),
    ("reverted-keep", "qmp system_reset", {"state": "absent"}, "RevertInterrupted"),
    ("reverted-keep", "after qmp cont", {"name": "s2", "state": "present"}, None),
]


@pytest.mark.parametrize(("name", "label", "other", "error"), OTHERS)
def test_another_task_after_a_kill(
    snapshots: BenchFactory, name: str, label: str, other: dict[str, t.Any], error: str | None
) -> None:
    """A right result, or an error that says what is so; never a guest that stands still without a word."""
    bench, scenario = snapshots(), SCENARIOS[name]
    task = {**scenario.task, "state": "present", **other}
    scenario.prepare(bench)
    kill(bench, Trap(label=label), **scenario.task)
    guest_goes_on(bench, scenario)
    predicted = bench.predicted(**task)
    done = bench.run(**task).data["vms"][0]
    assert done.get("error", {}).get("kind") == predicted.get("error", {}).get("kind"), (predicted, done)
    # The commit may have become a finished one by itself.
    assert done.get("error", {}).get("kind") in (error, None), done
    if "error" not in done:
        assert [done[key] for key in PREDICTED] == [predicted[key] for key in PREDICTED]
        assert bench.status == "running"
    elif bench.status != "running":
        assert "paused" in done["error"]["message"]
    guest_goes_on(bench, scenario)
    if error is not None:
        bench.one(**scenario.task)  # what the error advises
    assert bench.status == "running"
    bench.settle(*([bench.points["s1"]] if scenario.reverts and error is not None else [bench.truth]))
    bench.change()
    bench.finish()


@pytest.mark.parametrize("name", ["present", "absent-active", "reverted-keep"])
def test_two_tasks_at_once_on_two_monitors(snapshots: BenchFactory, name: str) -> None:
    """One works, the other one is told so, and touches nothing."""
    bench, scenario = snapshots(), SCENARIOS[name]
    scenario.prepare(bench)
    label = {"present": "qmp transaction", "absent": "qmp job-complete", "reverted": "qmp qom-set"}
    with bench.stopped(Trap(label=label[scenario.task["state"]], sends=signal.SIGSTOP), **scenario.task) as running:
        bench.vm.detach()
        other = bench.run(monitor=bench.vm.control_socket, **scenario.task)
        assert other.data["vms"][0]["error"]["kind"] == "VmClaimed", other
    running.finish().ok()
    if scenario.reverts:
        bench.settle(bench.points["s1"])
    bench.expect(*scenario.after, kept=kept(bench, scenario))
    bench.change()
    bench.finish()


@pytest.mark.parametrize("sends", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("name", "label"),
    [("present", "after qmp blockdev-add"), ("absent-active", "qmp job-complete"), ("reverted-keep", "after qmp stop")],
)
def test_a_task_that_is_told_to_end(snapshots: BenchFactory, name: str, label: str, sends: int) -> None:
    bench, scenario = snapshots(), SCENARIOS[name]
    scenario.prepare(bench)
    bench.run(Trap(label=label, sends=sends), **scenario.task)
    guest_goes_on(bench, scenario)
    finish_task(bench, scenario, f"{sends} at {label}")
    bench.finish()
