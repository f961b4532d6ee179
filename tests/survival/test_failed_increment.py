# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A failing or cancelled incremental, then a good one: it restores exactly (qmpbackup loses data there)."""

from __future__ import annotations

import typing as t

import pytest

from support.backup import Bench
from support.killer import Trap

RUNNING = "after qmp transaction"
SLOW = 64 * 1024


def first_job(bench: Bench) -> str:
    return str(bench.vm.jobs()[0]["id"])


def cancel_job(bench: Bench) -> None:
    bench.vm.command("job-cancel", id=first_job(bench))


def dismiss_job(bench: Bench) -> None:
    """Cancelled and dismissed: QEMU knows nothing of it any more."""
    job = first_job(bench)
    bench.vm.command("job-cancel", id=job)
    bench.vm.wait_event("JOB_STATUS_CHANGE", id=job, status="concluded")
    bench.vm.command("job-dismiss", id=job)


@pytest.fixture
def changed(bench: Bench) -> Bench:
    """A bench with a backup, and changes since on both drives that take a slow job half a minute."""
    bench.backup().ok()
    for drive in bench.truth:
        bench.write(drive, 0, 32)
    return bench


def expect_good_increment(bench: Bench) -> None:
    """The next backup, and the one after it, are incremental and exact."""
    for _time in range(2):
        bench.change()
        bench.backup().ok()
        assert bench.levels() == dict.fromkeys(bench.truth, "incremental")
        bench.no_leftovers()
    bench.expect_restorable()
    bench.expect_live()


@pytest.mark.parametrize(("harm", "kind"), [(cancel_job, "JobFailed"), (dismiss_job, "JobVanished")])
def test_a_job_ended_behind_our_back_costs_only_this_backup(
    changed: Bench, harm: t.Callable[[Bench], None], kind: str
) -> None:
    with changed.stopped(RUNNING, bandwidth=SLOW) as running:
        harm(changed)
    result = running.finish()
    assert result.failed
    assert result.data["vms"][0]["error"]["kind"] == kind
    assert len(changed.ids()) == 1
    changed.no_leftovers()
    expect_good_increment(changed)


@pytest.mark.parametrize("harm", [cancel_job, dismiss_job])
def test_a_job_ended_between_two_runs_is_unwound(changed: Bench, harm: t.Callable[[Bench], None]) -> None:
    changed.backup(wait=False, bandwidth=SLOW).ok()
    harm(changed)
    expect_good_increment(changed)


def test_a_cancelled_backup_keeps_the_changes(changed: Bench) -> None:
    changed.backup(wait=False, bandwidth=SLOW).ok()
    planned = changed.predicted(state="cancelled")
    done = changed.backup(state="cancelled").ok().data["vms"][0]
    assert (done["status"], done["changed"], done["recovered"]) == ("cancelled", True, planned["recovered"])
    changed.no_leftovers()
    again = changed.backup(state="cancelled").ok()
    assert (again.changed, again.data["vms"][0]["status"]) == (False, "unchanged")
    expect_good_increment(changed)


def test_a_module_that_is_terminated_keeps_the_changes(changed: Bench) -> None:
    """The story of pains.md X1: SIGTERM in mid-increment, the partial removed by hand, the next increment."""
    with changed.stopped(RUNNING, bandwidth=SLOW) as running:
        running.process.terminate()
    assert running.finish().failed
    changed.backup(state="cancelled").ok()
    assert changed.entries() == sorted([*changed.ids(), "lock"])
    expect_good_increment(changed)


@pytest.mark.parametrize("level", ["auto", "full"])
@pytest.mark.parametrize("failing", ["d0", "d1"])
def test_one_failing_target_publishes_neither(changed: Bench, failing: str, level: str) -> None:
    """X3: one drive's job fails while the other's succeeds; both keep their changes."""
    with changed.stopped("qmp transaction", level=level) as running:
        changed.break_target(int(failing[1:]))
    result = running.finish()
    assert result.failed
    error = result.data["vms"][0]["error"]
    assert (error["kind"], error["drive"]) == ("JobFailed", failing)
    assert len(changed.ids()) == 1
    changed.no_leftovers()
    expect_good_increment(changed)


def test_a_failed_first_backup_leaves_nothing(bench: Bench) -> None:
    with bench.stopped("after qmp transaction", bandwidth=SLOW) as running:
        cancel_job(bench)
    assert running.finish().failed
    assert bench.ids() == set()
    bench.no_leftovers()
    bench.backup().ok()
    expect_good_increment(bench)


def test_a_kill_and_a_failure_together(changed: Bench) -> None:
    """The run was killed, and by the time of the next its job has failed."""
    changed.backup(Trap(label=RUNNING), bandwidth=SLOW)
    cancel_job(changed)
    expect_good_increment(changed)
