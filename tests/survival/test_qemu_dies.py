# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU ends before, during and after the jobs, by SIGKILL or in good order. No operator is needed afterwards."""

from __future__ import annotations

import time

import pytest

from support.backup import Bench
from support.killer import Trap

SLOW = 64 * 1024
FORGETTING = 3  # the first two job-dismiss belong to the targets' blockdev-create


def reasons(bench: Bench) -> set[str]:
    """Why the drives of the newest backup got a full."""
    return {str(drive["reason"]) for drive in bench.newest()["drives"]}


def power_cut(bench: Bench) -> None:
    """SIGKILL; what the guest had flushed is on the disk."""
    bench.vm.flush()
    bench.vm.kill9()


def expect_healed(bench: Bench, level: str, why: str | None = None) -> None:
    """Without further ado the next backup is made (``level``), the one after it is incremental, all are exact."""
    bench.vm.start()
    bench.change()
    bench.backup().ok()
    assert set(bench.levels().values()) == {level}
    if why is not None:
        assert all(why in reason for reason in reasons(bench)), reasons(bench)
    bench.no_leftovers()
    bench.change()
    bench.backup().ok()
    assert set(bench.levels().values()) == {"incremental"}
    bench.no_leftovers()
    bench.expect_restorable()
    bench.expect_live()


def test_killed_in_its_first_life_the_bitmap_is_absent(bench: Bench) -> None:
    bench.backup().ok()
    bench.change()
    power_cut(bench)
    expect_healed(bench, "full", "there is no bitmap of backup")


def test_killed_in_a_later_life_the_bitmap_is_inconsistent(bench: Bench) -> None:
    bench.backup().ok()
    bench.vm.restart()
    bench.change()
    power_cut(bench)
    expect_healed(bench, "full", "is inconsistent")


def test_one_drive_without_its_bitmap_does_not_cost_the_other_its_increment(bench: Bench) -> None:
    bench.backup().ok()
    node = bench.vm.active_node("d1")
    bench.vm.command("block-dirty-bitmap-remove", node=node, name=next(iter(bench.vm.bitmaps("d1"))))
    bench.change()
    bench.backup().ok()
    assert bench.levels() == {"d0": "incremental", "d1": "full"}
    bench.no_leftovers()
    bench.expect_restorable()
    bench.expect_live()


def test_a_lost_bitmap_can_be_made_an_error(bench: Bench) -> None:
    bench.backup().ok()
    bench.vm.kill9()
    bench.vm.start()
    before = bench.state()["tree"]
    result = bench.backup(on_lost_bitmap="fail")
    assert result.failed
    assert result.data["vms"][0]["error"]["kind"] == "BitmapLost"
    assert {path for path in before if "lock" not in path} == {
        path for path in bench.state()["tree"] if "lock" not in path
    }
    assert [job["id"] for job in bench.vm.jobs()] == []


@pytest.mark.parametrize("level", ["auto", "full"])
@pytest.mark.parametrize(
    "where", ["qmp blockdev-create", "qmp transaction", "after qmp transaction", "qmp blockdev-del"]
)
def test_killed_during_a_backup(bench: Bench, where: str, level: str) -> None:
    bench.backup().ok()
    bench.change()
    bench.vm.flush()
    with bench.stopped(where, level=level) as running:
        bench.vm.kill9()
    began = time.monotonic()
    result = running.finish()
    assert time.monotonic() - began < 10
    assert result.data["vms"][0]["error"]["kind"] == "VmGone", result
    assert bench.entries() == sorted([*bench.ids(), "lock"])
    expect_healed(bench, "full", "there is no bitmap of backup")


@pytest.mark.parametrize(
    ("where", "nth"), [("file fsync in seal", 1), ("file rename in publish", 1), ("qmp job-dismiss", FORGETTING)]
)
def test_killed_when_the_copy_is_safe_the_backup_is_published(bench: Bench, where: str, nth: int) -> None:
    bench.backup().ok()
    bench.change()
    bench.vm.flush()
    with bench.stopped(where, nth) as running:
        bench.note()
        bench.vm.kill9()
    running.finish().ok()
    bench.note()
    assert len(bench.ids()) == 2
    expect_healed(bench, "full", "there is no bitmap of backup")


@pytest.mark.parametrize("where", ["qmp blockdev-create", "qmp transaction", "after qmp transaction"])
def test_quits_during_a_backup(bench: Bench, where: str) -> None:
    """A guest that shuts down in mid-backup keeps its tracking: the next backup is an increment."""
    bench.backup().ok()
    for drive in bench.truth:
        bench.write(drive, 0, 32)
    with bench.stopped(where, bandwidth=SLOW) as running:
        bench.vm.quit()
    began = time.monotonic()
    result = running.finish()
    assert time.monotonic() - began < 10
    assert result.data["vms"][0]["error"]["kind"] == "VmGone", result
    assert bench.entries() == sorted([*bench.ids(), "lock"])
    expect_healed(bench, "incremental")


def test_quits_while_the_module_waits(bench: Bench) -> None:
    """The same while the module listens: QEMU says that the job was cancelled before it closes the connection."""
    bench.backup().ok()
    for drive in bench.truth:
        bench.write(drive, 0, 32)
    running = bench.start(bandwidth=SLOW)
    # (not while blockdev-create runs: QEMU 7.2 hangs or aborts when it is told to quit in that millisecond)
    while not any(job["type"] == "backup" and job["status"] == "running" for job in bench.vm.jobs()):
        assert running.process.poll() is None
    bench.vm.quit()
    result = running.finish(30)
    assert result.data["vms"][0]["error"]["kind"] == "VmGone", result
    assert bench.entries() == sorted([*bench.ids(), "lock"])
    expect_healed(bench, "incremental")


def test_module_and_qemu_are_both_killed(bench: Bench) -> None:
    bench.backup().ok()
    bench.change()
    bench.vm.flush()
    bench.backup(Trap(label="after qmp transaction"), bandwidth=SLOW)
    bench.vm.kill9()
    expect_healed(bench, "full", "there is no bitmap of backup")


def test_module_killed_and_vm_restarted(bench: Bench) -> None:
    """The jobs are gone, the bitmaps were kept: the unfinished backup is dropped, the next is an increment."""
    bench.backup().ok()
    bench.change()
    bench.backup(Trap(label="after qmp transaction"), bandwidth=SLOW)
    bench.vm.quit()
    expect_healed(bench, "incremental")
