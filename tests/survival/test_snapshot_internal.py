# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Internal snapshots of running VMs: every style of drive, names others use, kills at every step, backups across."""

from __future__ import annotations

import os
import signal
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import LabVmFactory, QemuFactory
from support.backup import Bench, BenchFactory
from support.inside import (
    MIB,
    SIZE,
    Drive,
    Qemu,
    Trap,
    answer,
    applied_is_old,
    disk,
    facts,
    failure,
    overwrite,
    predicted,
    snapshot,
    tags,
)
from support.killer import prelude
from support.module import run_module, start_module

KIND: dict[str, t.Any] = {"type": "internal"}
DELETE = "qmp blockdev-snapshot-delete-internal-sync"


@pytest.fixture
def vm(workdir: Path, qemu_factory: QemuFactory) -> Qemu:
    return qemu_factory("vm", [Drive(name, disk(workdir, name)) for name in ("a", "b")])


def image(vm: Qemu, drive: str) -> Path:
    found = vm.drives[drive].image
    assert found is not None
    return Path(found)


def test_taken_kept_and_removed(vm: Qemu) -> None:
    before = predicted(vm, **KIND)
    done = answer(snapshot(vm, **KIND))
    assert (done["status"], done["type"], done["consistency"]) == ("taken", "internal", "crash")
    assert done["point"] and done["transaction_ms"] is not None and done["freeze_ms"] is None
    for key in ("status", "type", "drives", "skipped", "commands", "changed"):
        assert before[key] == done[key], key
    overwrite(vm, "a", "b")
    assert predicted(vm, **KIND)["status"] == "present"
    again = snapshot(vm, **KIND)
    assert (answer(again)["status"], again.changed, answer(again)["commands"]) == ("present", False, [])
    assert tags(image(vm, "a")) == tags(image(vm, "b")) == ["s1"]
    vm.quit()
    applied_is_old(image(vm, "a"))
    applied_is_old(image(vm, "b"))


@pytest.mark.parametrize("kind", [{}, KIND])
def test_absent_keeps_what_was_written_since(vm: Qemu, workdir: Path, kind: dict[str, t.Any]) -> None:
    snapshot(vm, **KIND).ok()
    overwrite(vm, "a", "b")
    before = predicted(vm, "absent", **kind)
    done = answer(snapshot(vm, "absent", **kind))
    assert (done["status"], done["type"], before["commands"]) == ("removed", "internal", done["commands"])
    again = snapshot(vm, "absent", **kind)
    assert (answer(again)["status"], again.changed) == ("absent", False)
    vm.quit()
    reference = disk(workdir, "reference")
    images.fill(reference, [(MIB, 2 * MIB, 0x42)])
    for drive in ("a", "b"):
        assert tags(image(vm, drive)) == [] and images.compare(image(vm, drive), reference)
        assert not images.check(image(vm, drive)).get("leaks")


def test_a_running_vm_cannot_go_back(vm: Qemu) -> None:
    snapshot(vm, **KIND).ok()
    for kind in ({}, KIND):
        error = failure(snapshot(vm, "reverted", allow_reset=True, **kind))
        assert error["kind"] == "NotWhileRunning" and "vm_rollback" in error["message"]
    assert failure(snapshot(vm, "reverted", name="other", **KIND))["kind"] == "SnapshotMissing"


def test_every_style_of_drive(workdir: Path, qemu_factory: QemuFactory) -> None:
    iothread = {"iothread": "io"}
    drives = [
        Drive("block", disk(workdir, "block"), device_options=iothread),
        Drive("old", disk(workdir, "old"), style="drive"),
        Drive("anon", disk(workdir, "anon"), style="legacy", device="virtio"),
        Drive("slow", disk(workdir, "slow"), throttle_bps=10**9),
        Drive("scsi", disk(workdir, "scsi"), device="scsi-hd"),
        Drive("ide", disk(workdir, "ide"), device="ide-hd"),
        Drive("nvme", disk(workdir, "nvme"), device="nvme"),
        Drive("pflash0", disk(workdir, "flash"), device="pflash0"),
    ]
    vm = qemu_factory("vm", drives, extra_args=["-object", "iothread,id=io"], paused=False)
    done = answer(snapshot(vm, **KIND))
    assert len(done["drives"]) == len(drives) and not done["skipped"]
    assert answer(snapshot(vm, **KIND))["status"] == "present"
    assert answer(snapshot(vm, "absent", **KIND))["status"] == "removed"
    snapshot(vm, **KIND).ok()
    overwrite(vm, *(drive.id for drive in drives if not drive.is_firmware))
    vm.quit()
    for drive in drives:
        assert drive.image is not None
        applied_is_old(Path(drive.image))


def test_drives_that_cannot_have_one_are_named(workdir: Path, qemu_factory: QemuFactory) -> None:
    data = images.create(workdir / "outside.qcow2", SIZE, data_file=workdir / "outside.raw")
    drives = [
        Drive("a", disk(workdir, "a")),
        Drive("plain", images.create(workdir / "plain.raw", SIZE, "raw"), fmt="raw"),
        Drive("outside", data),
        Drive("fixed", disk(workdir, "fixed"), readonly=True),
        Drive("stick", disk(workdir, "stick"), device="usb-storage", removable=True),
        Drive("cd", None, device="ide-cd"),
    ]
    vm = qemu_factory("vm", drives)
    before = facts(vm)
    cases: list[tuple[dict[str, t.Any], str, str]] = [
        ({}, "plain", "type=external"),
        ({"exclude_drives": ["plain"]}, "outside", "exclude_drives"),
        ({"drives": ["a", "plain"]}, "plain", "type=external"),
        ({"drives": ["fixed"]}, "fixed", ""),
        ({"drives": ["nothing"]}, "nothing", ""),
    ]
    for options, drive, way in cases:
        for check in (True, False):
            error = failure(snapshot(vm, check=check, **KIND, **options))
            assert (error["kind"], error["drive"]) == ("DriveUnsuited", drive) and way in error["message"]
    assert facts(vm) == before
    done = answer(snapshot(vm, exclude_drives=["plain", "outside"], **KIND))
    assert [drive["name"] for drive in done["drives"]] == ["a"]
    assert {skip["name"] for skip in done["skipped"]} == {"plain", "outside", "fixed", "stick", "cd"}


def test_a_name_on_some_drives_only(vm: Qemu) -> None:
    snapshot(vm, drives=["a"], **KIND).ok()
    for check in (True, False):
        error = failure(snapshot(vm, check=check, **KIND))
        assert (error["kind"], error["has"], error["lacks"]) == ("SnapshotIncomplete", "a", "b")
    assert answer(snapshot(vm, drives=["a"], **KIND))["status"] == "present"
    assert [drive["name"] for drive in answer(snapshot(vm, "absent", **KIND))["drives"]] == ["a"]
    assert answer(snapshot(vm, **KIND))["status"] == "taken"
    assert [drive["name"] for drive in answer(snapshot(vm, "absent", drives=["b"]))["drives"]] == ["b"]
    assert (tags(image(vm, "a")), tags(image(vm, "b"))) == (["s1"], [])


def test_names_that_look_like_ids(vm: Qemu) -> None:
    assert failure(snapshot(vm, name="1", **KIND))["kind"] == "SnapshotNameNumeric"
    snapshot(vm, **KIND).ok()  # has id 1
    vm.command("blockdev-snapshot-internal-sync", device="a-node", name="1")  # has id 2
    assert answer(snapshot(vm, "absent", name="1", **KIND))["status"] == "removed"
    assert tags(image(vm, "a")) == ["s1"]


def test_two_of_one_name_made_by_another_tool(workdir: Path, qemu_factory: QemuFactory) -> None:
    path = disk(workdir, "a")
    for _time in range(2):
        images.run_tool("qemu-img", "snapshot", "-c", "s1", path)
    vm = qemu_factory("vm", [Drive("a", path)])
    for state in ("present", "absent"):
        error = failure(snapshot(vm, state, **KIND))
        assert (error["kind"], error["ids"]) == ("SnapshotAmbiguous", "1, 2")
    vm.command("blockdev-snapshot-delete-internal-sync", device="a-node", id="1")
    assert answer(snapshot(vm, "absent", **KIND))["status"] == "removed"
    assert tags(path) == []


def test_the_name_of_a_memory_snapshot(vm: Qemu) -> None:
    snapshot(vm, type="memory").ok()
    for check in (True, False):
        assert failure(snapshot(vm, check=check, **KIND))["kind"] == "SnapshotNameTaken"
    kept = snapshot(vm, "absent", **KIND)
    assert (answer(kept)["status"], kept.changed) == ("absent", False) and "type=memory" in kept.warnings[0]
    assert tags(image(vm, "a")) == ["s1"]


def test_a_job_is_refused_but_not_where_nothing_is_to_do(vm: Qemu, workdir: Path) -> None:
    snapshot(vm, **KIND).ok()
    target = images.create(workdir / "target.qcow2", SIZE)
    vm.command(
        "blockdev-add",
        **{"driver": "qcow2", "node-name": "target", "file": {"driver": "file", "filename": str(target)}},
    )
    vm.command(
        "blockdev-backup", **{"job-id": "theirs", "device": "a-node", "target": "target", "sync": "full", "speed": 1}
    )
    assert answer(snapshot(vm, **KIND))["status"] == "present"
    for check in (True, False):
        assert failure(snapshot(vm, "absent", check=check, **KIND))["kind"] == "JobsRunning"
        assert failure(snapshot(vm, name="s2", check=check, **KIND))["kind"] == "JobsRunning"


def test_qemu_refuses_one_drive_and_no_drive_has_it(vm: Qemu) -> None:
    """Somebody is quicker on the second drive, between our look and our transaction."""
    entry = {"name": vm.name, "socket": str(vm.socket)}
    trap = prelude(Trap(label="qmp transaction", sends=signal.SIGSTOP))
    running = start_module("qmp_snapshot", {"name": "s1", "quiesce": "off", "vms": [entry], **KIND}, prelude=trap)
    os.waitpid(running.process.pid, os.WUNTRACED)
    vm.command("blockdev-snapshot-internal-sync", device="b-node", name="s1")
    running.process.send_signal(signal.SIGCONT)
    error = failure(running.finish())
    assert error["kind"] == "SnapshotFailed" and "already exists" in error["message"]
    assert (tags(image(vm, "a")), tags(image(vm, "b"))) == ([], ["s1"])
    assert failure(snapshot(vm, **KIND))["kind"] == "SnapshotIncomplete"


def test_removing_fails_half_way(vm: Qemu) -> None:
    """Another tool removes it from the second drive first."""
    snapshot(vm, **KIND).ok()
    params = {"name": "s1", "state": "absent", "vms": [{"name": vm.name, "socket": str(vm.socket)}], **KIND}
    running = start_module("qmp_snapshot", params, prelude=prelude(Trap(label=f"after {DELETE}", sends=signal.SIGSTOP)))
    os.waitpid(running.process.pid, os.WUNTRACED)
    vm.command("blockdev-snapshot-delete-internal-sync", device="b-node", name="s1")
    running.process.send_signal(signal.SIGCONT)
    result = running.finish()
    error = failure(result)
    assert (error["kind"], error["done"], error["left"], result.changed) == ("SnapshotNotRemoved", "a", "b", True)
    assert answer(snapshot(vm, "absent", **KIND))["status"] == "absent"


@pytest.mark.parametrize("state", ["present", "absent"])
def test_a_kill_at_any_step(vm: Qemu, workdir: Path, state: str) -> None:
    def ready() -> None:
        snapshot(vm, "absent", **KIND).ok()
        if state == "absent":
            snapshot(vm, **KIND).ok()

    ready()
    log = workdir / "steps"
    snapshot(vm, state, Trap(log=str(log)), **KIND).ok()
    steps = log.read_text().splitlines()
    assert steps == (["qmp transaction"] if state == "present" else [DELETE, DELETE])
    labels: list[dict[str, t.Any]] = [{"label": f"after {step}", "nth": n + 1} for n, step in enumerate(steps)]
    for place in [{"number": number} for number in range(len(steps))] + labels:
        ready()
        assert snapshot(vm, state, Trap(**place), **KIND).rc == -signal.SIGKILL, place
        guess = predicted(vm, state, **KIND)
        done = answer(snapshot(vm, state, **KIND))
        assert (done["status"], done["changed"]) == (guess["status"], guess["changed"]), place
        assert tags(image(vm, "a")) == tags(image(vm, "b")) == (["s1"] if state == "present" else []), place
    vm.quit()
    for drive in ("a", "b"):
        assert not images.check(image(vm, drive)).get("corruptions")


def test_qemu_dies_after_it(vm: Qemu) -> None:
    snapshot(vm, **KIND).ok()
    overwrite(vm, "a", "b")
    vm.kill9()
    vm.restart()
    assert answer(snapshot(vm, **KIND))["status"] == "present"
    assert failure(snapshot(vm, "reverted", **KIND))["kind"] == "NotWhileRunning"
    vm.quit()
    applied_is_old(image(vm, "a"))


def test_under_an_external_snapshot(vm: Qemu, workdir: Path) -> None:
    snapshot(vm, **KIND).ok()
    snapshot(vm, name="outer", type="external").ok()
    error = failure(snapshot(vm, "reverted", **KIND))
    assert error["kind"] == "SnapshotMissing" and str(image(vm, "a")) in error["message"]
    gone = snapshot(vm, "absent", **KIND)
    assert (answer(gone)["status"], gone.changed) == ("absent", False) and str(image(vm, "a")) in gone.warnings[0]
    snapshot(vm, name="outer", state="absent", merge="commit").ok()
    assert answer(snapshot(vm, "absent", **KIND))["status"] == "removed"


def test_backups_go_on_as_increments(bench_factory: BenchFactory) -> None:
    bench: Bench = bench_factory(2)
    bench.backup().ok()
    for step in ("present", "absent"):
        bench.change()
        assert answer(snapshot(bench.vm, step, **KIND))["status"] == ("taken" if step == "present" else "removed")
        bench.change()
        bench.backup().ok()
        assert set(bench.levels().values()) == {"incremental"}
        bench.no_leftovers()
    bench.expect_restorable()
    bench.expect_live()


def test_a_group_of_frozen_guests(lab_vm_factory: LabVmFactory) -> None:
    vms = [lab_vm_factory(name) for name in ("one", "two")]
    entries = [{"name": vm.name, "socket": str(vm.socket)} for vm in vms]
    params = {"name": "s1", "group": True, "quiesce": "required", "vms": entries, **KIND}
    done = run_module("qmp_snapshot", params).ok().data["vms"]
    for vm in done:
        assert (vm["status"], vm["consistency"]) == ("taken", "filesystem") and vm["freeze_ms"] > 0
        assert vm["group_spread_ms"] is not None and vm["group_spread_ms"] == done[0]["group_spread_ms"]
    assert all(vm.agent("guest-fsfreeze-status") == "thawed" for vm in vms)
    assert [vm["status"] for vm in run_module("qmp_snapshot", params).ok().data["vms"]] == ["present", "present"]
