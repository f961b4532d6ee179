# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each level promises, drive by drive, and what is done when a chain cannot be continued."""

from __future__ import annotations

import grp
import os
import pwd
import stat
import subprocess
import typing as t
from pathlib import Path

import pytest
import yaml

from lab import images
from lab.fixtures import QemuFactory
from support.module import ROOT
from support.points import KIB, MIB, Drive, Point, Qemu, Site, disk, leftovers, tracking


@pytest.fixture
def site(workdir: Path) -> Site:
    return Site(workdir)


@pytest.fixture
def vm(site: Site, qemu_factory: QemuFactory) -> Qemu:
    """One VM with one drive."""
    return qemu_factory("vm", [Drive("disk0", disk(site.directory, "disk0"))])


@pytest.fixture
def pair(site: Site, qemu_factory: QemuFactory) -> Qemu:
    """One VM with two drives."""
    return qemu_factory("vm", [Drive(name, disk(site.directory, name)) for name in ("one", "two")])


def write(qemu: Qemu, number: int, drive: str = "disk0") -> None:
    """The change number ``number``: 64 KiB of its own pattern at its own place, and one that all share."""
    qemu.write(drive, (2 + number) * MIB, 64 * KIB, 0x40 + number)
    qemu.write(drive, 15 * MIB, 64 * KIB, 0x40 + number)


def test_differential_builds_on_the_newest_full(site: Site, vm: Qemu) -> None:
    site.backup(vm)
    write(vm, 0)
    full = site.backup(vm, level="full")
    assert full.reason("disk0") == "None"
    for number in (1, 2):
        write(vm, number)
        assert site.backup(vm).levels == {"disk0": "incremental"}
    write(vm, 3)
    first = site.backup(vm, level="differential")
    assert first.data["level"] == first.levels["disk0"] == "differential"
    assert first.drive("disk0")["parent"] == full.id
    assert first.drive("disk0")["copied"] == 4 * 64 * KIB
    write(vm, 4)
    after = site.backup(vm)
    assert after.levels == {"disk0": "incremental"}
    assert after.drive("disk0")["parent"] == first.id
    assert after.drive("disk0")["copied"] == 2 * 64 * KIB
    write(vm, 5)
    second = site.backup(vm, level="differential")
    assert second.drive("disk0")["parent"] == full.id
    vm.restart()
    write(vm, 6)
    assert site.backup(vm, level="differential").drive("disk0")["parent"] == full.id
    assert len(tracking(vm, "disk0")) == 2  # of the newest backup, and of the newest full
    site.check()


def test_full_starts_a_new_chain(site: Site, vm: Qemu) -> None:
    site.backup(vm)
    write(vm, 1)
    full = site.backup(vm, level="full")
    assert full.drive("disk0")["parent"] is None
    write(vm, 2)
    assert site.backup(vm).drive("disk0")["parent"] == full.id
    chain = [os.path.realpath(name) for name in images.chain(site.points[-1].image("disk0"))]
    assert chain == [str(point.image("disk0")) for point in (site.points[-1], full)]
    site.check()


def test_incremental_without_anything_before_is_a_full_with_the_reason(site: Site, vm: Qemu) -> None:
    point = site.backup(vm, level="incremental")
    assert point.levels == {"disk0": "full"}
    assert "no earlier backup" in point.reason("disk0")


def test_copy_leaves_the_chain_alone(site: Site, vm: Qemu) -> None:
    full = site.backup(vm)
    write(vm, 1)
    before = vm.bitmaps("disk0")
    copy = site.backup(vm, level="copy")
    assert copy.data["level"] == copy.levels["disk0"] == "copy"
    assert vm.bitmaps("disk0") == before
    write(vm, 2)
    after = site.backup(vm)
    assert after.levels == {"disk0": "incremental"}
    assert after.drive("disk0")["parent"] == full.id
    assert after.drive("disk0")["copied"] == 3 * 64 * KIB
    assert site.backup(vm, sync="full").data["level"] == "copy"
    assert site.backup(vm).drive("disk0")["parent"] == after.id
    site.check()


def test_copy_as_the_very_first_backup_tracks_nothing(site: Site, vm: Qemu) -> None:
    site.backup(vm, level="copy")
    assert tracking(vm, "disk0") == []
    assert site.backup(vm).levels == {"disk0": "full"}
    site.check()


def test_max_age(site: Site, vm: Qemu) -> None:
    first = site.backup(vm, max_age="1h")
    again = site.call(vm, max_age="1h").ok()
    assert not again.changed
    answer = again.data["vms"][0]
    assert (answer["status"], answer["backup"]) == ("unchanged", first.id)
    assert site.call(vm, max_age="1h", check=True).data["changed"] is False
    assert site.backup(vm, max_age="0").id != first.id


def test_max_age_counts_only_backups_with_all_drives(site: Site, pair: Qemu) -> None:
    site.backup(pair, drives=["one"])
    both = site.backup(pair, max_age="1d")
    assert both.levels == {"one": "incremental", "two": "full"}
    assert not site.call(pair, max_age="1d").ok().changed
    assert not site.call(pair, max_age="1d", drives=["two"]).ok().changed
    os.truncate(both.image("two"), 0)
    assert not site.call(pair, max_age="1d", drives=["one"]).ok().changed
    assert site.backup(pair, max_age="1d").levels == {"one": "incremental", "two": "full"}


def test_drives_have_their_own_chains(site: Site, pair: Qemu) -> None:
    both = site.backup(pair)
    for name in ("one", "two"):
        write(pair, 1, name)
    only = site.backup(pair, drives=["one"])
    assert only.levels == {"one": "incremental"}
    assert [skip["name"] for skip in only.data["skipped"]] == ["two"]
    for name in ("one", "two"):
        write(pair, 2, name)
    other = site.backup(pair, exclude_drives=["one"])
    assert other.levels == {"two": "incremental"}
    for name in ("one", "two"):
        write(pair, 3, name)
    joined = site.backup(pair)
    assert {d["name"]: d["parent"] for d in joined.data["drives"]} == {"one": only.id, "two": other.id}
    assert joined.levels == {"one": "incremental", "two": "incremental"}
    assert both.drive("two")["parent"] is None
    site.check()


DESCRIBED = {"name": "two", "backup": {"default": True}}


@pytest.mark.parametrize(
    ("drives", "of_the_task", "expected"),
    [
        (["two"], ["one"], ["two"]),
        ([DESCRIBED], [], ["two"]),
        # What qmp_vm_info found is no choice against one that somebody has made.
        ([DESCRIBED], ["one"], ["one"]),
    ],
)
def test_drives_of_a_vm_go_before_those_of_the_task(
    site: Site, pair: Qemu, drives: list[t.Any], of_the_task: list[str], expected: list[str]
) -> None:
    entry = {"name": "vm", "socket": str(pair.socket), "drives": drives}
    answer = site.call(entry, drives=of_the_task).ok().data["vms"][0]
    assert [drive["name"] for drive in answer["drives"]] == expected


def test_unknown_drive_is_refused_before_anything_is_touched(site: Site, pair: Qemu) -> None:
    result = site.call(pair, drives=["one", "three"])
    error = result.data["vms"][0]["error"]
    assert (error["kind"], error["drive"]) == ("DriveUnknown", "three")
    assert tracking(pair, "one") == []
    result = site.call(pair, exclude_drives=["one", "two"])
    assert result.data["vms"][0]["error"]["kind"] == "NoDrives"


def lost(site: Site, vm: Qemu, why: str) -> None:
    """on_lost_bitmap=fail refuses, and the default takes a full with the reason."""
    refused = site.call(vm, on_lost_bitmap="fail")
    error = refused.data["vms"][0]["error"]
    assert error["kind"] == "BitmapLost"
    assert why in error["message"]
    assert site.call(vm, on_lost_bitmap="fail", check=True).data["vms"][0]["error"]["kind"] == "BitmapLost"
    full = site.backup(vm)
    assert full.levels == {"disk0": "full"}
    assert why in full.reason("disk0")
    write(vm, 7)
    assert site.backup(vm, on_lost_bitmap="fail").levels == {"disk0": "incremental"}


def test_killed_qemu_loses_the_bitmap(site: Site, vm: Qemu) -> None:
    site.backup(vm)
    vm.kill9()
    vm.start()
    lost(site, vm, "QEMU was killed")
    site.check()


def test_bitmap_removed_by_somebody(site: Site, vm: Qemu) -> None:
    site.backup(vm)
    (name,) = tracking(vm, "disk0")
    vm.execute("block-dirty-bitmap-remove", {"node": "disk0-node", "name": name})
    lost(site, vm, "no bitmap of backup")
    site.check()


def test_bitmap_disabled_by_somebody(site: Site, vm: Qemu) -> None:
    site.backup(vm)
    (name,) = tracking(vm, "disk0")
    vm.execute("block-dirty-bitmap-disable", {"node": "disk0-node", "name": name})
    lost(site, vm, "was disabled")
    site.check()


DAMAGE: list[t.Any] = [
    pytest.param(lambda path: path.unlink(), "No such file", id="deleted"),
    pytest.param(lambda path: os.truncate(path, 70000), "70000 bytes instead", id="truncated"),
]


@pytest.mark.parametrize(("damage", "why"), DAMAGE)
def test_damaged_parent(site: Site, vm: Qemu, damage: t.Callable[[Path], None], why: str) -> None:
    full = site.backup(vm)
    write(vm, 1)
    damage(full.image("disk0"))
    again = site.backup(vm)
    assert again.levels == {"disk0": "full"}
    assert why in again.reason("disk0")
    again.check()
    write(vm, 2)
    assert site.backup(vm).check().levels == {"disk0": "incremental"}


@pytest.mark.parametrize("damage", ["image", "manifest", "directory"])
def test_damaged_increment_with_a_sound_full_below(site: Site, vm: Qemu, damage: str) -> None:
    """The next one builds on the full, whose bitmap still knows all changes since, and says so."""
    full = site.backup(vm)
    write(vm, 1)
    site.backup(vm)
    write(vm, 2)
    broken = site.backup(vm)
    if damage == "image":
        os.truncate(broken.image("disk0"), 0)
    elif damage == "manifest":
        (broken.path / "manifest.json").chmod(0o600)
        (broken.path / "manifest.json").write_text("{}")
    else:
        for file in broken.path.iterdir():
            file.unlink()
        broken.path.rmdir()
    write(vm, 3)
    again = site.backup(vm)
    assert again.levels == {"disk0": "incremental"} or damage != "image"
    if again.levels == {"disk0": "incremental"}:
        assert again.drive("disk0")["parent"] == full.id
        assert again.drive("disk0")["copied"] == 4 * 64 * KIB
    assert again.reason("disk0") not in ("None", "")
    again.check()
    write(vm, 4)
    assert site.backup(vm).levels == {"disk0": "incremental"}
    for point in site.points:
        if point is not broken:
            point.check()


def test_manifest_of_the_full_removed_makes_a_new_full(site: Site, vm: Qemu) -> None:
    full = site.backup(vm)
    write(vm, 1)
    (full.path / "manifest.json").unlink()
    assert site.backup(vm).check().levels == {"disk0": "full"}


def test_two_repositories_of_one_vm_do_not_disturb_each_other(site: Site, vm: Qemu) -> None:
    second = Site(site.directory, "second")
    site.backup(vm)
    second.backup(vm)
    for number in range(3):
        write(vm, number)
        assert site.backup(vm).levels == {"disk0": "incremental"}
        if number % 2:
            assert second.backup(vm).levels == {"disk0": "incremental"}
    site.check()
    second.check()


def test_compressed_backups(site: Site, vm: Qemu) -> None:
    full = site.backup(vm, compress=True)
    write(vm, 1)
    increment = site.backup(vm, compress=True)
    assert increment.levels == {"disk0": "incremental"}
    for point in (full, increment):
        assert images.info(point.image("disk0"))["format-specific"]["data"]["compression-type"] == "zstd"
    assert full.image("disk0").stat().st_size < MIB
    write(vm, 2)
    site.backup(vm)  # not compressed, on compressed ones
    site.check()


def test_owner_and_modes(site: Site, vm: Qemu) -> None:
    saved = site.directory / "vm.conf"
    saved.write_text("memory=64\n")
    saved.chmod(0o644)
    user, group = pwd.getpwnam("nobody"), grp.getgrgid(pwd.getpwnam("nobody").pw_gid)
    point = site.backup(
        vm,
        owner="nobody",
        group=group.gr_name,
        file_mode="0444",
        directory_mode="0750",
        definition=[str(saved)],
    )
    files = [point.image("disk0"), point.path / "manifest.json", point.path / "definition" / "0"]
    for file in files:
        info = file.stat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (user.pw_uid, group.gr_gid, 0o444), file
    for directory in (point.path, point.path / "definition", point.path.parent, site.repository):
        info = directory.stat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (user.pw_uid, group.gr_gid, 0o750), directory
    (record,) = point.manifest["definition"]
    assert record["path"] == str(saved)
    assert record["mode"] == "0644"
    assert record["uid"] == 0
    assert record["size"] == 10
    assert record["sha256"] == sha256sum(saved)


def sha256sum(path: Path) -> str:
    return subprocess.run(["sha256sum", path], check=True, capture_output=True, text=True).stdout.split()[0]


def test_everything_published_is_read_only(site: Site, vm: Qemu) -> None:
    point = site.backup(vm)
    assert point.drive("disk0")["sha256"] == sha256sum(point.image("disk0"))
    for file in point.path.iterdir():
        assert not stat.S_IMODE(file.stat().st_mode) & 0o222, file


def test_unverified_backup_has_no_checksum(site: Site, vm: Qemu) -> None:
    point = site.backup(vm, verify=False)
    assert point.drive("disk0")["sha256"] is None
    site.check()


def plan_of(answer: t.Mapping[str, t.Any]) -> list[tuple[str, str, str, str]]:
    return [tuple(str(drive[key]) for key in ("name", "level", "parent", "reason")) for drive in answer["drives"]]  # type: ignore[misc]


def test_check_mode_tells_what_the_run_then_does(site: Site, pair: Qemu) -> None:
    def compare(**params: t.Any) -> Point:
        nodes, marks = pair.node_names(), {name: pair.bitmaps(name) for name in ("one", "two")}
        predicted = site.call(pair, check=True, diff=True, **params).ok()
        assert nodes == pair.node_names()
        assert marks == {name: pair.bitmaps(name) for name in ("one", "two")}
        real = site.call(pair, diff=True, **params).ok()
        assert predicted.data["diff"] == real.data["diff"]
        before, after = predicted.data["vms"][0], real.data["vms"][0]
        assert plan_of(before) == plan_of(after)
        assert before["skipped"] == after["skipped"]
        assert before["bytes_bound"] >= after["bytes"]
        assert predicted.changed == real.changed
        return Point(after, {}, ())

    compare()  # no repository yet
    write(pair, 1, "one")
    compare(drives=["one"])
    write(pair, 2, "two")
    compare(level="differential")
    compare(level="full")
    compare(level="copy")
    pair.kill9()
    pair.start()
    lost_tracking = compare()
    assert lost_tracking.levels == {"one": "full", "two": "full"}
    compare(wait=False, level="full")
    adopted = [site.call(pair, check=check, diff=True, wait=False).ok().data for check in (True, False)]
    assert adopted[0] == {**adopted[1], "invocation": adopted[0]["invocation"]}, "running, and nothing to do"
    assert not adopted[0]["changed"]
    adopted = [site.call(pair, check=check, diff=True).ok().data for check in (True, False)]
    assert adopted[0]["diff"] == adopted[1]["diff"]
    assert adopted[0]["vms"][0]["backup"] == adopted[1]["vms"][0]["backup"]
    assert not site.call(pair, check=True, max_age="1h").changed
    assert leftovers(pair) == []


# -- the documented result ---------------------------------------------------------------------------------------------


def documented() -> dict[str, t.Any]:
    source = (ROOT / "plugins" / "modules" / "qmp_drive_backup.py").read_text()
    text = source.split('RETURN = r"""', 1)[1].split('"""', 1)[0]
    return t.cast("dict[str, t.Any]", yaml.safe_load(text)["vms"]["contains"])


def expected_keys(returned: str, answer: t.Mapping[str, t.Any]) -> bool:
    """Whether a key whose ``returned`` says this must be in the answer."""
    status = answer.get("status")
    backup = "backup" in answer
    plan = status == "planned" and "bytes_bound" in answer
    started = status in ("published", "running") and not answer["adopted"]
    verdicts = {
        "always": True,
        "success": "error" not in answer,
        "on failure": "error" in answer,
        "when QEMU answered": "error" not in answer,
        "when there is a backup": backup,
        "when there is a plan": plan,
        "when there is a backup or a plan": backup or plan,
        "when this run started the backup": started,
        "when this run started the backup, and in check mode": started or plan,
        "when the options cannot be meant": False,
        "with status published": status == "published",
        "with status running": status == "running",
        "when there is no repository to cancel or recover in": "reason" in answer,
    }
    return verdicts[returned]


def assert_documented(answer: t.Mapping[str, t.Any]) -> str:
    docs = documented()
    assert set(answer) <= set(docs), set(answer) - set(docs)
    wrong = {
        key: doc["returned"] for key, doc in docs.items() if expected_keys(doc["returned"], answer) != (key in answer)
    }
    assert not wrong, (answer, wrong)
    drives = " ".join(docs["drives"]["description"])
    for drive in answer.get("drives", ()):
        assert all(f"C({key})" in drives for key in drive), drive
    return str(answer.get("status"))


def test_every_result_is_what_the_documentation_says(site: Site, vm: Qemu) -> None:
    seen: set[str] = set()

    def see(status: str, *, check: bool = False, **params: t.Any) -> None:
        answer = site.call(vm, check=check, **params).data["vms"][0]
        assert assert_documented(answer) == status, answer
        seen.add(status)

    see("unchanged", state="cancelled")
    see("unchanged", state="recovered")
    see("planned", check=True)
    see("published")
    see("planned", check=True)
    see("unchanged", max_age="1h")
    see("unchanged", max_age="1h", check=True)
    see("unchanged", state="recovered")
    see("unchanged", state="cancelled", check=True)
    see("running", wait=False, level="full")
    see("planned", check=True)
    see("running", wait=False)
    see("planned", check=True, state="cancelled")
    see("cancelled", state="cancelled")
    see("running", wait=False, level="full")
    see("published")
    see("running", wait=False, level="full")
    see("published", state="recovered")
    see("None", drives=["nothing"])
    leave_something_behind(vm, site)
    see("planned", check=True, state="recovered")
    see("recovered", state="recovered")
    assert seen == {"unchanged", "planned", "published", "running", "cancelled", "recovered", "None"}


def test_examples_are_valid_and_use_documented_options() -> None:
    source = (ROOT / "plugins" / "modules" / "qmp_drive_backup.py").read_text()
    blocks = {name: source.split(f'{name} = r"""', 1)[1].split('"""', 1)[0] for name in ("DOCUMENTATION", "EXAMPLES")}
    own = set(yaml.safe_load(blocks["DOCUMENTATION"])["options"])
    shared = {"vms", "max_parallel", "timeout", "owner", "group", "file_mode", "directory_mode"}
    tasks = yaml.safe_load(blocks["EXAMPLES"])
    assert len(tasks) >= 3
    for task in tasks:
        assert task["name"]
        assert set(task["blockops.qemu.qmp_drive_backup"]) <= own | shared


def leave_something_behind(vm: Qemu, site: Site) -> None:
    """A node as a killed run of this repository would leave it."""
    identity = yaml.safe_load((site.repository / "repository.json").read_text())["id"]
    node = {"driver": "null-co", "node-name": f"bo-{identity}-0badcafe-0-target", "read-zeroes": True}
    vm.execute("blockdev-add", node)
