# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qemu_img_commit: into the image below and further down, killed at every step, with backups."""

from __future__ import annotations

import json
import os
import shutil
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.img_steps import KILLER
from support.module import Result, run_module, start_module
from support.points import KIB, MIB, Drive, Qemu, Site, disk

SIZE = 8 * MIB
SLOW = bool(os.environ.get("BLOCKOPS_SLOW"))
UUID = "6e0a8a62-3c1f-4a38-9a50-0e7c9a4f5b11"


def commit(path: Path, *, check: bool = False, **params: t.Any) -> Result:
    return run_module("qemu_img_commit", {"path": str(path), **params}, check=check, diff=True)


def listing(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def record(overlay: Path, name: str, image: Path) -> None:
    text = {
        "format": 1, "name": name, "drive": "vda", "overlay": str(overlay), "image": str(image),
        "image_format": "qcow2", "created": "2026-11-23T05:45:00Z", "state": "present", "consistency": "crash",
    }  # fmt: skip
    Path(f"{overlay}.snapshot.json").write_text(json.dumps(text))


@pytest.fixture
def chain(workdir: Path) -> list[Path]:
    """base <- s1 <- s2, each with a change and a record."""
    found = [disk(workdir, "base", SIZE)]
    for number in (1, 2):
        path = images.create(workdir / f"s{number}.qcow2", backing=found[-1].name)
        images.fill(path, [(number * MIB, MIB, number), (6 * MIB, MIB, number)])
        record(path, f"s{number}", found[-1])
        found.append(path)
    return found


@pytest.fixture
def old(chain: list[Path], workdir: Path) -> Path:
    """What the guest saw before."""
    path = workdir.with_name(f"{workdir.name}.old")
    images.run_tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", chain[-1], path)
    return path


@pytest.fixture(autouse=True)
def _clean(workdir: Path) -> t.Iterator[None]:
    yield
    workdir.with_name(f"{workdir.name}.old").unlink(missing_ok=True)


def expect_same(path: Path, old: Path) -> None:
    assert images.compare(path, old, "qcow2", "raw")
    assert images.info(path)["virtual-size"] == old.stat().st_size
    report = images.check(path)
    assert not report.get("corruptions") and not report.get("leaks"), report


@pytest.mark.parametrize("base", [None, "base.qcow2"])
@pytest.mark.parametrize("delete", [False, True])
def test_commit(chain: list[Path], old: Path, base: str | None, delete: bool) -> None:
    active = chain[-1]
    target = chain[0] if base else chain[1]
    params: dict[str, t.Any] = {"delete": delete, **({"base": base} if base else {})}
    before = {path: path.read_bytes() for path in chain}
    active.chmod(0o640)
    predicted = commit(active, check=True, **params).ok()
    assert {path: path.read_bytes() for path in chain} == before
    result = commit(active, **params).ok()
    assert predicted.changed and result.changed
    for key in ("base", "committed_bytes", "needed_bytes", "deleted", "left_behind", "diff", "bitmaps"):
        assert result.data[key] == predicted.data[key], key
    expect_same(target, old)
    middle = [chain[1]] if base else []
    there = {"base.qcow2", "s1.qcow2", "s2.qcow2"}
    if delete:
        assert result.data["deleted"] == [str(path) for path in [*middle, active]]
        assert not active.exists() and not [path for path in middle if path.exists()]
        there -= {"s2.qcow2", *(path.name for path in middle)}
        assert commit(active, **params).data["error"]["kind"] == "ImageMissing"
        assert not commit(active, missing_ok=True, **params).ok().changed
    else:
        expect_same(active, old)
        assert images.chain(active)[:2] == [str(active), str(target)]
        assert images.info(active)["backing-filename"] == target.name
        assert active.stat().st_size < MIB and active.stat().st_mode & 0o777 == 0o640
        assert result.data["left_behind"] == [str(path) for path in middle]
        assert not commit(active, **params).ok().changed
    names = set(listing(active.parent))
    assert {name for name in names if name.endswith(".qcow2")} == there
    assert f"{active.name}.snapshot.json" not in names
    info = run_module("qemu_img_info", {"images": [{"path": str(target if delete else active)}]}).ok()
    assert info.data["images"][0]["chain"] == result.data["chain"]


def test_numbers(chain: list[Path]) -> None:
    result = commit(chain[-1], base="base.qcow2", check=True).ok()
    assert (result.data["committed_bytes"], result.data["needed_bytes"]) == (3 * MIB, 3 * MIB)
    result = commit(chain[-1], check=True).ok()
    assert (result.data["committed_bytes"], result.data["needed_bytes"]) == (2 * MIB, MIB)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_base_grows(workdir: Path, fmt: str) -> None:
    base = disk(workdir, "base", 4 * MIB, fmt)
    active = images.create(workdir / "a.qcow2", SIZE, backing=base.name, backing_fmt=fmt)
    images.run_tool("qemu-img", "bitmap", "--add", "-f", "qcow2", active, "theirs")
    result = commit(active, delete=True).ok()  # it holds nothing, and is larger
    assert images.info(base, fmt)["virtual-size"] == SIZE
    assert result.data["lost_bitmaps"] == ["theirs"] and result.warnings
    bigger = images.create(workdir / "b.qcow2", SIZE, backing=base.name, backing_fmt=fmt)
    images.fill(bigger, [(7 * MIB, MIB, 5)])
    commit(bigger).ok()
    assert images.compare(bigger, base, "qcow2", fmt)


def test_a_larger_base(workdir: Path) -> None:
    base = disk(workdir, "base", SIZE)
    images.fill(base, [(6 * MIB, MIB, 3)])
    active = images.create(workdir / "a.qcow2", 4 * MIB, backing=base.name)
    images.fill(active, [(MIB, MIB, 5)])
    assert commit(active, delete=True).data["error"]["kind"] == "CommitUnsupported"
    commit(active).ok()
    assert images.info(active)["virtual-size"] == 4 * MIB
    assert images.info(base)["virtual-size"] == SIZE


def test_what_others_are_based_on_is_not_changed(chain: list[Path], workdir: Path) -> None:
    before = {path: path.read_bytes() for path in chain}
    for below, params in ((1, {}), (0, {"base": "base.qcow2"}), (1, {"base": "base.qcow2"}), (2, {"delete": True})):
        clone = images.create(workdir / "clone.qcow2", backing=chain[below].name)
        for check in (True, False):
            error = commit(chain[-1], check=check, **params).data["error"]
            assert (error["kind"], error["image"]) == ("ImageHasDependents", str(chain[below])), (below, params)
            assert error["dependents"] == str(clone)
        clone.unlink()
    assert {path: path.read_bytes() for path in chain} == before
    clone = images.create(workdir / "clone.qcow2", backing=chain[2].name)
    commit(chain[-1]).ok()  # it still shows the same
    assert images.compare(clone, chain[2])


def test_images_of_others_are_left(chain: list[Path], old: Path) -> None:
    Path(f"{chain[1]}.snapshot.json").unlink()
    result = commit(chain[-1], base="base.qcow2", delete=True).ok()
    assert result.data["left_behind"] == [str(chain[1])] and result.warnings
    assert chain[1].exists() and not chain[2].exists()
    expect_same(chain[0], old)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_in_use(chain: list[Path], qemu_factory: QemuFactory, number: int) -> None:
    vm = qemu_factory("vm", [Drive("vda", chain[number])])
    for check in (True, False):
        error = commit(chain[-1], base="base.qcow2", check=check).data["error"]
        assert error["kind"] == "ImageInUse" and [holder["pid"] for holder in error["holders"]] == [vm.pid]
    vm.quit()
    commit(chain[-1], base="base.qcow2").ok()


def test_refused(chain: list[Path]) -> None:
    assert commit(chain[0]).data["error"]["kind"] == "NoBase"
    assert commit(chain[-1], base="other.qcow2").data["error"]["known"] == f"{chain[1]}, {chain[0]}"
    assert commit(chain[-1], missing_ok=True).data["error"]["kind"] == "InputInvalid"
    images.run_tool("qemu-img", "snapshot", "-c", "inside", chain[1])
    assert commit(chain[-1], base="base.qcow2").data["error"]["kind"] == "CommitUnsupported"
    commit(chain[-1]).ok()  # the base may have some
    chain[0].unlink()
    assert commit(chain[-1]).data["error"]["kind"] == "ImageUnsafe"


@pytest.mark.parametrize("delete", [False, True])
def test_killed_at_every_step(chain: list[Path], old: Path, workdir: Path, delete: bool) -> None:
    """As long as the image is there it shows what it showed; then the base does. The same task again ends right."""
    name = "bo-12345678-20261123T054500Z-0000abcd"
    images.run_tool("qemu-img", "bitmap", "--add", "-f", "qcow2", chain[0], name)
    for number in (1, 2):
        images.run_tool("qemu-img", "bitmap", "--add", "-f", "qcow2", chain[number], f"{name}.{number}")
    pristine = workdir / "pristine"
    pristine.mkdir()
    for entry in listing(workdir):
        if entry != "pristine":
            shutil.move(workdir / entry, pristine / entry)
    arguments: dict[str, t.Any] = {"base": "base.qcow2", "delete": delete, "missing_ok": delete}
    for number in range(0 if SLOW else 1, 100, 1 if SLOW else 4):
        site = workdir / f"site{number}"
        shutil.copytree(pristine, site)
        active, base = site / "s2.qcow2", site / "base.qcow2"
        prelude = KILLER.format(number=number)
        killed = start_module("qemu_img_commit", {"path": str(active), **arguments}, prelude=prelude).finish()
        if not killed.failed:
            break
        assert killed.rc == -9, killed
        expect_same(active if active.exists() else base, old)
        commit(active, **arguments).ok()
        expect_same(base, old)
        left = {"base.qcow2"} if delete else {"base.qcow2", "s1.qcow2", "s1.qcow2.snapshot.json", "s2.qcow2"}
        found = set(listing(site))
        assert found - {"s2.qcow2.snapshot.json"} == left, (number, found)
        assert name in images.bitmaps(base)
        if not delete:
            expect_same(active, old)
            assert list(images.bitmaps(active)) == [f"{name}.1"], number
        shutil.rmtree(site)
    else:
        raise AssertionError("it never came to its end")
    assert number > 20


def test_again_and_again(chain: list[Path]) -> None:
    """What was left behind is in nobody's way."""
    active = chain[-1]
    for number in (3, 4):
        images.fill(active, [(5 * MIB, MIB, number)])
        result = commit(active, base="base.qcow2").ok()
        assert result.changed and result.data["committed_bytes"] == (4 * MIB if number == 3 else MIB)
        assert images.compare(active, chain[0])


def test_no_space(chain: list[Path], old: Path) -> None:
    """Files that grow no more stand for a full disk: the image hides a base that is half written."""
    prelude = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({3 * MIB}, {3 * MIB}))\n"
    result = start_module("qemu_img_commit", {"path": str(chain[-1]), "base": "base.qcow2"}, prelude=prelude).finish()
    assert result.data["error"]["kind"] == "ImageToolFailed", result
    expect_same(chain[-1], old)
    commit(chain[-1], base="base.qcow2", delete=True).ok()
    expect_same(chain[0], old)


# -- with backups ------------------------------------------------------------------------------------------------------


def live_snapshot(vm: Qemu, name: str) -> Path:
    """As qmp_snapshot does it: overlay and its bitmaps in one transaction, and the record."""
    below, image = vm.active_node("vda"), Path(str(vm.drives["vda"].image))
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
    vm.drives["vda"] = Drive("vda", path)
    return path


@pytest.mark.parametrize("delete", [False, True])
def test_the_next_backup_is_an_exact_incremental(workdir: Path, qemu_factory: QemuFactory, delete: bool) -> None:
    site = Site(workdir)
    image = disk(workdir, "vda")
    vm = qemu_factory("vm", [Drive("vda", image)], uuid=UUID)
    site.backup(vm)
    vm.write("vda", 2 * MIB, 64 * KIB, 2)
    live_snapshot(vm, "s1")
    vm.write("vda", 4 * MIB, 64 * KIB, 4)
    active = live_snapshot(vm, "s2")
    vm.write("vda", 5 * MIB, 64 * KIB, 5)
    vm.quit()
    result = commit(active, base=image.name, delete=delete).ok()
    assert len(result.data["bitmaps"]) == 1 and not result.data["lost_bitmaps"]
    vm.drives["vda"] = Drive("vda", image if delete else active)
    vm.start()
    vm.write("vda", 6 * MIB, 64 * KIB, 6)
    point = site.backup(vm)
    assert point.levels == {"vda": "incremental"}, point.reason("vda")
    assert point.drive("vda")["copied"] == 4 * 64 * KIB
    site.check()


def test_trim_and_the_next_backup(workdir: Path, qemu_factory: QemuFactory) -> None:
    """What qemu_img_rebase writes is nothing that a guest wrote."""
    site = Site(workdir)
    vm = qemu_factory("vm", [Drive("vda", disk(workdir, "vda"))], uuid=UUID)
    active = live_snapshot(vm, "s1")
    vm.write("vda", 0, MIB, 1)  # what is below, once more
    vm.write("vda", 4 * MIB, MIB, 4)
    site.backup(vm)
    vm.write("vda", 2 * MIB, 64 * KIB, 2)
    vm.quit()
    result = run_module("qemu_img_rebase", {"path": str(active), "trim": True}).ok()
    assert result.data["dropped_bytes"] == MIB and len(result.data["bitmaps"]) == 1
    vm.start()
    point = site.backup(vm)
    assert point.levels == {"vda": "incremental"}, point.reason("vda")
    assert point.drive("vda")["copied"] == 64 * KIB
    site.check()
