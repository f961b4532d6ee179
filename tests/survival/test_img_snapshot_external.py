# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qemu_img_snapshot on chains: back to an external snapshot while the VM is off, killed at every step, with backups
before, across and after. qemu-img compare and the guest's own reading judge.
"""

from __future__ import annotations

import json
import os
import shutil
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.img_killer import KILLER
from support.module import Result, run_module, start_module
from support.points import KIB, MIB, Drive, Qemu, Site, disk

UUID = "6e0a8a62-3c1f-4a38-9a50-0e7c9a4f5b11"


def record(overlay: Path, name: str, image: Path, image_format: str = "qcow2", **changes: t.Any) -> None:
    """What qmp_snapshot writes beside an overlay."""
    text = {
        "format": 1, "name": name, "drive": "vda", "overlay": str(overlay), "image": str(image),
        "image_format": image_format, "created": "2026-11-23T05:45:00Z", "state": "present", "vm": "vm", "uuid": UUID,
        "consistency": "crash", "running": False, **changes,
    }  # fmt: skip
    Path(f"{overlay}.snapshot.json").write_text(json.dumps(text))


def read_record(overlay: Path) -> dict[str, t.Any]:
    return dict(json.loads(Path(f"{overlay}.snapshot.json").read_text()))


def overlay(directory: Path, name: str, below: Path, *, pattern: int = 0, ours: bool = True) -> Path:
    """A snapshot NAME of ``below``, and a MiB of ``pattern`` written since."""
    path = images.create(directory / f"vda.{name}.qcow2", backing=below.name)
    if ours:
        record(path, name, below)
    if pattern:
        images.fill(path, [(MIB, MIB, pattern)])
    return path


@pytest.fixture
def chain(workdir: Path) -> list[Path]:
    """base <- s1 <- s2 <- s3, each with a change; the first one is the base."""
    found = [disk(workdir, "base", 8 * MIB)]
    for number in (1, 2, 3):
        found.append(overlay(workdir, f"s{number}", found[-1], pattern=number))
    return found


def apply(active: Path, name: str = "s1", *, check: bool = False, **params: t.Any) -> Result:
    arguments = {"path": str(active), "name": name, "type": "external", "state": "applied", **params}
    return run_module("qemu_img_snapshot", arguments, check=check, diff=True)


def listing(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("name", ["s1", "s2", "s3"])
@pytest.mark.parametrize("discarded", ["keep", "delete"])
def test_back_to_each(chain: list[Path], workdir: Path, name: str, discarded: str) -> None:
    active, snapshot = chain[-1], chain[int(name[1]) - 1]
    active.chmod(0o640)
    os.chown(active, 1234, 2345)
    before = {path: path.read_bytes() for path in chain}
    predicted = apply(active, name, check=True, discarded=discarded).ok()
    assert predicted.changed
    assert {path: path.read_bytes() for path in chain} == before
    result = apply(active, name, discarded=discarded).ok()
    assert result.changed
    for key in ("bitmaps", "discarded_bytes", "left_behind"):
        assert result.data[key] == predicted.data[key]
    assert result.data["diff"] == predicted.data["diff"]
    assert images.compare(active, snapshot)
    assert images.chain(active) == [str(path) for path in [active, *reversed(chain[: int(name[1])])]]
    assert images.info(active)["backing-filename"] == snapshot.name
    assert (active.stat().st_mode & 0o7777, active.stat().st_uid, active.stat().st_gid) == (0o640, 1234, 2345)
    assert (read_record(active)["name"], read_record(active)["state"]) == (name, "present")
    branch = chain[int(name[1]) :]
    if discarded == "keep":
        (kept,) = workdir.glob(f"{active.name}.discarded-*Z")
        assert kept.read_bytes() == before[active]
        assert read_record(kept)["state"] == "discarded"
        assert result.data["discarded"][0]["kept_as"] == str(kept)
        assert result.data["left_behind"] == [str(path) for path in reversed(branch[:-1])]
        assert images.check(kept).get("corruptions", 0) == 0
    else:
        assert not [path for path in branch[:-1] if path.exists() or Path(f"{path}.snapshot.json").exists()]
        there = {path.name for path in [*chain[: int(name[1])], active]}
        assert {entry.removesuffix(".snapshot.json") for entry in listing(workdir)} == there
    assert [path.read_bytes() == before[path] for path in chain[: int(name[1])]] == [True] * int(name[1])
    after = listing(workdir)
    assert not apply(active, name, discarded=discarded).ok().changed
    assert listing(workdir) == after
    images.fill(active, [(0, 512, 9)])
    assert apply(active, name, discarded=discarded, check=True).ok().changed
    assert apply(active, name, discarded=discarded).ok().changed
    assert images.compare(active, snapshot)


@pytest.mark.parametrize("discarded", ["keep", "delete"])
def test_killed_at_every_step(chain: list[Path], workdir: Path, discarded: str) -> None:
    """Whatever a kill leaves boots (the old branch or the snapshot), and the same task again ends right."""
    pristine, old = workdir / "pristine", workdir / "old.raw"
    images.run_tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", chain[-1], old)
    pristine.mkdir()
    for path in [*chain, *(Path(f"{path}.snapshot.json") for path in chain[1:])]:
        shutil.move(path, pristine / path.name)
    states = set()
    for number in range(200):
        site = workdir / f"site{number}"
        shutil.copytree(pristine, site)
        base, active = site / chain[0].name, site / chain[-1].name
        arguments = {
            "path": str(active), "name": "s1", "type": "external", "state": "applied", "discarded": discarded,
        }  # fmt: skip
        killed = start_module("qemu_img_snapshot", arguments, prelude=KILLER.format(number=number)).finish()
        if not killed.failed:
            break
        assert killed.rc == -9, killed
        rolled_back = images.compare(active, base)
        assert rolled_back or images.compare(active, old, "qcow2", "raw"), number
        states.add(rolled_back)
        apply(active, check=True, discarded=discarded).ok()
        apply(active, discarded=discarded).ok()
        expect_applied(site, base, active, discarded)
        assert not apply(active, discarded=discarded).ok().changed
        shutil.rmtree(site)
    else:
        raise AssertionError("it never came to its end")
    assert number > (15 if discarded == "keep" else 20)
    assert states == {True, False}


def expect_applied(site: Path, base: Path, active: Path, discarded: str) -> None:
    assert images.compare(active, base)
    assert images.check(active).get("corruptions", 0) == 0
    assert (read_record(active)["name"], read_record(active)["state"]) == ("s1", "present")
    there = {entry.removesuffix(".snapshot.json") for entry in listing(site)}
    asides = {entry for entry in there if ".discarded-" in entry}
    assert len(asides) == (1 if discarded == "keep" else 0)
    between = {"vda.s1.qcow2", "vda.s2.qcow2"} if discarded == "keep" else set()
    assert there - asides == {base.name, active.name, *between}, there
    for aside in asides:
        assert read_record(site / aside)["state"] == "discarded"


def test_what_another_image_needs_is_not_deleted(chain: list[Path], workdir: Path) -> None:
    other = images.create(workdir / "clone.qcow2", backing=chain[2].name)
    before = listing(workdir)
    for check in (True, False):
        error = apply(chain[-1], discarded="delete", check=check).data["error"]
        assert (error["kind"], error["dependents"]) == ("ImageHasDependents", str(other))
    assert listing(workdir) == before
    apply(chain[-1]).ok()  # nothing is deleted
    assert images.compare(chain[-1], chain[0])


def test_an_active_image_that_others_are_based_on_is_not_replaced(chain: list[Path], workdir: Path) -> None:
    images.create(workdir / "clone.qcow2", backing=chain[-1].name)
    assert apply(chain[-1]).data["error"]["kind"] == "ImageHasDependents"


def test_images_of_others_are_kept(workdir: Path) -> None:
    base = disk(workdir, "base", 8 * MIB)
    first = overlay(workdir, "s1", base, pattern=1)
    foreign = overlay(workdir, "theirs", first, pattern=2, ours=False)
    active = overlay(workdir, "s3", foreign, pattern=3)
    result = apply(active, discarded="delete").ok()
    assert [entry["path"] for entry in result.data["discarded"] if entry["deleted"]] == [str(active)]
    assert result.data["left_behind"] == [str(foreign), str(first)]
    assert foreign.exists() and first.exists()
    assert images.compare(active, base)


def test_an_active_image_of_others_is_kept_aside(workdir: Path) -> None:
    base = disk(workdir, "base", 8 * MIB)
    active = overlay(workdir, "theirs", overlay(workdir, "s1", base, pattern=1), pattern=2, ours=False)
    result = apply(active, discarded="delete").ok()
    (kept,) = workdir.glob("*.discarded-*Z")
    assert result.data["discarded"] == [
        {"path": str(active), "allocated": result.data["discarded"][0]["allocated"], "deleted": False,
         "kept_as": str(kept)}
    ]  # fmt: skip
    assert not Path(f"{kept}.snapshot.json").exists()
    assert read_record(active)["name"] == "s1"


def test_a_record_that_is_no_longer_true_is_not_believed(chain: list[Path]) -> None:
    """Somebody dropped s1's overlay and rebased s2's on the base: s2 is gone."""
    images.run_tool("qemu-img", "rebase", "-f", "qcow2", "-F", "qcow2", "-b", chain[0].name, chain[2])
    error = apply(chain[-1], "s2").data["error"]
    assert (error["kind"], error["known"]) == ("SnapshotMissing", "s3")


def test_moved_to_another_directory(chain: list[Path], workdir: Path) -> None:
    moved = workdir / "moved"
    moved.mkdir()
    for path in [*chain, *(Path(f"{path}.snapshot.json") for path in chain[1:])]:
        shutil.move(path, moved / path.name)
    active = moved / chain[-1].name
    apply(active, "s2", discarded="delete").ok()
    assert images.compare(active, moved / chain[1].name)


def test_raw_base_and_images_in_several_directories(workdir: Path) -> None:
    templates, vms = workdir / "templates", workdir / "vms"
    templates.mkdir()
    vms.mkdir()
    base = disk(templates, "base", 8 * MIB, "raw")
    active = images.create(vms / "vda.qcow2", backing=base, backing_fmt="raw", cluster_size=4096)
    record(active, "s1", base, "raw")
    images.fill(active, [(MIB, MIB, 2)])
    assert apply(active).data["error"]["problem"] == "Outside"
    result = apply(active, allowed_directories=[str(workdir)]).ok()
    assert result.data["chain"][0]["backing_file"] == str(base)
    assert images.compare(active, base, "qcow2", "raw")
    assert images.info(active)["cluster-size"] == 4096
    assert images.info(active)["backing-filename-format"] == "raw"


def test_in_use(chain: list[Path], workdir: Path, qemu_factory: QemuFactory) -> None:
    vm = qemu_factory("vm", [Drive("vda", chain[-1])])
    before = listing(workdir)
    for check in (True, False):
        error = apply(chain[-1], check=check).data["error"]
        assert error["kind"] == "ImageInUse"
        assert [holder["pid"] for holder in error["holders"]] == [vm.pid]
    assert listing(workdir) == before
    vm.quit()
    apply(chain[-1]).ok()


def test_no_vm_starts_in_the_middle(chain: list[Path]) -> None:
    """Stopped while it makes the new overlay, the module keeps a QEMU from writing to the old one."""
    prelude = KILLER.format(number=4).replace("os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 19)")
    arguments = {"path": str(chain[-1]), "name": "s1", "type": "external", "state": "applied"}
    running = start_module("qemu_img_snapshot", arguments, prelude=prelude)
    os.waitid(os.P_PID, running.process.pid, os.WSTOPPED | os.WNOWAIT)
    try:
        with pytest.raises(images.ImageToolFailed, match="lock"):
            images.run_tool("qemu-io", "-f", "qcow2", "-c", "write 0 512", chain[-1])
        assert apply(chain[-1]).data["error"]["kind"] == "ImageInUse"
    finally:
        running.process.send_signal(18)
    assert not running.finish().failed
    assert images.compare(chain[-1], chain[0])


def test_the_directory_cannot_be_written_or_is_full(chain: list[Path], workdir: Path) -> None:
    """Files that grow no more stand for a full disk: nothing happened, and nothing is left."""
    before = listing(workdir)
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    arguments = {"path": str(chain[-1]), "name": "s1", "type": "external", "state": "applied"}
    result = start_module("qemu_img_snapshot", arguments, prelude=prelude).finish()
    assert result.data["error"]["kind"] in ("ImageToolFailed", "FileFailed"), result
    assert listing(workdir) == before
    assert read_record(chain[-1])["name"] == "s3"


def test_encrypted_images_are_refused(workdir: Path, chain: list[Path]) -> None:
    with chain[-1].open("r+b") as stream:
        stream.seek(32)
        stream.write(bytes([0, 0, 0, 2]))
    assert apply(chain[-1]).data["error"]["kind"] == "SnapshotUnsupported"


# -- with backups ------------------------------------------------------------------------------------------------------


def live_snapshot(vm: Qemu, name: str) -> Path:
    """As qmp_snapshot does it: overlay and its bitmaps in one transaction, and the record."""
    below = vm.active_node("vda")
    image = Path(str(vm.drives["vda"].image))
    path = images.create(vm.directory / f"vda.{name}.qcow2", "16M")
    images.run_tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", image.name, "-F", "qcow2", path)
    record(path, name, image)
    protocol = {"driver": "file", "filename": str(path)}
    vm.execute("blockdev-add", {"driver": "qcow2", "node-name": name, "file": protocol, "backing": None})
    actions: list[dict[str, t.Any]] = [{"type": "blockdev-snapshot", "data": {"node": below, "overlay": name}}]
    for bitmap in sorted(vm.bitmaps("vda")):
        first, _dot, layer = bitmap.partition(".")
        data = {"node": name, "name": f"{first}.{int(layer or 0) + 1}", "persistent": True}
        actions.append({"type": "block-dirty-bitmap-add", "data": data})
    vm.execute("transaction", {"actions": actions})
    vm.drives["vda"] = Drive("vda", path)  # what its definition says from now on
    return path


@pytest.mark.parametrize("ending", ["quit", "kill"])
def test_the_next_backup_is_an_exact_incremental(workdir: Path, qemu_factory: QemuFactory, ending: str) -> None:
    site = Site(workdir)
    vm = qemu_factory("vm", [Drive("vda", disk(workdir, "vda"))], uuid=UUID)
    site.backup(vm)
    vm.write("vda", 2 * MIB, 64 * KIB, 2)
    active = live_snapshot(vm, "s1")
    vm.write("vda", 4 * MIB, MIB, 4)
    vm.kill9() if ending == "kill" else vm.quit()
    result = apply(active).ok()
    assert len(result.data["bitmaps"]) == 1 and result.data["bitmaps"][0].endswith(".1")
    vm.start()
    assert vm.holds("vda", 4 * MIB, MIB, 0)
    vm.write("vda", 6 * MIB, 64 * KIB, 6)
    point = site.backup(vm)
    assert point.levels == {"vda": "incremental"}
    assert point.drive("vda")["copied"] == 128 * KIB
    vm.write("vda", 7 * MIB, 64 * KIB, 7)
    point = site.backup(vm)
    assert point.levels == {"vda": "incremental"}
    site.check()
    vm.quit()
    assert images.compare(active, point.image("vda"))


def test_backups_of_the_discarded_branch_are_not_continued(workdir: Path, qemu_factory: QemuFactory) -> None:
    site = Site(workdir)
    vm = qemu_factory("vm", [Drive("vda", disk(workdir, "vda"))], uuid=UUID)
    full = site.backup(vm)
    live_snapshot(vm, "s1")
    vm.write("vda", 4 * MIB, MIB, 4)
    site.backup(vm)
    active = live_snapshot(vm, "s2")
    vm.write("vda", 5 * MIB, MIB, 5)
    site.backup(vm)
    vm.quit()
    apply(active, "s1", discarded="delete").ok()
    vm.start()
    vm.write("vda", 6 * MIB, 64 * KIB, 6)
    point = site.backup(vm)
    assert point.levels["vda"] == "full" or point.drive("vda")["parent"] == full.id, point.drive("vda")
    vm.write("vda", 7 * MIB, 64 * KIB, 7)
    assert site.backup(vm).levels == {"vda": "incremental"}
    site.check()


def test_snapshot_rollback_snapshot_rollback(workdir: Path, qemu_factory: QemuFactory) -> None:
    site = Site(workdir)
    vm = qemu_factory("vm", [Drive("vda", disk(workdir, "vda"))], uuid=UUID)
    site.backup(vm)
    for number in (1, 2, 3):
        vm.write("vda", number * MIB, 64 * KIB, number)
        active = live_snapshot(vm, f"s{number}")
        vm.write("vda", 8 * MIB, MIB, 8)
        vm.quit()
        apply(active, f"s{number}", discarded="delete").ok()
        vm.start()
        assert vm.holds("vda", 8 * MIB, MIB, 0) and vm.holds("vda", number * MIB, 64 * KIB, number)
        vm.write("vda", 10 * MIB, 64 * KIB, number)
        assert site.backup(vm).levels == {"vda": "incremental"}
    site.check()
