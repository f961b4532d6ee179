# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU's own sync modes for experts, what belongs to others, and a bandwidth shared by several VMs."""

from __future__ import annotations

import shutil
import typing as t
from collections import Counter
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.module import start_module
from support.points import KIB, MIB, Drive, Qemu, Site, disk, leftovers, tracking


@pytest.fixture
def site(workdir: Path) -> Site:
    return Site(workdir)


@pytest.fixture
def vm(site: Site, qemu_factory: QemuFactory) -> Qemu:
    return qemu_factory("vm", [Drive("disk0", disk(site.directory, "disk0"))])


def put_on(image: str | Path, base: Path, fmt: str = "raw") -> Path:
    """A copy of a published image that stands on ``base``."""
    path = base.with_suffix(".joined.qcow2")
    shutil.copyfile(image, path)
    path.chmod(0o600)
    images.run_tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", base, "-F", fmt, path)
    return path


def test_top_is_the_active_image_alone(site: Site, qemu_factory: QemuFactory) -> None:
    base = disk(site.directory, "base")
    overlay = images.create(site.directory / "overlay.qcow2", backing=base)
    images.fill(overlay, [(4 * MIB, MIB, 6), (0, 64 * KIB, 7)])
    vm = qemu_factory("vm", [Drive("disk0", overlay)])
    answer = site.call(vm, sync="top").ok().data["vms"][0]
    (drive,) = answer["drives"]
    assert (answer["level"], drive["level"], drive["standalone"]) == ("copy", "copy", False)
    assert drive["copied"] == MIB + 64 * KIB
    witness = site.witness(vm, "disk0", "top")
    assert not images.compare(witness, drive["path"], "raw", "qcow2")
    assert images.compare(witness, put_on(drive["path"], base, "qcow2"), "raw", "qcow2")
    assert tracking(vm, "disk0") == []
    assert site.backup(vm).levels == {"disk0": "full"}  # nothing builds on it
    site.check()


def test_top_of_a_single_image_stands_alone(site: Site, vm: Qemu) -> None:
    assert site.backup(vm, sync="top").drive("disk0")["standalone"] is True
    site.check()


def test_none_saves_old_data_until_it_is_cancelled(site: Site, vm: Qemu) -> None:
    before = site.witness(vm, "disk0", "before")
    running = site.call(vm, sync="none", wait=False).ok().data["vms"][0]
    assert running["status"] == "running"
    vm.write("disk0", 0, 64 * KIB, 0x99)
    vm.write("disk0", 512 * KIB, 4 * KIB, 0x98)
    vm.qemu_io("disk0", f"write -z {768 * KIB} {64 * KIB}")
    again = site.call(vm, sync="none", wait=False).ok().data["vms"][0]
    assert (again["status"], again["backup"]) == ("running", running["backup"])
    assert site.call(vm, state="cancelled", check=True).ok().changed
    ended = site.call(vm, state="cancelled").ok().data["vms"][0]
    assert (ended["status"], ended["backup"], ended["level"]) == ("published", running["backup"], "copy")
    (drive,) = ended["drives"]
    assert drive["standalone"] is False
    after = site.witness(vm, "disk0", "after")
    assert not images.compare(before, after, "raw", "raw")
    assert images.compare(before, put_on(drive["path"], after), "raw", "qcow2")
    assert leftovers(vm) == []
    assert not site.call(vm, state="cancelled").ok().changed
    assert site.backup(vm).levels == {"disk0": "full"}


def add_bitmap(vm: Qemu, name: str = "mine", **options: t.Any) -> None:
    vm.execute("block-dirty-bitmap-add", {"node": "disk0-node", "name": name, **options})


OWN = [
    pytest.param({"sync": "incremental"}, 0, id="incremental"),
    pytest.param({"sync": "bitmap"}, 0, id="bitmap"),
    pytest.param({"sync": "bitmap", "bitmap_mode": "on-success"}, 0, id="bitmap, on-success"),
    pytest.param({"sync": "bitmap", "bitmap_mode": "always"}, 0, id="bitmap, always"),
    pytest.param({"sync": "bitmap", "bitmap_mode": "never"}, 2 * 64 * KIB, id="bitmap, never"),
]


@pytest.mark.parametrize(("params", "left"), OWN)
def test_bitmap_of_ones_own(site: Site, vm: Qemu, params: dict[str, t.Any], left: int) -> None:
    site.backup(vm)
    before = site.witness(vm, "disk0", "before")
    add_bitmap(vm)
    vm.write("disk0", 3 * MIB, 64 * KIB, 3)
    vm.qemu_io("disk0", f"write -z 0 {64 * KIB}")
    ours = {name: bitmap for name, bitmap in vm.bitmaps("disk0").items() if name != "mine"}
    assert site.call(vm, check=True, bitmap="mine", **params).ok().data["vms"][0]["bytes_bound"] == 2 * 64 * KIB
    answer = site.call(vm, bitmap="mine", **params).ok().data["vms"][0]
    (drive,) = answer["drives"]
    assert (answer["level"], drive["standalone"], drive["copied"]) == ("copy", False, 2 * 64 * KIB)
    now = site.witness(vm, "disk0", "now")
    assert images.compare(now, put_on(drive["path"], before), "raw", "qcow2")
    bitmaps = vm.bitmaps("disk0")
    assert bitmaps.pop("mine")["count"] == left
    assert bitmaps == ours
    assert site.backup(vm).levels == {"disk0": "incremental"}
    site.check()


def test_bitmap_that_is_not_there(site: Site, vm: Qemu) -> None:
    result = site.call(vm, sync="bitmap", bitmap="nobody")
    assert result.data["vms"][0]["error"]["kind"] == "DriveUnfit"
    assert "nobody" in result.msg
    assert leftovers(vm) == []


CONTRADICTIONS: list[t.Any] = [
    {"sync": "top", "level": "full"},
    {"sync": "full", "level": "incremental"},
    {"sync": "incremental"},
    {"sync": "bitmap"},
    {"bitmap": "mine"},
    {"sync": "top", "bitmap": "mine"},
    {"sync": "incremental", "bitmap": "mine", "bitmap_mode": "never"},
    {"bitmap_mode": "never"},
    {"sync": "none"},
    {"bandwidth": 0},
    {"bandwidth": -1},
    {"max_age": "soon"},
    {"max_age": "-1"},
    {"max_parallel": 0},
    {"owner": "nobody-of-this-name"},
    {"group": "no-group-of-this-name"},
    {"file_mode": "rw-------"},
    {"directory_mode": "0999"},
    {"file_mode": "0640"},
    {"freeze_timeout": 0},
    {"timeout": 0},
    {"timeout": -1},
    {"job_timeout": -1},
]


@pytest.mark.parametrize("params", CONTRADICTIONS, ids=str)
def test_contradiction_is_refused_before_anything_is_touched(tmp_path: Path, params: dict[str, t.Any]) -> None:
    """There is not even a VM to ask."""
    site = Site(tmp_path)
    result = site.call({"name": "vm", "socket": "/nowhere/at.all"}, **params)
    assert result.data["error"]["kind"] == "InputInvalid", result.msg
    assert list(tmp_path.iterdir()) == []


def test_what_belongs_to_others_is_never_touched(site: Site, qemu_factory: QemuFactory) -> None:
    drives = [Drive("disk0", disk(site.directory, "disk0")), Drive("disk1", disk(site.directory, "disk1", 64 * MIB))]
    vm = qemu_factory("vm", drives)
    theirs = ["mine", "bo-", "bo-00000000-20260101T000000Z-00000000", "bo-00000000-20260101T000000Z-00000000.1"]
    theirs += ["libvirt-backup", "bo-00000000-00000000-0-tmp"]
    for name in theirs:
        add_bitmap(vm, name, persistent=True)
    for name in ("backup-target", "bo-target", "bo-00000000-00000000-0-target"):
        vm.execute("blockdev-add", {"driver": "null-co", "node-name": name, "size": 64 * MIB})
    job = {"job-id": "bo-00000000-00000000-0-job", "device": "disk1-node", "target": "backup-target", "sync": "full"}
    vm.execute("blockdev-backup", {**job, "speed": 1, "auto-dismiss": False})
    failed = {"job-id": "theirs", "device": "disk0-node", "target": "bo-target", "sync": "full", "auto-dismiss": False}
    with pytest.raises(Exception, match="size"):
        vm.execute("blockdev-backup", failed)

    def state() -> t.Any:
        bitmaps = {name: bitmap for name, bitmap in vm.bitmaps("disk0").items() if name in theirs}
        nodes = [name for name in vm.node_names() if not name.startswith("#")]
        jobs = [(each["id"], each["status"]) for each in vm.jobs()]
        return bitmaps, nodes, jobs

    before = state()
    assert len(before[0]) == len(theirs)
    site.backup(vm)
    assert state() == before
    site.backup(vm)
    running = site.call(vm, wait=False, level="full", bandwidth=64 * KIB).ok().data["vms"][0]
    assert running["status"] == "running"
    site.call(vm, state="cancelled").ok()
    site.call(vm, state="recovered").ok()
    site.backup(vm, level="full", drives=["disk0"])
    assert state() == before
    vm.command("job-cancel", id="bo-00000000-00000000-0-job")
    site.check()


# -- bandwidth ---------------------------------------------------------------------------------------------------------


def speeds(vms: t.Sequence[Qemu]) -> dict[str, int]:
    """Of the running jobs, by job id."""
    return {job["device"]: job["speed"] for vm in vms for job in vm.command("query-block-jobs")}


def test_bandwidth_is_shared_by_all_jobs_and_given_on(site: Site, qemu_factory: QemuFactory) -> None:
    total = 24 * MIB
    sizes = {"small": (2, 2), "big": (24,), "other": (20,)}
    vms = []
    for name, parts in sizes.items():
        drives = [Drive(f"d{n}", disk(site.directory, f"{name}{n}", 32 * MIB)) for n in range(len(parts))]
        for drive, part in zip(drives, parts):
            images.fill(str(drive.image), [(0, part * MIB, 5)])
        vms.append(qemu_factory(name, drives))
    entries = [{"name": vm.name, "socket": str(vm.socket)} for vm in vms]
    params = {"repository": str(site.repository), "quiesce": "off", "vms": entries, "bandwidth": total}
    module = start_module("qmp_drive_backup", params)
    seen: Counter[int] = Counter()
    settled: dict[str, int] = {}
    even = 0
    while module.process.poll() is None:
        now = speeds(vms)
        # what two looks in a row agree on was true at one instant
        if now and now == settled:
            assert 0 not in now.values(), now
            assert sum(now.values()) <= total, now
            seen[len(now)] += 1
            even += set(now.values()) == {total // len(now)}
        settled = now
    result = module.finish().ok()
    assert {answer["status"] for answer in result.data["vms"]} == {"published"}
    assert len(seen) > 1, f"the number of jobs never changed: {seen}"
    assert max(seen) >= 3
    assert even > sum(seen.values()) / 2, "one joins or leaves in a moment; most of the time all have the same"


def test_bandwidth_of_an_adopted_backup_is_that_of_the_new_run(site: Site, vm: Qemu) -> None:
    site.call(vm, wait=False, bandwidth=1).ok()
    assert list(speeds([vm]).values()) == [1]
    assert site.backup(vm).data["adopted"] is True
    site.check()
