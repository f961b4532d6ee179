# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pruning between the backups of a running VM: its bitmaps are named after backups, and increments go on."""

from __future__ import annotations

import typing as t

import pytest

from support.backup import Bench, BenchFactory
from support.forked import run_forked
from support.killer import Trap
from support.module import Result


def prune(bench: Bench, **rules: t.Any) -> Result:
    result = run_forked("backup_prune", {"repository": str(bench.repository), **rules}, None).ok()
    bench.published = bench.ids()
    return result


def clean(bench: Bench) -> None:
    """Nothing of ours is left but bitmaps of backups that are there; that of the newest is."""
    assert not bench.vm.jobs()
    assert not [node for node in bench.vm.node_names() if node.startswith("bo-")]
    for drive in bench.truth:
        names = {name.rsplit("-", 2)[-2] + "-" + name.rsplit("-", 1)[-1] for name in bench.vm.bitmaps(drive)}
        assert bench.newest()["id"] in names
        assert names <= bench.ids()
    bench.tidy()


@pytest.mark.parametrize("keep", [1, 3])
def test_increments_go_on_after_a_merge(bench: Bench, keep: int) -> None:
    for _number in range(5):
        bench.change()
        bench.backup().ok()
    before = bench.ids()
    for _round in range(2):
        prune(bench, keep_last=keep, merge=True)
        assert len(bench.ids()) == keep
        bench.expect_restorable()
        bench.change()
        bench.backup().ok()
        assert set(bench.levels().values()) == {"incremental"}
        clean(bench)
    assert bench.ids() - before
    bench.expect_restorable()
    bench.expect_live()


def test_a_differential_after_a_merge_says_why_it_is_a_full(bench_factory: BenchFactory) -> None:
    """The full is merged into an increment, and no bitmap is named after that one."""
    bench = bench_factory(1)
    for _number in range(3):
        bench.change()
        bench.backup().ok()
    prune(bench, keep_last=2, merge=True)
    bench.change()
    done = bench.backup(level="differential").ok().data["vms"][0]
    assert done["status"] == "published"
    assert set(bench.levels().values()) == {"full"}
    assert done["drives"][0]["reason"]
    clean(bench)
    bench.change()
    bench.backup().ok()
    assert bench.levels() == {"d0": "incremental"}
    bench.expect_restorable()
    bench.expect_live()


def test_everything_but_the_newest_goes_after_fulls(bench_factory: BenchFactory) -> None:
    bench = bench_factory(1)
    for level in ("full", "auto", "full", "auto"):
        bench.change()
        bench.backup(level=level).ok()
    prune(bench, keep_last=2)
    assert len(bench.ids()) == 2
    bench.change()
    bench.backup().ok()
    assert bench.levels() == {"d0": "incremental"}
    bench.expect_restorable()
    bench.expect_live()


def test_a_backup_in_the_making_keeps_what_it_builds_on(bench_factory: BenchFactory) -> None:
    """The module died while the job runs in QEMU: the lock is free, and its parent is needed."""
    bench = bench_factory(1)
    for _number in range(2):
        bench.change()
        bench.backup().ok()
    bench.write("d0", 0, 32)
    bench.backup(Trap(label="after qmp transaction"), bandwidth=64 * 1024)
    prune(bench, keep_last=1, merge=True, keep_newest=False)
    known = bench.ids()
    bench.backup().ok()
    assert known < bench.ids()
    bench.no_leftovers()
    bench.expect_restorable()
    bench.expect_live()
