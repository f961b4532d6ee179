# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots with memory: the guest goes on from where it was, whatever was killed, and no drive goes back alone."""

from __future__ import annotations

import os
import shutil
import signal
import time
import typing as t
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import images
from lab.daemon import StorageDaemon
from lab.fixtures import LabVmFactory, QemuFactory
from support.backup import Bench, BenchFactory
from support.inside import (
    KIB,
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
    is_old,
    overwrite,
    predicted,
    snapshot,
    sound,
    tags,
)
from support.killer import prelude
from support.module import run_module, start_module

KIND: dict[str, t.Any] = {"type": "memory"}
BACK: dict[str, t.Any] = {"allow_reset": True, **KIND}
ADDRESS = 0x1000000


@pytest.fixture
def vm(workdir: Path, qemu_factory: QemuFactory) -> Qemu:
    return qemu_factory("vm", [Drive(name, disk(workdir, name)) for name in ("a", "b")], paused=False)


def image(vm: Qemu, drive: str) -> Path:
    found = vm.drives[drive].image
    assert found is not None
    return Path(found)


def status(vm: Qemu) -> str:
    return str(vm.command("query-status")["status"])


def test_taken_gone_back_to_and_removed(vm: Qemu) -> None:
    before = predicted(vm, **KIND)
    done = answer(snapshot(vm, **KIND))
    assert (done["status"], done["type"], done["consistency"]) == ("taken", "memory", "memory")
    assert done["transaction_ms"] > 0 and done["freeze_ms"] is None and done["point"]
    for key in ("status", "type", "drives", "skipped", "changed"):
        assert before[key] == done[key], key
    assert before["commands"] == done["commands"][:1]
    again = snapshot(vm, **KIND)
    assert (answer(again)["status"], again.changed) == ("present", False)
    overwrite(vm, "a", "b")
    assert not is_old(vm, "a")
    guess = predicted(vm, "reverted", **KIND)
    back = answer(snapshot(vm, "reverted", allow_reset=True))  # the kind that exists
    assert (back["status"], back["drives"]) == (guess["status"], guess["drives"]) == ("reverted", done["drives"])
    assert (status(vm), vm.jobs(), is_old(vm, "a", "b")) == ("running", [], True)
    overwrite(vm, "a", "b")
    gone = answer(snapshot(vm, "absent"))
    assert (gone["status"], gone["type"], status(vm)) == ("removed", "memory", "running")
    again = snapshot(vm, "absent", **KIND)
    assert (answer(again)["status"], again.changed) == ("absent", False)
    assert vm.holds("a", MIB, 2 * MIB, 0x42)
    vm.quit()
    for drive in ("a", "b"):
        assert tags(image(vm, drive)) == [] and not images.check(image(vm, drive)).get("leaks")


def test_the_memory_comes_back(lab_vm_factory: LabVmFactory) -> None:
    """A file in the guest's memory, a program that runs, and a disk."""
    vm = lab_vm_factory("vm")
    vm.exec("mkdir -p /run/ram && mount -t tmpfs none /run/ram && echo before >/run/ram/file")
    vm.exec("sleep 100000 >/dev/null 2>&1 & echo $! >/run/ram/pid")
    vm.write_file("/mnt/vda/file", b"before")
    answer(snapshot(vm, **KIND))
    vm.exec("echo after >/run/ram/file; kill $(cat /run/ram/pid)")
    vm.write_file("/mnt/vda/file", b"after")
    assert answer(snapshot(vm, "reverted", **BACK))["status"] == "reverted"
    vm.wait_agent()
    assert vm.exec("cat /run/ram/file; kill -0 $(cat /run/ram/pid) && echo lives") == "before\nlives\n"
    assert vm.read_file("/mnt/vda/file") == b"before"
    vm.write_file("/mnt/vda/more", b"and goes on")
    vm.exec("dmesg | grep -i ext4.*error && exit 1 || exit 0")
    answer(snapshot(vm, "absent", **KIND))


def test_going_back_has_to_be_allowed(vm: Qemu) -> None:
    snapshot(vm, **KIND).ok()
    before = facts(vm)
    assert failure(snapshot(vm, "reverted", **KIND))["kind"] == "ResetNotAllowed"
    assert failure(snapshot(vm, "reverted", name="other", **BACK))["kind"] == "SnapshotMissing"
    assert facts(vm) == before


def test_every_style_of_drive(workdir: Path, qemu_factory: QemuFactory) -> None:
    drives = [
        Drive("block", disk(workdir, "block"), device_options={"iothread": "io"}),
        Drive("old", disk(workdir, "old"), style="drive"),
        Drive("anon", disk(workdir, "anon"), style="legacy", device="virtio"),
        Drive("slow", disk(workdir, "slow"), throttle_bps=10**9),
        Drive("scsi", disk(workdir, "scsi"), device="scsi-hd"),
        Drive("ide", disk(workdir, "ide"), device="ide-hd"),
        Drive("stick", disk(workdir, "stick"), device="usb-storage", removable=True),
        Drive("cd", images.create(workdir / "cd.iso", MIB, "raw"), fmt="raw", device="ide-cd"),
    ]
    vm = qemu_factory("vm", drives, extra_args=["-object", "iothread,id=io"], paused=False)
    done = answer(snapshot(vm, **KIND))
    assert [skip["name"] for skip in done["skipped"]] == ["cd"]
    names = [drive.id for drive in drives if drive.id != "cd"]
    for _round in range(2):
        overwrite(vm, *names)
        assert not is_old(vm, "slow")
        answer(snapshot(vm, "reverted", **BACK))
        assert is_old(vm, *names) and status(vm) == "running"
    vm.quit()
    for drive in drives[:-1]:
        assert drive.image is not None
        applied_is_old(Path(drive.image))


def test_firmware_memory_has_to_be_qcow2(workdir: Path, qemu_factory: QemuFactory) -> None:
    raw = images.create(workdir / "nvram.raw", SIZE, "raw")
    vm = qemu_factory("vm", [Drive("pflash0", raw, fmt="raw", device="pflash0"), Drive("a", disk(workdir, "a"))])
    for check in (True, False):
        error = failure(snapshot(vm, check=check, **KIND))
        assert (error["kind"], error["drive"]) == ("DriveUnsuited", "pflash0-node") and "NVRAM" in error["message"]
    left = snapshot(vm, exclude_drives=["pflash0-node"], **KIND)
    assert answer(left)["status"] == "taken" and "pflash0-node" in left.warnings[0]
    good = Drive("pflash0", disk(workdir, "nvram"), device="pflash0")
    vm = qemu_factory("good", [good, Drive("a", disk(workdir, "c"))])
    done = answer(snapshot(vm, **KIND))
    assert len(done["drives"]) == 2 and done["commands"][0]["arguments"]["vmstate"] == "a-node"
    answer(snapshot(vm, "reverted", **BACK))


def test_a_device_that_cannot_be_saved(workdir: Path, qemu_factory: QemuFactory) -> None:
    vm = qemu_factory("vm", [Drive("n", disk(workdir, "n"), device="nvme")], paused=False)
    for check in (True, False):
        error = failure(snapshot(vm, check=check, **KIND))
        assert error["kind"] == "MemoryBlocked" and "nvme" in error["message"]
    assert status(vm) == "running"


def test_a_name_on_some_drives_only(vm: Qemu) -> None:
    left = snapshot(vm, drives=["a"], **KIND)
    assert "Drive b is left out" in left.ok().warnings[0]
    before = facts(vm)
    for state in ("present", "reverted"):
        for check in (True, False):
            assert failure(snapshot(vm, state, check=check, **BACK))["kind"] == "SnapshotIncomplete"
    assert facts(vm) == before
    assert answer(snapshot(vm, "absent", **KIND))["status"] == "removed"
    assert answer(snapshot(vm, **KIND))["status"] == "taken"
    vm.command("blockdev-snapshot-delete-internal-sync", device="a-node", name="s1")  # the one with the memory
    assert failure(snapshot(vm, "reverted", **BACK))["kind"] == "SnapshotMissing"
    assert answer(snapshot(vm, "absent"))["type"] == "internal"


def test_the_name_of_another_snapshot(vm: Qemu) -> None:
    snapshot(vm, type="internal").ok()  # has id 1
    assert failure(snapshot(vm, **KIND))["kind"] == "SnapshotNameTaken"
    assert failure(snapshot(vm, name="1", **KIND))["kind"] == "SnapshotNameNumeric"
    # somebody else's memory snapshot whose name is another one's id: QEMU would load that one
    vm.command(
        "snapshot-save", **{"job-id": "theirs", "tag": "1", "vmstate": "a-node", "devices": ["a-node", "b-node"]}
    )
    vm.command("job-dismiss", id="theirs")
    error = failure(snapshot(vm, "reverted", name="1", **BACK))
    assert (error["kind"], error["ids"], status(vm)) == ("SnapshotAmbiguous", "2, 1", "running")
    assert answer(snapshot(vm, "absent", name="1"))["type"] == "memory"
    assert tags(image(vm, "a")) == tags(image(vm, "b")) == ["s1"]


def test_a_paused_vm_stays_paused(workdir: Path, qemu_factory: QemuFactory) -> None:
    vm = qemu_factory("vm", [Drive("a", disk(workdir, "a"))])
    answer(snapshot(vm, **KIND))
    overwrite(vm, "a")
    back = snapshot(vm, "reverted", **BACK)
    assert answer(back)["status"] == "reverted" and "stays so" in back.warnings[0]
    assert (status(vm), is_old(vm, "a")) == ("prelaunch", True)


@pytest.mark.parametrize("crash", ["guest-panicked", "restore-vm"])
def test_a_crashed_guest_runs_again(workdir: Path, qemu_factory: QemuFactory, crash: str) -> None:
    more = ["-device", "pvpanic", "-action", "panic=pause"]
    vm = qemu_factory("vm", [Drive("a", disk(workdir, "a"))], extra_args=more, paused=False)
    answer(snapshot(vm, **KIND))
    if crash == "guest-panicked":
        vm.hmp("o /b 0x505 1")
        vm.wait_event("GUEST_PANICKED")
    else:  # as a load leaves it that fails
        vm.command("blockdev-snapshot-internal-sync", device="a-node", name="plain")
        vm.command("snapshot-load", **{"job-id": "theirs", "tag": "plain", "vmstate": "a-node", "devices": ["a-node"]})
        vm.wait_event("JOB_STATUS_CHANGE", id="theirs", status="concluded")
        vm.command("job-dismiss", id="theirs")
    assert status(vm) == crash
    answer(snapshot(vm, "reverted", **BACK))
    assert status(vm) == "running"


def test_a_guest_that_was_switched_off_runs_again(workdir: Path, qemu_factory: QemuFactory) -> None:
    vm = qemu_factory("vm", [Drive("a", disk(workdir, "a"))], extra_args=["-no-shutdown"], paused=False)
    answer(snapshot(vm, **KIND))
    overwrite(vm, "a")
    deadline = time.monotonic() + 60
    while status(vm) == "running" and time.monotonic() < deadline:
        vm.hmp("o /w 0x604 0x2000")  # ACPI's soft-off; the firmware has to have set the port up
    assert status(vm) == "shutdown"
    answer(snapshot(vm, "reverted", **BACK))
    assert (status(vm), is_old(vm, "a")) == ("running", True)


def test_bitmaps_of_others_are_in_the_way(vm: Qemu) -> None:
    snapshot(vm, **KIND).ok()
    overwrite(vm, "a", "b")
    vm.command("block-dirty-bitmap-add", node="b-node", name="theirs")
    before = facts(vm)
    for check in (True, False):
        error = failure(snapshot(vm, "reverted", check=check, **BACK))
        assert (error["kind"], error["drive"], error["bitmaps"]) == ("BitmapsInTheWay", "b", "theirs")
    assert facts(vm) == before and not is_old(vm, "a")
    vm.command("block-dirty-bitmap-remove", node="b-node", name="theirs")
    answer(snapshot(vm, "reverted", **BACK))
    assert is_old(vm, "a", "b")


def test_a_load_that_fails_half_way_is_mended_by_the_next(vm: Qemu) -> None:
    """A bitmap that another tool adds between our look and the load: drive a is back then, and b is not."""
    snapshot(vm, **KIND).ok()
    overwrite(vm, "a", "b")
    params = {"name": "s1", "state": "reverted", "vms": [{"name": vm.name, "socket": str(vm.socket)}], **BACK}
    running = start_module(
        "qmp_snapshot", params, prelude=prelude(Trap(label="qmp snapshot-load", sends=signal.SIGSTOP))
    )
    os.waitpid(running.process.pid, os.WUNTRACED)
    vm.command("block-dirty-bitmap-add", node="b-node", name="theirs")
    running.process.send_signal(signal.SIGCONT)
    result = running.finish()
    error = failure(result)
    assert (error["kind"], error["status"], result.changed) == ("MemoryNotLoaded", "restore-vm", True)
    assert (is_old(vm, "a"), is_old(vm, "b"), vm.jobs()) == (True, False, [])
    assert failure(snapshot(vm, "reverted", **BACK))["kind"] == "BitmapsInTheWay"
    vm.command("block-dirty-bitmap-remove", node="b-node", name="theirs")
    answer(snapshot(vm, "reverted", **BACK))
    assert (status(vm), is_old(vm, "a", "b")) == ("running", True)


def test_backups_before_across_and_after(bench_factory: BenchFactory) -> None:
    bench: Bench = bench_factory(2)
    bench.backup().ok()
    bench.change()
    answer(snapshot(bench.vm, **KIND))
    then = dict(bench.truth)
    bench.change()
    bench.backup().ok()
    assert set(bench.levels().values()) == {"incremental"}
    bench.change()
    guess = snapshot(bench.vm, "reverted", check=True, **BACK)
    back = snapshot(bench.vm, "reverted", **BACK)
    assert guess.warnings == back.ok().warnings and "full" in back.warnings[0]
    bench.truth = then
    bench.change()
    bench.backup().ok()
    assert set(bench.levels().values()) == {"full"}
    bench.change()
    answer(snapshot(bench.vm, "absent", **KIND))
    bench.change()
    bench.backup().ok()
    assert set(bench.levels().values()) == {"incremental"}
    bench.no_leftovers()
    bench.expect_restorable()
    bench.expect_live()


@pytest.mark.parametrize("state", ["present", "absent", "reverted"])
def test_a_kill_at_any_step(bench_factory: BenchFactory, workdir: Path, state: str) -> None:
    bench = bench_factory(2)
    vm = bench.vm
    wanted = [] if state == "absent" else ["s1"]

    def ready() -> dict[str, tuple[int, ...]]:
        snapshot(vm, "absent", **KIND).ok()
        if state != "present":
            snapshot(vm, **KIND).ok()
        then = dict(bench.truth)
        bench.backup().ok()
        bench.change()
        return then

    then = ready()
    log = workdir / "steps"
    snapshot(vm, state, Trap(log=str(log)), **BACK).ok()
    steps = log.read_text().splitlines()
    assert "qmp job-dismiss" in steps, steps
    bench.truth = then if state == "reverted" else bench.truth
    places: list[dict[str, t.Any]] = [{"number": number} for number in range(len(steps))]
    places += [{"label": f"after {step}", "nth": steps[: n + 1].count(step)} for n, step in enumerate(steps)]
    for place in places:
        then = ready()
        assert snapshot(vm, state, Trap(**place), **BACK).rc == -signal.SIGKILL, place
        guess = predicted(vm, state, **BACK)
        done = answer(snapshot(vm, state, **BACK))
        for key in ("status", "changed", "recovered"):
            assert done[key] == guess[key], (place, key)
        assert tags(image(vm, "d0")) == tags(image(vm, "d1")) == wanted, place
        assert (vm.jobs(), status(vm)) == ([], "running"), place
        bench.truth = then if state == "reverted" else bench.truth
        assert holds(bench), place
    bench.change()
    bench.backup().ok()
    bench.expect_live()
    for drive in ("d0", "d1"):
        sound(image(vm, drive))


def holds(bench: Bench) -> bool:
    """Whether the guest reads what the bench thinks it should."""
    unit = 64 * KIB
    return all(
        bench.vm.holds(drive, number * unit, unit, pattern)
        for drive, units in bench.truth.items()
        for number, pattern in enumerate(units)
    )


class Slow(t.NamedTuple):
    vm: Qemu
    image: Path


@contextmanager
def slow(workdir: Path, qemu_factory: QemuFactory) -> t.Iterator[Slow]:
    """A VM with 16 MiB of random memory whose disk takes 4 MiB per second, so that saving takes four seconds."""
    path = disk(workdir, "a")
    os.truncate(path, 64 * MIB)  # an export does not grow
    (workdir / "random").write_bytes(os.urandom(16 * MIB))
    server = workdir / "slow.nbd"
    nodes = [
        {"driver": "file", "node-name": "file", "filename": str(path)},
        {"driver": "throttle", "node-name": "slow", "throttle-group": "group", "file": "file"},
    ]
    more = ["--export", "type=nbd,id=export,node-name=slow,name=disk,writable=on"]
    limit = ["--object", f"throttle-group,id=group,x-bps-write={4 * MIB}"]
    listening = ["--nbd-server", f"addr.type=unix,addr.path={server}"]
    # QEMU drains a throttle of its own before it saves; one in another process goes on
    with _Throttled("slow", workdir, nodes, [*listening, *more], limit):
        protocol = {"driver": "nbd", "server": {"type": "unix", "path": str(server)}, "export": "disk"}
        loader = ["-device", f"loader,file={workdir / 'random'},addr={ADDRESS:#x},force-raw=on"]
        drives = [Drive("a", path, options={"file": protocol}), Drive("b", disk(workdir, "b"))]
        vm = qemu_factory("vm", drives, extra_args=loader, paused=False)
        try:
            yield Slow(vm, path)
        finally:
            vm.kill9()


class _Throttled(StorageDaemon):
    """A daemon whose objects come before its nodes."""

    def __init__(self, name: str, directory: Path, nodes: t.Any, more: list[str], objects: list[str]) -> None:
        super().__init__(name, directory, nodes, more)
        self._objects = objects

    def argv(self) -> list[str]:
        line = super().argv()
        return [line[0], *self._objects, *line[1:]]


def test_saving_outlasts_every_time_out(workdir: Path, qemu_factory: QemuFactory) -> None:
    """QEMU answers nothing meanwhile."""
    with slow(workdir, qemu_factory) as (vm, _path):
        done = answer(snapshot(vm, timeout=0.5, **KIND))
        assert done["status"] == "taken" and done["transaction_ms"] > 2000
        assert (status(vm), vm.jobs()) == ("running", [])
        answer(snapshot(vm, "absent", **KIND))
        error = failure(snapshot(vm, job_timeout=0.5, **KIND))
        assert error["kind"] == "SnapshotGoesOn"
        assert failure(snapshot(vm, timeout=0.2, **KIND))["kind"] == "SocketBusy"
        done = answer(snapshot(vm, **KIND))
        assert (done["status"], done["recovered"]) == ("present", ["snapshot-save of a run that was killed"])
        assert (status(vm), vm.jobs()) == ("running", [])
        assert tags(workdir / "b.qcow2") == ["s1"]


def test_qemu_dies_while_it_saves(workdir: Path, qemu_factory: QemuFactory) -> None:
    with slow(workdir, qemu_factory) as (vm, path):
        vm.flush()
        failure(snapshot(vm, job_timeout=0.5, **KIND))
        vm.kill9()
        assert tags(path) == tags(workdir / "b.qcow2") == []
        copy = shutil.copy(path, workdir / "copy.qcow2")  # the daemon has it open
        sound(copy)
        assert images.compare(copy, disk(workdir, "reference"))
        vm.restart()
        assert is_old(vm, "a", "b")
        done = answer(snapshot(vm, **KIND))
        assert (done["status"], done["recovered"]) == ("taken", [])
        overwrite(vm, "a", "b")
        answer(snapshot(vm, "reverted", **BACK))
        assert is_old(vm, "a", "b")
        vm.quit()
    sound(path)


def test_no_room_for_the_memory(workdir: Path, qemu_factory: QemuFactory) -> None:
    """The guest runs on, and no drive has half a snapshot."""
    path = disk(workdir, "a")
    os.truncate(path, path.stat().st_size)
    (workdir / "random").write_bytes(os.urandom(16 * MIB))
    full = {"driver": "raw", "size": SIZE + 2 * MIB, "file": {"driver": "file", "filename": str(path)}}
    os.truncate(path, SIZE + 2 * MIB)
    loader = ["-device", f"loader,file={workdir / 'random'},addr={ADDRESS:#x},force-raw=on"]
    drives = [Drive("a", path, options={"file": full}), Drive("b", disk(workdir, "b"))]
    vm = qemu_factory("vm", drives, extra_args=loader, paused=False)
    error = failure(snapshot(vm, **KIND))
    assert error["kind"] == "SnapshotFailed", error
    assert (status(vm), vm.jobs(), tags(path), tags(workdir / "b.qcow2")) == ("running", [], [], [])
    vm.quit()
    sound(path)


def test_a_group(workdir: Path, qemu_factory: QemuFactory) -> None:
    vms = [qemu_factory(name, [Drive("a", disk(workdir, name))], paused=False) for name in ("one", "two")]
    entries = [{"name": vm.name, "socket": str(vm.socket)} for vm in vms]
    done = run_module("qmp_snapshot", {"name": "s1", "group": True, "vms": entries, **KIND}).ok().data["vms"]
    assert [vm["status"] for vm in done] == ["taken", "taken"]
    assert done[0]["group_spread_ms"] is not None and done[0]["group_spread_ms"] == done[1]["group_spread_ms"]
