# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""wait=false, job_timeout, state=recovered and cancelled, and check mode: what it says, and that it touches nothing."""

from __future__ import annotations

import typing as t

import pytest

from support.backup import Bench
from support.killer import Trap

SLOW = 64 * 1024


@pytest.fixture
def changed(bench: Bench) -> Bench:
    bench.backup().ok()
    for drive in bench.truth:
        bench.write(drive, 0, 32)
    return bench


def status(result: t.Any) -> tuple[str, bool]:
    vm = result.ok().data["vms"][0]
    return vm["status"], vm["changed"]


def test_a_backup_that_is_not_waited_for_is_adopted_later(changed: Bench) -> None:
    started = changed.backup(wait=False, bandwidth=SLOW).ok().data["vms"][0]
    assert (started["status"], len(started["jobs"]), len(changed.ids())) == ("running", 2, 1)
    changed.change()
    again = changed.backup(wait=False, bandwidth=SLOW).ok().data["vms"][0]
    assert (again["status"], again["changed"], again["backup"]) == ("running", False, started["backup"])
    assert changed.predicted()["backup"] == started["backup"]
    done = changed.backup().ok().data["vms"][0]
    assert (done["status"], done["adopted"], done["backup"]) == ("published", True, started["backup"])
    changed.no_leftovers()
    changed.expect_restorable()


def test_a_job_timeout_leaves_the_jobs_to_the_next_run(changed: Bench) -> None:
    result = changed.backup(job_timeout=0.3, bandwidth=SLOW)
    error = result.data["vms"][0]["error"]
    assert error["kind"] == "JobTimeout"
    assert 0 <= error["done"] < error["total"]
    assert len(changed.vm.jobs()) == 2
    changed.change()
    assert status(changed.backup()) == ("published", True)
    assert error["backup"] in changed.ids()
    changed.no_leftovers()
    changed.expect_restorable()
    changed.change()
    changed.backup().ok()
    assert set(changed.levels().values()) == {"incremental"}
    changed.expect_restorable()
    changed.expect_live()


@pytest.mark.parametrize("state", ["recovered", "cancelled"])
@pytest.mark.parametrize(
    "where",
    ["file fsync in begin", "qmp add-fd", "after qmp pass_file", "qmp transaction", "after qmp transaction",
     "after qmp blockdev-del", "file rename in publish", "after file rename in publish"],
)  # fmt: skip
def test_recovered_and_cancelled_clean_up_and_then_rest(changed: Bench, state: str, where: str) -> None:
    changed.backup(Trap(label=where))
    planned = changed.predicted(state=state)
    first = changed.backup(state=state).ok().data["vms"][0]
    assert planned["changed"] == first["changed"]
    assert (planned["status"] == "unchanged") == (first["status"] == "unchanged")
    changed.no_leftovers()
    tree = changed.state()
    assert status(changed.backup(state=state)) == ("unchanged", False)
    assert {key: value for key, value in tree.items() if key != "tree"} == {
        key: value for key, value in changed.state().items() if key != "tree"
    }
    changed.change()
    changed.backup().ok()
    assert set(changed.levels().values()) == {"incremental"}
    changed.expect_restorable()


def test_nothing_to_cancel_makes_no_repository(bench: Bench) -> None:
    for state in ("cancelled", "recovered"):
        assert status(bench.backup(state=state)) == ("unchanged", False)
    assert not bench.repository.exists()
    assert bench.predicted()["level"] == "full"
    assert not bench.repository.exists()


def test_a_young_backup_is_enough(changed: Bench) -> None:
    assert bench_plan(changed, max_age="1h") == ("unchanged", False)
    assert status(changed.backup(max_age="1h")) == ("unchanged", False)
    assert bench_plan(changed, max_age="0") == ("planned", True)
    assert status(changed.backup(max_age="0")) == ("published", True)


def bench_plan(bench: Bench, **options: t.Any) -> tuple[str, bool]:
    planned = bench.predicted(**options)
    return planned["status"], planned["changed"]
