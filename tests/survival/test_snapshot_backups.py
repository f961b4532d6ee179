# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Backups before, across and after external snapshots: every published point is what the guest saw, and increments
stay increments wherever the images allow it.
"""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.points import Drive, Point, Site, tracking
from support.shots import SIZE, UNIT, Shots, vm_of


class Both:
    """A VM with its snapshots and its backups."""

    def __init__(self, directory: Path, factory: QemuFactory, **options: t.Any) -> None:
        base = images.create(directory / "base.qcow2", SIZE)
        self.shots = Shots(factory("vm", [Drive("vda", base, **options)], paused=False), directory)
        self.site = Site(directory)

    def backup(self, *levels: str, **options: t.Any) -> Point:
        point = self.site.backup(self.shots.qemu, **options)
        assert point.levels["vda"] in (levels or ("incremental",)), point.reason("vda")
        if point.levels["vda"] == "full" and len(self.site.points) > 1:
            assert point.reason("vda") not in ("", "None")
        return point

    def end(self) -> None:
        """Two more increments, everything right, and nothing left."""
        for _time in range(2):
            self.shots.change()
            point = self.backup()
            assert point.drive("vda")["copied"] < 16 * UNIT
        self.site.check()
        self.shots.live()
        self.shots.off()


@pytest.fixture
def both(workdir: Path, qemu_factory: QemuFactory) -> Both:
    return Both(workdir, qemu_factory)


def test_present_write_backup_absent_write_backup(both: Both) -> None:
    shots = both.shots
    shots.change()
    both.backup("full")
    shots.change()
    data = shots.present("one")
    assert data["drives"][0]["bitmaps"] == sorted(tracking(shots.qemu, "vda"))
    shots.change()
    both.backup()
    shots.change()
    shots.absent("one")
    shots.change()
    both.backup("incremental")
    both.end()


@pytest.mark.parametrize("merge", ["commit", "stream"])
@pytest.mark.parametrize("backed_up", [False, True], ids=["before it", "on the overlay too"])
def test_backup_then_snapshot_dropped(both: Both, merge: str, backed_up: bool) -> None:
    shots = both.shots
    shots.write("vda", 20, 30)
    both.backup("full")
    shots.change()
    shots.present("one")
    shots.change()
    if backed_up:
        both.backup()
        shots.change()
    shots.absent("one", merge=merge)
    shots.change()
    both.backup("incremental")
    both.end()


@pytest.mark.parametrize("discarded", ["keep", "delete"])
@pytest.mark.parametrize("backed_up", [False, True], ids=["not on the overlay", "on the overlay"])
def test_gone_back_between_backups(both: Both, discarded: str, backed_up: bool) -> None:
    """A backup of the branch that was thrown away is followed by one that takes back what that had."""
    shots = both.shots
    shots.write("vda", 20, 30)
    both.backup("full")
    shots.change()
    shots.present("one")
    if backed_up:
        shots.write("vda", 90, 5)
        both.backup()
        shots.write("vda", 93, 5)
    shots.change()
    shots.reverted("one", discarded=discarded)
    shots.change()
    both.backup("incremental")
    shots.change()
    shots.reverted("one", discarded=discarded)
    shots.change()
    both.backup("incremental")
    if discarded == "delete":
        shots.absent("one")
        shots.change()
        both.backup("incremental")
    both.end()


def test_gone_back_to_before_the_full(both: Both) -> None:
    """The snapshot has no bitmap of a later backup, so the next one is a full. Merged into, it gets those there are."""
    shots = both.shots
    shots.write("vda", 20, 30)
    shots.present("one")
    shots.change()
    both.backup("full")
    shots.change()
    both.backup()
    shots.reverted("one", discarded="delete")
    both.backup("full")
    shots.change()
    both.backup()
    shots.absent("one")
    both.backup()
    both.end()


@pytest.mark.parametrize("between", [False, True], ids=["backups around", "a backup at each step"])
def test_middle_one_of_two_committed(both: Both, between: bool) -> None:
    """The bitmaps above count one image less, so the next one is an increment still."""
    shots = both.shots
    shots.write("vda", 20, 30)
    both.backup("full")
    shots.change()
    for name in ("one", "two"):
        shots.present(name)
        shots.change()
        if between:
            both.backup()
            shots.change()
    shots.absent("one", merge="commit")
    shots.change()
    both.backup("incremental")
    shots.change()
    shots.absent("two", merge="commit")
    shots.change()
    both.backup("incremental")
    both.end()


@pytest.mark.parametrize("merge", ["commit", "stream"])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_any_one_of_four_dropped(both: Both, merge: str, which: int) -> None:
    shots = both.shots
    shots.write("vda", 20, 30)
    both.backup("full")
    names = ["a", "b", "c", "d"]
    for name in names:
        shots.change()
        shots.present(name)
    shots.change()
    shots.absent(names[which], merge=merge)
    shots.change()
    both.backup("incremental")
    shots.change()
    for name in names[which + 1 :] + names[:which]:
        shots.absent(name, merge=merge)
        shots.change()
        both.backup("incremental")
    both.end()


def test_differentials_across_everything(both: Both) -> None:
    shots = both.shots
    shots.write("vda", 20, 30)
    full = both.backup("full")
    shots.present("one")
    shots.change()
    assert both.backup("differential", level="differential").drive("vda")["parent"] == full.id
    shots.change()
    both.backup()
    shots.present("two")
    shots.change()
    both.backup("differential", "full", level="differential")
    shots.absent("one", merge="commit")
    shots.change()
    both.backup("differential", "full", level="differential")
    shots.reverted("two", discarded="delete")
    shots.change()
    both.backup("differential", "full", level="differential")
    both.backup("incremental")
    both.end()


@pytest.mark.parametrize("then", ["commit", "stream", "reverted"])
def test_qemu_started_anew_on_the_overlay(both: Both, qemu_factory: QemuFactory, then: str) -> None:
    shots = both.shots
    shots.write("vda", 20, 30)
    both.backup("full")
    shots.change()
    shots.present("one")
    shots.change()
    shots.qemu.quit()
    overlay = Drive("vda", shots.directory / "vda.one.qcow2")
    shots.qemu = qemu_factory("vm", [overlay], uuid=shots.qemu.uuid, paused=False)
    shots.change()
    both.backup("incremental")
    shots.change()
    if then == "reverted":
        shots.reverted("one", discarded="delete")
    else:
        shots.absent("one", merge=then)
    shots.change()
    both.backup("incremental")
    both.end()


def test_two_repositories(both: Both) -> None:
    """Each has bitmaps of its own, which all go on."""
    shots, other = both.shots, Site(both.site.directory, "other")
    shots.write("vda", 20, 30)
    both.backup("full")
    other.backup(shots.qemu)
    shots.change()
    shots.present("one")
    shots.change()
    both.backup()
    assert other.backup(shots.qemu).levels == {"vda": "incremental"}
    shots.present("two")
    shots.change()
    shots.absent("one", merge="commit")
    shots.change()
    assert other.backup(shots.qemu).levels == {"vda": "incremental"}
    both.backup()
    shots.reverted("two", discarded="delete")
    shots.change()
    other.backup(shots.qemu)
    both.backup("incremental")
    other.check()
    both.end()


def test_bitmaps_of_others_are_told_of(both: Both) -> None:
    shots = both.shots
    shots.qemu.command("block-dirty-bitmap-add", node=shots.qemu.active_node("vda"), name="theirs", persistent=True)
    result = shots.call("one").ok()
    assert any("theirs" in warning and "vda" in warning for warning in result.warnings)
    assert vm_of(result)["drives"][0]["bitmaps"] == []


# --- at the same time


@pytest.mark.parametrize("state", ["present", "absent", "reverted"])
def test_a_backup_that_runs(both: Both, state: str) -> None:
    """It is not disturbed: the snapshot is refused, clearly, and made when the backup is over."""
    shots = both.shots
    shots.write("vda", 0, 60)
    if state != "present":
        shots.present("one")
        shots.change()
    started = both.site.call(shots.qemu, bandwidth=256 << 10, wait=False).ok()
    jobs = [job["id"] for job in shots.qemu.jobs()]
    assert jobs, started.data
    for check in (False, True):
        error = vm_of(shots.call("one", state, check=check, allow_reset=True))["error"]
        assert error["kind"] == "JobsRunning" and jobs[0] in error["message"]
        assert "Nothing was touched" in error["message"]
    assert [job["id"] for job in shots.qemu.jobs()] == jobs


@pytest.mark.parametrize("state", ["present", "absent", "reverted"])
def test_a_job_of_somebody_else(both: Both, state: str) -> None:
    """While it runs we wait for it, in words; concluded and not dismissed it is in nobody's way, and stays."""
    shots = both.shots
    shots.write("vda", 0, 60)
    if state != "present":
        shots.present("one")
        shots.change()
    images.create(shots.directory / "their.raw", SIZE, "raw")
    target = {"driver": "file", "filename": str(shots.directory / "their.raw"), "node-name": "their-target"}
    shots.qemu.execute("blockdev-add", target)
    job = {"job-id": "theirs", "device": shots.qemu.active_node("vda"), "target": "their-target", "sync": "full"}
    shots.qemu.execute("blockdev-backup", {**job, "speed": 64 << 10, "auto-dismiss": False})
    error = vm_of(shots.call("one", state, allow_reset=True))["error"]
    assert error["kind"] == "JobsRunning" and "theirs" in error["message"]
    shots.qemu.command("block-job-set-speed", device="theirs", speed=0)
    shots.qemu.wait_event("JOB_STATUS_CHANGE", id="theirs", status="concluded")
    if state == "present":
        assert vm_of(shots.call("one").ok())["status"] == "taken"
    else:
        status = vm_of(shots.call("one", state, allow_reset=True, discarded="delete").ok())["status"]
        assert status == {"absent": "removed", "reverted": "reverted"}[state]
        if state == "reverted":
            shots.truth = shots.past["one"]
    assert [job["id"] for job in shots.qemu.jobs()] == ["theirs"]
    shots.live()
