# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qemu_img_snapshot: internal snapshots. Content is read by qemu-io and compared by qemu-img, never by the module."""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.img_killer import KILLER
from support.module import Result, run_module, start_module
from support.points import MIB, Drive, Site, disk


@pytest.fixture
def image(workdir: Path) -> Path:
    return disk(workdir, "vda", 8 * MIB)


def change(image: Path, name: str = "s1", state: str = "present", check: bool = False, **params: t.Any) -> Result:
    arguments = {"path": str(image), "name": name, "state": state, **params}
    return run_module("qemu_img_snapshot", arguments, check=check, diff=True)


def names(image: Path) -> list[str]:
    return [entry["name"] for entry in images.info(image, "qcow2").get("snapshots", ())]


def holds(image: Path, pattern: int, offset: int = 0) -> bool:
    """qemu-io's word for it: the first MiB at ``offset`` is all ``pattern``."""
    done = images.run_tool("qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {pattern} {offset} 1M", image, accept=(0, 1))
    return "Pattern verification failed" not in done.stdout and "read 1048576" in done.stdout


def test_present_applied_absent_each_twice(image: Path) -> None:
    for check in (True, False):
        result = change(image, check=check).ok()
        assert result.changed
        assert result.data["diff"] == {"before": {"snapshots": []}, "after": {"snapshots": ["s1"]}}
        assert names(image) == ([] if check else ["s1"])
    assert not change(image).ok().changed
    images.fill(image, [(0, MIB, 0x22)])
    assert change(image, state="applied", check=True).ok().changed
    assert holds(image, 0x22)
    assert change(image, state="applied").ok().changed
    assert holds(image, 1)
    assert not change(image, state="applied").ok().changed
    for check in (True, False):
        assert change(image, state="absent", check=check).ok().changed
    assert names(image) == []
    assert not change(image, state="absent").ok().changed
    assert images.check(image).get("corruptions", 0) == 0


@pytest.mark.parametrize(
    ("write", "changes"),
    [
        ("write -P 9 7M 512", True),
        ("write -z 0 64k", True),
        ("discard 0 1M", True),
        ("write -P 1 0 64k", True),  # the same data: seen as a change, and harmless
        ("read 0 1M", False),
        ("flush", False),
    ],
)
@pytest.mark.parametrize("options", [{}, {"cluster_size": 512}, {"extended_l2": True}, {"compat": "0.10"}], ids=str)
def test_whether_it_is_at_the_snapshot(workdir: Path, write: str, changes: bool, options: dict[str, t.Any]) -> None:
    image = disk(workdir, "vda", 8 * MIB, **options)
    change(image).ok()
    before = workdir / "before.raw"
    images.run_tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, before)
    images.run_tool("qemu-io", "-d", "unmap", "-f", "qcow2", "-c", write, image)
    result = change(image, state="applied").ok()
    if write.startswith(("read", "flush")):
        assert not result.changed
    elif not result.changed:  # a write that QEMU found to change nothing
        assert write.startswith(("write -z", "discard"))
    assert images.compare(image, before, "qcow2", "raw")
    assert not change(image, state="applied").ok().changed


def test_size_goes_back_too(image: Path) -> None:
    change(image).ok()
    images.run_tool("qemu-img", "resize", "-q", "-f", "qcow2", image, "12M")
    assert change(image, state="applied").ok().changed
    assert images.info(image)["virtual-size"] == 8 * MIB
    assert not change(image, state="applied").ok().changed


def test_a_name_that_is_the_id_of_another(image: Path) -> None:
    """qemu-img takes an id before it takes a name."""
    for number, name in enumerate(("2", "x", "1"), start=1):
        images.fill(image, [(0, MIB, number)])
        change(image, name).ok()
    for number, name in enumerate(("2", "x"), start=1):
        change(image, name, "applied").ok()
        assert holds(image, number)
    change(image, "1", "applied").ok()
    assert holds(image, 3)
    change(image, "1", "absent").ok()
    assert names(image) == ["2", "x"]


def test_two_of_one_name(image: Path) -> None:
    for _number in range(2):
        images.run_tool("qemu-img", "snapshot", "-c", "s1", image)
    assert not change(image).ok().changed
    for state in ("absent", "applied"):
        result = change(image, state=state)
        assert result.data["error"]["kind"] == "SnapshotAmbiguous"
        assert result.data["error"]["ids"] == "1, 2"
    assert names(image) == ["s1", "s1"]


def test_bitmaps_of_others_are_in_the_way(image: Path) -> None:
    change(image).ok()
    images.run_tool("qemu-img", "bitmap", "--add", image, "theirs")
    images.run_tool("qemu-img", "bitmap", "--add", "--disable", image, "bo-5e11ab1e-20261123T054500Z-1f3c9a2e")
    assert not change(image, state="applied").changed
    images.fill(image, [(0, MIB, 0x22)])
    result = change(image, state="applied")
    assert result.data["error"]["kind"] == "BitmapsInTheWay"
    assert len(images.bitmaps(image)) == 2
    result = change(image, state="applied", remove_bitmaps="all").ok()
    assert sorted(result.data["removed_bitmaps"]) == ["bo-5e11ab1e-20261123T054500Z-1f3c9a2e", "theirs"]
    assert "full" in result.warnings[0]
    assert holds(image, 1)


def test_the_next_backup_after_going_back_is_a_full(workdir: Path, image: Path, qemu_factory: QemuFactory) -> None:
    site = Site(workdir)
    vm = qemu_factory("vm", [Drive("vda", image)])
    site.backup(vm)
    vm.quit()
    change(image).ok()
    vm.start()
    vm.write("vda", 4 * MIB, MIB, 7)
    assert site.backup(vm).levels == {"vda": "incremental"}
    vm.quit()
    change(image, state="applied").ok()
    vm.start()
    vm.write("vda", 6 * MIB, MIB, 8)
    assert site.backup(vm).levels == {"vda": "full"}
    site.check()


def test_killed_at_every_step(image: Path) -> None:
    """The disk is as it was or as it shall be, and the same task again ends right."""
    change(image).ok()
    for number in range(20):
        images.fill(image, [(0, MIB, 0x22)])
        if not images.bitmaps(image):
            images.run_tool("qemu-img", "bitmap", "--add", image, "bo-5e11ab1e-20261123T054500Z-1f3c9a2e")
        arguments = {"path": str(image), "name": "s1", "state": "applied"}
        killed = start_module("qemu_img_snapshot", arguments, prelude=KILLER.format(number=number)).finish()
        assert holds(image, 1) or holds(image, 0x22)
        assert holds(image, 0x22) or not images.bitmaps(image)
        change(image, state="applied").ok()
        assert holds(image, 1) and not images.bitmaps(image)
        if not killed.failed:
            break
    assert number == 4  # info, bitmap, snapshot, info


def test_in_use(image: Path, qemu_factory: QemuFactory) -> None:
    change(image).ok()
    vm = qemu_factory("vm", [Drive("vda", image)])
    assert not change(image).ok().changed
    for name, state in (("s2", "present"), ("s1", "absent"), ("s1", "applied")):
        for check in (True, False):
            error = change(image, name, state, check).data["error"]
            assert error["kind"] == "ImageInUse"
            assert [holder["pid"] for holder in error["holders"]] == [vm.pid]
            assert str(vm.pid) in error["message"]
    vm.quit()
    assert names(image) == ["s1"]


def test_a_base_is_not_taken_back_below_its_overlays(image: Path) -> None:
    change(image).ok()
    images.fill(image, [(0, MIB, 0x22)])
    overlay = images.create(image.parent / "top.qcow2", backing=image.name)
    error = change(image, state="applied").data["error"]
    assert (error["kind"], error["dependents"]) == ("ImageHasDependents", str(overlay))
    assert holds(image, 0x22)


def test_the_backing_file_is_not_needed(image: Path) -> None:
    overlay = images.create(image.parent / "top.qcow2", backing=image.name)
    change(overlay).ok()
    images.fill(overlay, [(0, MIB, 0x22)])
    assert change(overlay, state="applied").ok().changed
    assert images.compare(overlay, image)


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ({"name": ""}, "InputInvalid"),
        ({"name": "x" * 256}, "InputInvalid"),
        ({"name": "a\nb"}, "InputInvalid"),
        ({"type": "external"}, "InputInvalid"),
        ({"allowed_directories": ["relative"]}, "InputInvalid"),
        ({"state": "applied", "name": "none"}, "SnapshotMissing"),
        ({"state": "applied", "type": "external"}, "SnapshotMissing"),
        ({"path": "/nonexistent/image"}, "ImageUnsafe"),
        ({"path": "/dev/null"}, "ImageUnsafe"),
    ],
)
def test_bad_input(image: Path, params: dict[str, t.Any], kind: str) -> None:
    result = run_module("qemu_img_snapshot", {"path": str(image), "name": "s1", **params})
    assert result.data["error"]["kind"] == kind, result
