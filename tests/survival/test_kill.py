# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""kill -9 of the module at every step of a backup, then run again: nothing lost, nothing left, the points exact.

``BLOCKOPS_SLOW=1`` kills the recovering run at every boundary as well; without, at every third.
"""

from __future__ import annotations

import os
import signal
import time
import typing as t
from pathlib import Path

import pytest

from support.backup import Bench, BenchFactory
from support.killer import Trap

CHUNKS = 4
STRIDE = 1 if os.environ.get("BLOCKOPS_SLOW") else 3
# Where the second of two kills finds the most to do.
UNFINISHED = ("after qmp transaction", "file fsync in seal", "file rename in publish", "qmp job-dismiss")


def boundaries(bench: Bench, log: Path, **options: t.Any) -> list[str]:
    """The steps of a run that is not disturbed."""
    bench.backup(Trap(log=str(log)), **options).ok()
    bench.no_leftovers()
    return log.read_text().splitlines()


def kill(bench: Bench, trap: Trap, **options: t.Any) -> None:
    result = bench.backup(trap, **options)
    assert result.rc == -signal.SIGKILL, f"{trap} was never reached: {result}"


def recover(bench: Bench, context: str, **options: t.Any) -> None:
    """Predict, run again, and see that the run did as predicted and that nothing is lost or left."""
    predicted = bench.predicted(**options)
    known = len(bench.ids())
    done = bench.backup(**options).ok().data["vms"][0]
    for key in ("changed", "recovered", "level"):
        assert done[key] == predicted[key], f"{context}: check mode said {predicted}, the run {done}"
    assert done.get("adopted", False) == predicted.get("adopted", False), context
    assert len(bench.ids()) > known or done["adopted"], context
    bench.no_leftovers()


@pytest.mark.parametrize(
    ("level", "first", "stride"),
    # a full differs from an incremental in nothing but the transaction
    [*(("auto", chunk, CHUNKS) for chunk in range(CHUNKS)), ("full", 0, 2 * STRIDE)],
)
def test_a_kill_at_any_step_loses_nothing(bench: Bench, workdir: Path, level: str, first: int, stride: int) -> None:
    bench.backup().ok()
    bench.change()
    steps = boundaries(bench, workdir / "steps", level=level)
    assert len(steps) > 50
    for number in range(first, len(steps), stride):
        bench.change()
        kill(bench, Trap(number=number), level=level)
        bench.change()
        recover(bench, f"killed before {steps[number]} ({number})", level=level)
        assert set(bench.levels().values()) == {"full" if level == "full" else "incremental"}, steps[number]
    bench.change()
    bench.backup().ok()
    assert set(bench.levels().values()) == {"incremental"}
    bench.no_leftovers()
    bench.expect_restorable()
    bench.expect_live()


@pytest.mark.parametrize("chunk", range(2))
def test_a_kill_during_the_very_first_backup_loses_nothing(bench: Bench, workdir: Path, chunk: int) -> None:
    bench.repository = workdir / "dry"
    steps = boundaries(bench, workdir / "steps")
    first = steps.index("qmp pass_file")  # from there on it is as with any other full
    for number in range(chunk, first, 2):
        bench.repository, bench.published = workdir / f"repository{number}", set()
        kill(bench, Trap(number=number))
        bench.change()
        recover(bench, f"killed before {steps[number]} ({number})")
        bench.points.clear()


@pytest.mark.parametrize("label", ["file unlink in _unlink_if_there", "file rename in publish"])
def test_a_backup_that_lacks_only_its_rename_is_published(bench_factory: BenchFactory, label: str) -> None:
    """Killed there in the first backup of all: the next one is planned, and made, on top of it."""
    bench = bench_factory(1)
    kill(bench, Trap(label=label))
    bench.change()
    recover(bench, label)
    assert (len(bench.ids()), bench.levels()) == (2, {"d0": "incremental"})
    bench.expect_restorable()


@pytest.mark.parametrize("label", UNFINISHED)
def test_a_kill_of_the_run_that_recovers_loses_nothing(bench: Bench, workdir: Path, label: str) -> None:
    bench.backup().ok()
    bench.change()
    kill(bench, Trap(label=label))
    bench.change()
    steps = boundaries(bench, workdir / "steps")
    for number in range(0, len(steps), 1 if STRIDE == 1 else 9):
        bench.change()
        kill(bench, Trap(label=label))
        bench.change()
        second = bench.backup(Trap(number=number))  # a run that ended before is as good
        bench.change()
        recover(bench, f"killed at {label}, then before {steps[number]} ({second.rc})")
    bench.expect_restorable()
    bench.expect_live()


@pytest.mark.parametrize("kills", [1, 2])
def test_a_running_job_is_adopted(bench: Bench, kills: int) -> None:
    """Killed while the jobs run slowly; the next run waits for them, at its own speed."""
    bench.backup().ok()
    for drive in bench.truth:
        bench.write(drive, 0, 32)
    for label in ("after qmp transaction", "after qmp block-job-set-speed")[:kills]:
        kill(bench, Trap(label=label), bandwidth=64 * 1024)
    jobs = [job["id"] for job in bench.vm.jobs()]
    assert len(jobs) == 2
    bench.change()  # after the point in time: not in the adopted backup
    began = time.monotonic()
    recover(bench, "job running")
    assert time.monotonic() - began < 20  # 64 s at the speed of the run that was killed
    assert len(bench.ids()) == 2
    bench.change()
    recover(bench, "and on")
    bench.expect_restorable()
    bench.expect_live()


def test_a_finished_backup_is_published_by_any_state(bench_factory: BenchFactory) -> None:
    bench = bench_factory(1)
    bench.backup().ok()
    bench.change()
    kill(bench, Trap(label="after qmp transaction"))
    bench.vm.wait_event("JOB_STATUS_CHANGE", status="concluded")
    bench.change()
    done = bench.backup(state="recovered").ok().data["vms"][0]
    assert (done["status"], done["adopted"], len(bench.ids())) == ("published", True, 2)
    bench.no_leftovers()
    bench.expect_restorable()
