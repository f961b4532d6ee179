# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots, commits, streams and rollbacks between backups, by somebody else: the next backup is exact, or a full
that says why; it never lacks a change.
"""

from __future__ import annotations

import shutil
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.points import KIB, MIB, Drive, Point, Qemu, Site, disk


@pytest.fixture
def site(workdir: Path) -> Site:
    return Site(workdir)


@pytest.fixture
def vm(site: Site, qemu_factory: QemuFactory) -> Qemu:
    base = disk(site.directory, "base")
    images.fill(base, [(0, 6 * MIB, 0x11)])
    return qemu_factory("vm", [Drive("disk0", base)])


def write(qemu: Qemu, number: int) -> None:
    """Change ``number``: a place of its own, one that all share, and one that becomes zeros."""
    qemu.write("disk0", (6 + number) * MIB, 64 * KIB, 0x40 + number)
    qemu.write("disk0", 15 * MIB, 64 * KIB, 0x40 + number)
    qemu.qemu_io("disk0", f"write -z {number * 128 * KIB} {64 * KIB}")


def snapshot(qemu: Qemu, name: str, *, carry: bool, names_backing: bool = True) -> Path:
    """An external snapshot; with ``carry`` the overlay gets bitmaps in its transaction: NAME.1, the next one NAME.2."""
    below = qemu.active_node("disk0")
    names = sorted(qemu.bitmaps("disk0")) if carry else []
    path = qemu.directory / f"{name}.qcow2"
    base = next(node["image"]["filename"] for node in qemu.nodes().values() if node["node-name"] == below)
    header = ["-u", "-b", base, "-F", "qcow2"] if names_backing else []
    images.run_tool("qemu-img", "create", "-q", "-f", "qcow2", *header, path, str(16 * MIB))
    protocol = {"driver": "file", "filename": str(path)}
    qemu.execute("blockdev-add", {"driver": "qcow2", "node-name": name, "file": protocol, "backing": None})
    actions: list[dict[str, t.Any]] = [{"type": "blockdev-snapshot", "data": {"node": below, "overlay": name}}]
    for bitmap in names:
        first, _dot, layer = bitmap.partition(".")
        data = {"node": name, "name": f"{first}.{int(layer or 0) + 1}", "persistent": True}
        actions.append({"type": "block-dirty-bitmap-add", "data": data})
    qemu.execute("transaction", {"actions": actions})
    assert qemu.active_node("disk0") == name
    return path


def run_job(qemu: Qemu, command: str, *, pivot: bool = False, **arguments: t.Any) -> None:
    arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
    qemu.execute(command, {"job-id": "theirs", **arguments})
    if pivot:
        qemu.wait_event("JOB_STATUS_CHANGE", id="theirs", status="ready")
        qemu.command("job-complete", id="theirs")
    qemu.wait_event("JOB_STATUS_CHANGE", id="theirs", status="null")
    assert not qemu.jobs()


def exact_or_full(site: Site, point: Point) -> None:
    if point.levels["disk0"] == "full":
        assert point.reason("disk0") not in ("", "None")
    site.check()


def test_snapshot_without_bitmaps_gives_a_full_with_the_reason(site: Site, vm: Qemu) -> None:
    site.backup(vm)
    write(vm, 1)
    overlay = snapshot(vm, "s1", carry=False)
    write(vm, 2)
    point = site.backup(vm)
    assert point.levels == {"disk0": "full"}
    assert f"{overlay} has no bitmap" in point.reason("disk0")
    write(vm, 3)
    assert site.backup(vm).levels == {"disk0": "incremental"}
    site.check()


@pytest.mark.parametrize("names_backing", [True, False], ids=["backing in the header", "backing known to QEMU alone"])
@pytest.mark.parametrize("layers", [1, 3])
def test_snapshots_that_carry_the_bitmaps_give_an_incremental_of_all_layers(
    site: Site, vm: Qemu, layers: int, names_backing: bool
) -> None:
    site.backup(vm)
    for number in range(layers):
        write(vm, number)
        snapshot(vm, f"s{number}", carry=True, names_backing=names_backing)
    write(vm, layers)
    point = site.backup(vm)
    assert point.levels == {"disk0": "incremental"}
    assert point.drive("disk0")["copied"] == (2 * (layers + 1) + 1) * 64 * KIB
    write(vm, layers + 1)
    point = site.backup(vm)
    assert point.levels == {"disk0": "incremental"}
    assert point.drive("disk0")["copied"] == 3 * 64 * KIB
    site.check()
    vm.quit()
    if names_backing:
        assert images.compare(site.directory / f"s{layers - 1}.qcow2", point.image("disk0"))


def test_differential_across_a_snapshot(site: Site, vm: Qemu) -> None:
    full = site.backup(vm)
    write(vm, 1)
    site.backup(vm)
    write(vm, 2)
    snapshot(vm, "s1", carry=True)
    write(vm, 3)
    point = site.backup(vm, level="differential")
    assert point.drive("disk0")["parent"] == full.id
    write(vm, 4)
    assert site.backup(vm).levels == {"disk0": "incremental"}
    assert site.backup(vm, level="differential").drive("disk0")["parent"] == full.id
    site.check()


@pytest.mark.parametrize("carry", [True, False])
def test_active_layer_committed_before_the_next_backup(site: Site, vm: Qemu, carry: bool) -> None:
    """The commit writes what the overlay held into the base, whose bitmap marks it."""
    site.backup(vm)
    write(vm, 1)
    snapshot(vm, "s1", carry=carry)
    write(vm, 2)
    run_job(vm, "block-commit", device="s1", pivot=True)
    write(vm, 3)
    point = site.backup(vm)
    assert point.levels == {"disk0": "incremental"}
    site.check()


@pytest.mark.parametrize("carry", [True, False])
def test_active_layer_committed_after_a_backup_of_it(site: Site, vm: Qemu, carry: bool) -> None:
    site.backup(vm)
    write(vm, 1)
    snapshot(vm, "s1", carry=carry)
    write(vm, 2)
    site.backup(vm)
    write(vm, 3)
    run_job(vm, "block-commit", device="s1", pivot=True)
    write(vm, 4)
    exact_or_full(site, site.backup(vm))
    write(vm, 5)
    assert site.backup(vm).levels == {"disk0": "incremental"}
    site.check()


def test_middle_layer_committed(site: Site, vm: Qemu) -> None:
    site.backup(vm)
    write(vm, 1)
    snapshot(vm, "s1", carry=True)
    write(vm, 2)
    snapshot(vm, "s2", carry=True)
    write(vm, 3)
    run_job(vm, "block-commit", device="s2", top_node="s1", base_node="disk0-node")
    write(vm, 4)
    exact_or_full(site, site.backup(vm))


def test_whole_chain_streamed_into_the_active_layer(site: Site, vm: Qemu) -> None:
    site.backup(vm)
    write(vm, 1)
    snapshot(vm, "s1", carry=True)
    write(vm, 2)
    run_job(vm, "block-stream", device="s1")
    write(vm, 3)
    exact_or_full(site, site.backup(vm))
    write(vm, 4)
    assert site.backup(vm).levels == {"disk0": "incremental"}
    site.check()


def test_middle_layer_streamed_into_the_active_one(site: Site, vm: Qemu) -> None:
    """QEMU drops the bitmap of the middle layer, and marks nothing in the one above."""
    site.backup(vm)
    write(vm, 1)
    snapshot(vm, "s1", carry=True)
    write(vm, 2)
    snapshot(vm, "s2", carry=True)
    write(vm, 3)
    run_job(vm, "block-stream", device="s2", base_node="disk0-node")
    write(vm, 4)
    exact_or_full(site, site.backup(vm))


def test_restart_on_the_base_instead_of_the_overlay(site: Site, vm: Qemu) -> None:
    """A cold boot from a start-up definition that still names the old image: what it then holds is backed up."""
    site.backup(vm)
    write(vm, 1)
    snapshot(vm, "s1", carry=True)
    write(vm, 2)
    site.backup(vm)
    vm.restart()
    write(vm, 3)
    exact_or_full(site, site.backup(vm))
    write(vm, 4)
    assert site.backup(vm).levels == {"disk0": "incremental"}
    site.check()


def restarted(qemu_factory: QemuFactory, vm: Qemu, image: Path) -> Qemu:
    """The VM again, with another image for its drive."""
    if vm.running:
        vm.quit()
    return qemu_factory("vm", [Drive("disk0", image)], uuid=vm.uuid)


def test_restart_on_the_overlay(site: Site, vm: Qemu, qemu_factory: QemuFactory) -> None:
    site.backup(vm)
    write(vm, 1)
    overlay = snapshot(vm, "s1", carry=True)
    write(vm, 2)
    again = restarted(qemu_factory, vm, overlay)
    write(again, 3)
    point = site.backup(again)
    assert point.levels == {"disk0": "incremental"}
    site.check()


def test_overlay_committed_while_the_vm_was_off(site: Site, vm: Qemu) -> None:
    site.backup(vm)
    write(vm, 1)
    overlay = snapshot(vm, "s1", carry=False)
    write(vm, 2)
    vm.quit()
    images.run_tool("qemu-img", "commit", "-f", "qcow2", overlay)
    vm.start()
    write(vm, 3)
    assert site.backup(vm).levels == {"disk0": "incremental"}
    site.check()


def test_overlay_made_while_the_vm_was_off(site: Site, vm: Qemu, qemu_factory: QemuFactory) -> None:
    site.backup(vm)
    write(vm, 1)
    vm.quit()
    overlay = images.create(site.directory / "offline.qcow2", backing=site.directory / "base.qcow2")
    again = restarted(qemu_factory, vm, overlay)
    write(again, 2)
    point = site.backup(again)
    assert point.levels == {"disk0": "full"}
    assert "no bitmap" in point.reason("disk0")
    write(again, 3)
    assert site.backup(again).levels == {"disk0": "incremental"}
    site.check()


def test_older_copy_of_the_image_put_back(site: Site, vm: Qemu) -> None:
    """A bitmap travels with the content it belongs to, so an old copy tells the truth about itself."""
    base, aside = site.directory / "base.qcow2", site.directory / "aside"
    site.backup(vm)
    write(vm, 1)
    vm.quit()
    shutil.copyfile(base, aside)
    vm.start()
    write(vm, 2)
    site.backup(vm)
    write(vm, 3)
    vm.quit()
    shutil.copyfile(aside, base)
    vm.start()
    write(vm, 4)
    point = site.backup(vm)
    assert point.reason("disk0") not in ("", "None")
    exact_or_full(site, point)


def test_image_replaced_by_a_restored_one(site: Site, vm: Qemu) -> None:
    """What backup_restore (or qemu-img convert) puts there has no bitmaps."""
    first = site.backup(vm)
    write(vm, 1)
    site.backup(vm)
    vm.quit()
    base = site.directory / "base.qcow2"
    images.run_tool("qemu-img", "convert", "-O", "qcow2", first.image("disk0"), base)
    vm.start()
    write(vm, 2)
    point = site.backup(vm)
    assert point.levels == {"disk0": "full"}
    assert "replaced or restored" in point.reason("disk0")
    site.check()


@pytest.mark.parametrize("offline", [False, True])
def test_internal_snapshot_reverted(site: Site, vm: Qemu, offline: bool) -> None:
    """QEMU refuses to revert under a bitmap; should it ever do so, the backup must still be right."""
    base = site.directory / "base.qcow2"
    site.backup(vm)
    write(vm, 1)
    vm.execute("blockdev-snapshot-internal-sync", {"device": vm.active_node("disk0"), "name": "inner"})
    write(vm, 2)
    site.backup(vm)
    write(vm, 3)
    if offline:
        vm.quit()
        images.run_tool("qemu-img", "snapshot", "-a", "inner", base, accept=(0, 1))
        vm.start()
    else:
        vm.hmp("loadvm inner")
    write(vm, 4)
    exact_or_full(site, site.backup(vm))
