# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names that people give to VMs, drives and directories, and VMs that share one."""

from __future__ import annotations

import json
import os
import typing as t
from pathlib import Path

import pytest

from lab.fixtures import QemuFactory
from support.module import run_module
from support.points import KIB, MIB, Drive, Point, Qemu, Site, disk


@pytest.fixture
def site(workdir: Path) -> Site:
    return Site(workdir)


@pytest.fixture
def vm(site: Site, qemu_factory: QemuFactory) -> Qemu:
    return qemu_factory("vm", [Drive("disk0", disk(site.directory, "disk0", 4 * MIB))])


def entry(qemu: Qemu, name: str | None = None) -> dict[str, t.Any]:
    return {"name": name, "socket": str(qemu.socket)}


def full_and_incremental(site: Site, qemu: Qemu, name: str) -> list[Point]:
    points = []
    for level in ("full", "incremental"):
        answer = site.call(entry(qemu, name)).ok().data["vms"][0]
        witnesses = {drive["name"]: site.witness(qemu, drive["name"], answer["backup"]) for drive in answer["drives"]}
        points.append(Point(answer, witnesses, ()))
        assert answer["level"] == level
        assert answer["name"] == points[-1].manifest["vm"]["name"] == name
        for drive in qemu.drives:
            qemu.write(drive, 2 * MIB, 64 * KIB, 5)
    for point in points:
        point.check()
    return points


VM_NAMES = [
    "a name with spaces",
    'it\'s "quoted"',
    "../../etc/passwd",
    "/absolute",
    "..",
    ".hidden",
    "-rf",
    "Бэкап-машина 数据库",
    "per%cent%2F",
    "json:{}",
    "colon:comma,equals=",
    "repository.json",
    "lock",
    "x" * 300,
    "é" * 100,
    "new$HOME`id`;&|<>*?[]\\",
]


def test_names_of_vms(site: Site, qemu_factory: QemuFactory) -> None:
    """All in one call; what cannot be told apart there would overwrite each other."""
    names = [*VM_NAMES, "a b", "a%20b", "a_b", "A b", "x" * 301]
    vms = {
        name: qemu_factory(f"vm{n}", [Drive("disk0", disk(site.directory, f"disk{n}", 2 * MIB))])
        for n, name in enumerate(names)
    }
    points = []
    for level in ("full", "incremental"):
        result = site.call(*(entry(qemu, name) for name, qemu in vms.items())).ok()
        for (name, qemu), answer in zip(vms.items(), result.data["vms"]):
            points.append(Point(answer, {"disk0": site.witness(qemu, "disk0", answer["backup"])}, ()))
            assert answer["level"] == level
            assert answer["name"] == points[-1].manifest["vm"]["name"] == name
            qemu.write("disk0", MIB, 64 * KIB, len(points))
    for point in points:
        point.check()
    assert len({point.path.parent for point in points}) == len(names)
    assert all(point.path.parent.parent == site.repository for point in points)


@pytest.mark.parametrize("name", ["line\nbreak", "nul\0byte", "\x1b[31mred"])
def test_impossible_name_of_a_vm(site: Site, vm: Qemu, name: str) -> None:
    result = site.call(entry(vm, name))
    assert result.data["vms"][0]["error"]["kind"] == "InputInvalid"


def test_names_of_drives(site: Site, qemu_factory: QemuFactory) -> None:
    names = ["d.with-all_4.kinds", "D" + "x" * 180, "d" + "x" * 181]
    drives = [Drive(name, disk(site.directory, f"d{n}", 4 * MIB), node_name=f"n{n}") for n, name in enumerate(names)]
    qemu = qemu_factory("vm", drives)
    assert list(full_and_incremental(site, qemu, "vm")[0].levels) == names


def test_two_drives_that_would_have_one_name(site: Site, qemu_factory: QemuFactory) -> None:
    """The path of the device tells them apart; it has slashes and brackets."""
    one, two = disk(site.directory, "one", 4 * MIB), disk(site.directory, "two", 4 * MIB)
    line = ["-drive", f"if=none,id=same,file={one},format=qcow2", "-device", "virtio-blk-pci,drive=same"]
    qemu = qemu_factory("vm", [Drive("same", two)], extra_args=line)
    point = site.backup(qemu)
    assert len(point.levels) == 2
    assert all(name.startswith("/machine/") for name in point.levels)
    assert set(site.backup(qemu).levels.values()) == {"incremental"}
    site.check()


def test_one_name_twice_in_a_call_is_refused(site: Site, vm: Qemu, qemu_factory: QemuFactory) -> None:
    other = qemu_factory("other", [Drive("disk0", disk(site.directory, "other", 4 * MIB))])
    result = site.call(entry(vm, "same"), entry(other, "same"))
    assert result.data["error"]["kind"] == "InputInvalid"
    assert "'same'" in result.msg
    assert not site.repository.exists()


def test_one_name_twice_by_what_qemu_says(site: Site, vm: Qemu, qemu_factory: QemuFactory) -> None:
    """One of them is backed up, the other refused, and nothing mixed."""
    nameless = ["-name", "vm"]
    other = qemu_factory("other", [Drive("disk0", disk(site.directory, "other", 4 * MIB))], extra_args=nameless)
    result = site.call(entry(vm), entry(other))
    assert result.failed
    kinds = [answer.get("error", {}).get("kind") for answer in result.data["vms"]]
    assert sorted(map(str, kinds)) == ["InputInvalid", "None"], result.msg


def test_another_vm_of_the_same_name_in_a_repository(site: Site, vm: Qemu, qemu_factory: QemuFactory) -> None:
    site.backup(vm)
    other = qemu_factory("other", [Drive("disk0", disk(site.directory, "other", 4 * MIB))])
    for params in ({}, {"check": True}, {"level": "full"}, {"level": "copy"}, {"max_age": "1h"}):
        result = site.call(entry(other, "vm"), **t.cast("dict[str, t.Any]", params))
        error = result.data["vms"][0]["error"]
        assert (error["kind"], error["uuid"], error["found"]) == ("VmMismatch", other.uuid, vm.uuid), params
    assert other.bitmaps("disk0") == {}
    assert site.backup(vm).levels == {"disk0": "incremental"}
    site.check()


def test_another_vm_of_the_same_name_leaves_a_running_backup_alone(
    site: Site, vm: Qemu, qemu_factory: QemuFactory
) -> None:
    """To it the jobs of the first would look like those of a run that was killed."""
    running = site.call(vm, wait=False, bandwidth=256 * KIB).ok().data["vms"][0]
    other = qemu_factory("other", [Drive("disk0", disk(site.directory, "other", 4 * MIB))])
    for state in ("present", "recovered", "cancelled"):
        assert site.call(entry(other, "vm"), state=state).data["vms"][0]["error"]["kind"] == "VmMismatch"
    assert site.backup(vm).data["backup"] == running["backup"]
    site.check()


def test_one_socket_twice_in_a_call_is_refused(site: Site, vm: Qemu) -> None:
    assert site.call(entry(vm, "one"), entry(vm, "two")).data["error"]["kind"] == "InputInvalid"


REPOSITORIES = [
    "with spaces",
    "colon:comma,semi;",
    "quote'and\"double",
    "данные-数据",
    "-leading-dash",
    "json:{}",
    "percent%20%s",
    "100%",
    "back\\slash",
]


@pytest.mark.parametrize("name", REPOSITORIES)
def test_path_of_a_repository(site: Site, vm: Qemu, name: str) -> None:
    other = Site(site.directory, name)
    full_and_incremental(other, vm, "vm")
    assert (other.repository / "repository.json").exists()


def test_directories_of_odd_names_around_it(site: Site, vm: Qemu) -> None:
    around = site.directory / "-x, :y"
    around.mkdir()
    full_and_incremental(Site(around, "deep"), vm, "vm")


def test_link_to_a_repository(site: Site, vm: Qemu) -> None:
    real = site.directory / "real"
    real.mkdir()
    link = site.directory / "link"
    link.symlink_to("real")
    full_and_incremental(Site(site.directory, "link"), vm, "vm")
    assert (real / "repository.json").exists()
    assert link.is_symlink()


def test_relative_path(site: Site, vm: Qemu) -> None:
    """Relative to the directory the module runs in, as Ansible does it with every path."""
    relative = os.path.relpath(site.repository, "/")
    params = {"repository": relative, "quiesce": "off", "vms": [entry(vm)]}
    answer = run_module("qmp_drive_backup", params).ok().data["vms"][0]
    assert Path(answer["path"]).parent == site.repository / "vm"


def test_repository_below_nothing_is_not_made(site: Site, vm: Qemu) -> None:
    """Most likely the file system is not mounted."""
    result = Site(site.directory, "not/mounted").call(vm)
    assert result.data["vms"][0]["error"]["kind"] == "TargetUnwritable"
    assert not (site.directory / "not").exists()


def test_definition_file_of_an_odd_name(site: Site, vm: Qemu) -> None:
    odd = site.directory / 'стартовый файл, "x" -y:z.conf'
    odd.write_text("memory=64\n")
    point = site.backup(vm, definition=[str(odd)])
    (record,) = json.loads((point.path / "manifest.json").read_text())["definition"]
    assert record["path"] == str(odd)
    refused = site.call(vm, definition=[str(odd), "/no/such/file"])
    assert refused.data["vms"][0]["error"]["kind"] == "DefinitionMissing"
