# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dropping external snapshots: long chains, jobs that fail or take long, guests that write, images that others need."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
import typing as t
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import images
from lab.daemon import StorageDaemon
from lab.fixtures import QemuFactory
from lab.qemu import Qemu
from support.chains import Chain
from support.killer import Trap, prelude
from support.module import start_module
from support.points import Drive
from support.shots import KIB, MIB, SIZE, UNIT, Shots, vm_of

CHAIN = 40
STOP = int(signal.SIGSTOP)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture
def shots(workdir: Path, qemu_factory: QemuFactory) -> Shots:
    base = images.create(workdir / "base.qcow2", SIZE)
    return Shots(qemu_factory("vm", [Drive("vda", base)], paused=False), workdir)


class Far(t.NamedTuple):
    """A VM whose base image is another host's, and fails once."""

    shots: Shots
    image: Path
    overlays: str


@contextmanager
def failing_storage(factory: QemuFactory, directory: Path, iotype: str) -> Iterator[Far]:
    """Its unit 50 fails the first time it is read or written."""
    image, server = images.create(directory / "far.raw", SIZE, "raw"), directory / "far.nbd"
    (directory / "overlays").mkdir()
    error = {"event": "none", "iotype": iotype, "errno": errno.EIO, "once": True, "sector": 50 * UNIT // 512}
    debug: dict[str, t.Any] = {"driver": "blkdebug", "node-name": "far", "inject-error": [error]}
    debug["image"] = {"driver": "file", "filename": str(image)}
    export = ["--nbd-server", f"addr.type=unix,addr.path={server}"]
    export += ["--export", "nbd,id=far,node-name=far,name=far,writable=on"]
    with StorageDaemon("far", directory, [debug], export):
        drive = Drive("vda", f"nbd+unix:///far?socket={server}", fmt="raw", style="drive")
        shots = Shots(factory("vm", [drive], paused=False), directory)
        yield Far(shots, image, str(directory / "overlays"))
        shots.qemu.close()


# --- long chains


def test_a_chain_of_forty(shots: Shots) -> None:
    """Taken, gone back to in the middle, dropped in any order: the later ones go aside, the others stay as they are."""
    names, before = [f"s{number}" for number in range(CHAIN)], time.monotonic()
    for name in names:
        shots.write("vda", int(name[1:]))
        shots.present(name)
        shots.write("vda", 100)
    assert len(shots.chain()) == CHAIN + 1
    shots.live()
    data = shots.reverted("s20")
    assert sorted(data["kept"]) == sorted(str(shots.directory / f"vda.{name}.qcow2") for name in names[20:])
    assert data["deleted"] == []
    shots.live()
    error = vm_of(shots.call("s30", "reverted", allow_reset=True))["error"]
    assert error["kind"] == "SnapshotMissing"
    assert vm_of(shots.call("s30", "absent"))["status"] == "absent"
    shots.write("vda", 101)
    # What was kept aside is based on what would change: it has to go first.
    assert shots.refused("s20", "absent", "ChainImageNeeded", merge="commit")["reasons"].count("vda.s20.qcow2") == 1
    for path in data["kept"]:
        os.unlink(path)
    order = names[:21]
    random.Random(5).shuffle(order)
    for number, name in enumerate(order):
        shots.absent(name, merge="stream" if number % 3 == 0 else "commit")
        shots.write("vda", 60 + number % 30)
        if number % 5 == 0:
            shots.live()
    shots.live()
    assert time.monotonic() - before < 120
    shots.off()


def test_gone_back_with_the_discarded_deleted(shots: Shots) -> None:
    for name in ("a", "b", "c", "d"):
        shots.change()
        shots.present(name)
    shots.change()
    data = shots.reverted("b", discarded="delete")
    assert sorted(Path(path).name for path in data["deleted"]) == ["vda.b.qcow2", "vda.c.qcow2", "vda.d.qcow2"]
    assert data["kept"] == []
    assert shots.chain() == ["vda.b-2.qcow2", "vda.a.qcow2", "base.qcow2"]
    shots.live()
    shots.reverted("a", discarded="delete")
    shots.live()
    shots.present("c")
    shots.change()
    shots.absent("a")
    shots.absent("c")
    assert shots.files() == ["base.qcow2"]
    shots.live()
    shots.off()


# --- jobs that fail


def reconnect(shots: Shots) -> None:
    """The storage hung up on QEMU after the error; QEMU notices at the next read, and connects again after it."""
    for _try in range(2):
        shots.qemu.qemu_io("vda", f"read {50 * UNIT} {UNIT}")


@pytest.mark.parametrize("merge", ["commit", "stream"])
@pytest.mark.parametrize("middle", [False, True])
def test_a_job_that_fails(workdir: Path, qemu_factory: QemuFactory, merge: str, middle: bool) -> None:
    """The chain is what it was, the error says what the snapshot is worth, and the same task finishes it later."""
    with failing_storage(qemu_factory, workdir, "write" if merge == "commit" else "read") as far:
        shots = far.shots
        where: dict[str, t.Any] = {"overlay_directory": far.overlays}
        if merge == "stream":
            shots.write("vda", 50)
        shots.change()
        shots.present("one", **where)
        if merge == "commit":
            shots.write("vda", 50)
        shots.change()
        if middle:
            shots.present("two", **where)
            shots.change()
        before = shots.state()
        result = shots.call("one", "absent", merge=merge, **where)
        error = vm_of(result)["error"]
        assert error["kind"] == "ChainJobFailed", error
        assert "vda" in error["message"] and merge in error["message"] and "Input/output" in error["message"]
        assert ("not gone back to" in error["message"]) == (merge == "commit")
        after = shots.state()
        assert after["nodes"] == before["nodes"] and after["active"] == before["active"]
        assert not shots.qemu.jobs() and not result.changed
        reconnect(shots)
        shots.live()
        if merge == "commit":
            spoilt = shots.refused("one", "reverted", "SnapshotSpoilt", allow_reset=True)
            assert "vda" in spoilt["message"]
            assert shots.refused("one", "present", "BeingRemoved")["overlay"].endswith("vda.one.qcow2")
        else:
            assert shots.call("one").ok().changed is False
        shots.change()
        shots.absent("one", merge=merge)
        shots.live()
        if middle:
            shots.change()
            shots.absent("two", merge="commit")
            shots.live()
        shots.qemu.quit()
        if merge == "commit":
            shots.judge(far.image, bytes(shots.truth["vda"]), "raw")


def test_going_back_after_a_stream_that_failed(workdir: Path, qemu_factory: QemuFactory) -> None:
    """It only read the snapshot."""
    with failing_storage(qemu_factory, workdir, "read") as far:
        shots = far.shots
        where: dict[str, t.Any] = {"overlay_directory": far.overlays}
        shots.write("vda", 50)
        shots.present("one", **where)
        shots.change()
        assert vm_of(shots.call("one", "absent", merge="stream"))["error"]["kind"] == "ChainJobFailed"
        reconnect(shots)
        shots.reverted("one", discarded="delete", **where)
        shots.live()
        shots.change()
        shots.absent("one", merge="commit")
        shots.live()
        shots.qemu.quit()
        shots.judge(far.image, bytes(shots.truth["vda"]), "raw")


@contextmanager
def mounted(directory: Path, size: int) -> Iterator[Path]:
    """A tmpfs of ``size`` bytes."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory: Path, leave: int) -> Path:
    """Fill the file system up to ``leave`` bytes."""
    status = os.statvfs(directory)
    filler = directory / "filler"
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, status.f_bavail * status.f_frsize - leave)
    return filler


@as_root
def test_no_space(workdir: Path, qemu_factory: QemuFactory) -> None:
    """Seen before the start; and when the file system fills up after that, the guest goes on."""
    with mounted(workdir / "small", 24 * MIB) as small:
        base = images.create(small / "base.qcow2", SIZE)
        (workdir / "overlays").mkdir()
        shots = Shots(qemu_factory("vm", [Drive("vda", base)], paused=False), workdir)
        shots.present("one", overlay_directory=str(workdir / "overlays"))
        shots.write("vda", 0, 48)
        filler = fill(small, MIB)
        error = shots.refused("one", "absent", "NoSpace")
        assert error["needed"] > error["available"] and error["path"] == str(small)
        filler.unlink()
        params = {"name": "one", "state": "absent", "quiesce": "off", "vms": [shots.entry]}
        running = start_module("qmp_snapshot", params, prelude=prelude(Trap(label="qmp block-commit", sends=STOP)))
        os.waitid(os.P_PID, running.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        filler = fill(small, 256 * KIB)
        running.process.send_signal(signal.SIGCONT)
        error = vm_of(running.finish())["error"]
        assert error["kind"] == "ChainJobFailed" and "No space left" in error["message"]
        shots.live()
        shots.write("vda", 100)
        filler.unlink()
        shots.absent("one")
        shots.live()
        shots.off()
        shots.qemu.close()


# --- jobs that take long


@pytest.mark.parametrize("merge", ["commit", "stream"])
@pytest.mark.parametrize("middle", [False, True])
def test_a_job_that_takes_longer_than_allowed(shots: Shots, merge: str, middle: bool) -> None:
    """It goes on, the error says so; nothing else is done to the VM meanwhile; the next run follows it to its end."""
    shots.write("vda", 0, 64)
    shots.present("one")
    shots.write("vda", 32, 64)
    if middle:
        shots.present("two")
        shots.write("vda", 100)
    result = shots.call("one", "absent", merge=merge, job_timeout=0.5, bandwidth=128 * KIB)
    error = vm_of(result)["error"]
    assert error["kind"] == "ChainJobUnfinished" and error["timeout"] == 0.5 and "vda" in error["message"]
    (job,) = shots.qemu.jobs()
    assert job["id"] == error["job"] and job["status"] == "running"
    for name, state in (("three", "present"), ("two", "absent"), ("one", "reverted"), ("two", "reverted")):
        if name == "two" and not middle:
            continue
        refused = vm_of(shots.call(name, state, allow_reset=True))["error"]
        assert refused["kind"] in ("JobsRunning", "SnapshotSpoilt"), refused
    shots.write("vda", 101)
    data = shots.absent("one", merge=merge, bandwidth=1 << 40)
    assert not [command for command in data["commands"] if command["execute"] in ("block-commit", "block-stream")]
    shots.live()
    if middle:
        shots.absent("two", merge="commit")
        shots.live()
    shots.off()


@pytest.mark.parametrize("lower", ["base", "ours"])
@pytest.mark.parametrize("merge", ["commit", "stream"])
@pytest.mark.parametrize("middle", [False, True])
def test_a_job_that_nobody_followed(shots: Shots, merge: str, middle: bool, lower: str) -> None:
    """It came to its end while no module looked: the next run clears up after it, as if it had been there."""
    if lower == "ours":
        shots.write("vda", 5)
        shots.present("zero")
    shots.write("vda", 0, 32)
    shots.present("one")
    shots.write("vda", 16, 32)
    if middle:
        shots.present("two")
        shots.write("vda", 100)
    error = vm_of(shots.call("one", "absent", merge=merge, job_timeout=0.2, bandwidth=MIB))["error"]
    assert error["kind"] == "ChainJobUnfinished"
    shots.qemu.command("block-job-set-speed", device=error["job"], speed=0)
    ended = "pending" if middle or merge == "stream" else "ready"
    shots.qemu.wait_event("JOB_STATUS_CHANGE", id=error["job"], status=ended)
    result = shots.call("one", "absent", merge=merge).ok()
    assert result.changed
    again = shots.call("one", "absent").ok()
    assert not again.changed
    assert not [warning for warning in again.warnings if "COLD START" not in warning], again.warnings
    gone = "vda.one.qcow2" if merge == "commit" else "vda.zero.qcow2"
    assert gone not in shots.files() and f"{gone}.snapshot.json" not in shots.files()
    shots.live()
    if lower == "ours":
        assert vm_of(shots.call("zero"))["status"] == "present"
        shots.absent("zero", merge="commit")
    if middle:
        shots.absent("two", merge="commit")
    shots.live()
    assert not [name for name in shots.files() if name.endswith(".json")], shots.files()
    shots.off()


@pytest.mark.parametrize("merge", ["commit", "stream"])
def test_a_job_that_another_module_left(workdir: Path, qemu_factory: QemuFactory, merge: str) -> None:
    """One way to merge: what a killed task of either module has begun, a task of the other one finishes."""
    base = images.create(workdir / "base.qcow2", SIZE)
    chain = Chain(qemu_factory("vm", [Drive("vda", base)], paused=False), workdir)
    chain.grow(3)
    drop: dict[str, t.Any] = {"name": "s1", "state": "absent", "merge": merge, "quiesce": "off", "vms": [chain.entry]}
    start_module("qmp_snapshot", drop, prelude=prelude(Trap(label=f"after qmp block-{merge}"))).finish()
    (job,) = chain.qemu.jobs()
    data = chain.commit(keep=["s0", "s2"], merge="commit", delete=True)
    assert not [each for each in data["commands"] if each["execute"] in ("block-commit", "block-stream")], job
    assert len(chain.chain()) == 3
    chain.judge_snapshots("s0", "s2")
    trap = Trap(label=f"after qmp block-{merge}")
    chain.run("qmp_block_commit", trap=trap, keep=["s2"], merge=merge, delete=True)
    assert len(chain.qemu.jobs()) == 1
    done = chain.absent("s0", merge=merge)
    assert not [each for each in done["commands"] if each["execute"] in ("block-commit", "block-stream")]
    chain.judge_snapshots("s2")
    chain.live()
    chain.off()


def test_bandwidth(shots: Shots) -> None:
    shots.present("one")
    shots.write("vda", 0, 48)
    before = time.monotonic()
    shots.absent("one", bandwidth=MIB)
    assert 1.5 < time.monotonic() - before < 15
    shots.off()


@pytest.mark.parametrize("merge", ["commit", "stream"])
@pytest.mark.parametrize("middle", [False, True])
def test_a_guest_that_writes_all_the_time(shots: Shots, merge: str, middle: bool) -> None:
    """What it writes while the images are merged is neither lost nor late."""
    shots.write("vda", 0, 96)
    shots.present("one")
    shots.write("vda", 48, 64)
    if middle:
        shots.present("two")
    params = {"name": "one", "state": "absent", "quiesce": "off", "merge": merge, "bandwidth": 2 * MIB}
    running = start_module("qmp_snapshot", {**params, "vms": [shots.entry]})
    written, chooser = 0, random.Random(merge)
    while running.process.poll() is None:
        if written < 300:  # a commit whose speed is limited never catches up with a guest that writes faster
            shots.write("vda", chooser.randrange(120))
            written += 1
        time.sleep(0.005)
    assert vm_of(running.finish().ok())["status"] == "removed"
    assert written > 20
    shots.live()
    if middle:
        shots.absent("two")
    shots.live()
    shots.off()


# --- which way, and what forbids it


def test_auto_copies_what_is_less(shots: Shots) -> None:
    """Streaming only into the place of an image that is ours to delete."""
    shots.write("vda", 0)
    shots.present("one")
    shots.write("vda", 0)
    shots.present("two")
    shots.write("vda", 0, 64)
    plan = vm_of(shots.call("two", "absent", check=True))["drives"][0]
    assert plan["merge"] == "stream" and plan["bytes"] < 8 * UNIT
    data = shots.absent("two")
    assert (data["drives"][0]["merge"], data["drives"][0]["bytes"]) == ("stream", plan["bytes"])
    assert [Path(path).name for path in data["deleted"]] == ["vda.one.qcow2"]
    assert shots.chain() == ["vda.two.qcow2", "base.qcow2"]
    shots.live()
    # The overlay now is the one of snapshot one.
    assert vm_of(shots.call("one"))["status"] == "present"
    assert vm_of(shots.call("one", "absent", check=True))["drives"][0]["merge"] == "commit"
    shots.reverted("one", discarded="delete")
    shots.live()
    shots.change()
    shots.absent("one")
    assert shots.files() == ["base.qcow2"]
    shots.off()


def test_a_top_that_is_larger_than_its_base(shots: Shots) -> None:
    """The guest's disk was grown since: the image below grows with it."""
    shots.change()
    shots.present("one")
    shots.qemu.command("block_resize", node_name=shots.qemu.active_node("vda"), size=2 * SIZE)
    shots.truth["vda"] += bytes(SIZE)
    shots.write("vda", 2 * SIZE // UNIT - 1)
    error = shots.refused("one", "reverted", "DriveUnsuited", allow_reset=True)
    assert "vda" in error["message"] and "resized" in error["message"] and "switched off" in error["message"]
    shots.present("two")
    shots.write("vda", 2 * SIZE // UNIT - 2)
    shots.absent("one", merge="commit")
    shots.live()
    shots.absent("two", merge="commit")
    shots.live()
    shots.off()


@pytest.mark.parametrize("based_on", ["base", "one"])
@pytest.mark.parametrize("merge", ["commit", "stream"])
def test_a_linked_clone(shots: Shots, merge: str, based_on: str) -> None:
    """Another image is based on the one that would change or go: refused, unless that does neither."""
    shots.change()
    shots.present("one")
    shots.change()
    shots.present("two")
    shots.change()
    below = shots.directory / {"base": "base.qcow2", "one": "vda.one.qcow2"}[based_on]
    clone = shots.directory / "clone.qcow2"
    images.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", below, "-F", "qcow2", clone, str(SIZE))
    name = "one" if merge == "commit" else "two"
    if (merge, based_on) == ("stream", "base"):
        shots.absent("two", merge="stream")  # copies vda.one up, and reads base only
        assert shots.chain() == ["vda.two.qcow2", "base.qcow2"]
    else:
        error = shots.refused(name, "absent", "ChainImageNeeded", merge=merge)
        assert f"{below} is used by {clone}" in error["reasons"]
        clone.unlink()
        shots.absent(name, merge=merge)
    shots.live()
    shots.off()


def test_an_image_that_another_process_has_open(shots: Shots) -> None:
    shots.change()
    shots.present("one")
    shots.change()
    with (shots.directory / "base.qcow2").open("rb") as stream:
        reader = subprocess.Popen(["sleep", "60"], stdin=stream)
        try:
            error = shots.refused("one", "absent", "ChainImageNeeded", merge="commit")
            assert f"process {reader.pid}" in error["reasons"] and "sleep" in error["reasons"]
        finally:
            reader.kill()
            reader.wait()
    shots.absent("one")
    shots.live()
    shots.off()


def test_internal_snapshots_in_the_images(workdir: Path, qemu_factory: QemuFactory) -> None:
    """They stay, and tell what they told, when external ones are taken, gone back to and committed above them."""
    base = images.create(workdir / "base.qcow2", SIZE)
    images.fill(base, [(0, UNIT, 0x55)])
    images.run_tool("qemu-img", "snapshot", "-c", "inner", base)
    shots = Shots(qemu_factory("vm", [Drive("vda", base)], paused=False), workdir)
    shots.truth["vda"][:UNIT] = b"\x55" * UNIT
    shots.write("vda", 0)
    shots.present("one")
    shots.change()
    node = shots.qemu.active_node("vda")
    shots.qemu.execute("blockdev-snapshot-internal-sync", {"device": node, "name": "upper"})
    shots.change()
    shots.live()
    shots.reverted("one", discarded="keep")
    shots.live()
    (workdir / "vda.one.qcow2").unlink()
    shots.change()
    shots.present("two")
    shots.change()
    shots.absent("one", merge="commit")
    shots.live()
    shots.absent("two", merge="commit")
    shots.live()
    shots.off()
    copy = workdir / "inner.raw"
    images.run_tool("qemu-img", "convert", "-l", "snapshot.name=inner", "-O", "raw", base, copy)
    assert copy.read_bytes() == b"\x55" * UNIT + bytes(SIZE - UNIT)


# --- another life


@pytest.mark.parametrize("style", ["blockdev", "drive"])
@pytest.mark.parametrize("then", ["commit", "stream", "reverted", "present"])
def test_a_snapshot_taken_in_the_life_before(
    workdir: Path, qemu_factory: QemuFactory, style: t.Literal["blockdev", "drive"], then: str
) -> None:
    """QEMU was started anew from the overlay; the record says what it is."""
    base = images.create(workdir / "base.qcow2", SIZE)
    first = Shots(qemu_factory("vm", [Drive("vda", base, style=style)], paused=False), workdir)
    first.change()
    first.present("one")
    first.change()
    first.off()
    again = qemu_factory("vm", [Drive("vda", workdir / "vda.one.qcow2", style=style)], paused=False)
    _then(_continued(first, again), then)


@pytest.mark.parametrize("then", ["commit", "reverted", "present"])
def test_images_moved_to_another_directory(workdir: Path, qemu_factory: QemuFactory, then: str) -> None:
    """The chain names its files without a directory, and the records go with them."""
    home, other = workdir / "home", workdir / "other"
    home.mkdir()
    base = images.create(home / "base.qcow2", SIZE)
    first = Shots(qemu_factory("vm", [Drive("vda", base)], paused=False), workdir)
    first.change()
    first.present("one")
    first.change()
    first.off()
    shutil.move(home, other)
    again = qemu_factory("vm", [Drive("vda", other / "vda.one.qcow2")], paused=False)
    shots = _continued(first, again)
    _then(shots, then)
    assert not home.exists()
    assert {path.parent for path in workdir.rglob("vda.*")} <= {other}


def _continued(first: Shots, again: Qemu) -> Shots:
    shots = Shots(again, first.directory)
    shots.truth, shots.past = first.truth, first.past
    return shots


def _then(shots: Shots, then: str) -> None:
    shots.live()
    shots.change()
    if then == "present":
        assert vm_of(shots.call("one").ok())["status"] == "present"
        shots.present("two")
        shots.change()
        shots.absent("two")
    elif then == "reverted":
        shots.reverted("one", discarded="delete")
        shots.live()
        shots.change()
    shots.absent("one", merge="stream" if then == "stream" else "commit")
    shots.live()
    shots.off()


def test_started_from_the_base_by_an_old_definition(workdir: Path, qemu_factory: QemuFactory) -> None:
    """The overlay of the life before is in no chain: it may hold what the guest wrote, so it stays, and is told of."""
    base = images.create(workdir / "base.qcow2", SIZE)
    shots = Shots(qemu_factory("vm", [Drive("vda", base)], paused=False), workdir)
    shots.present("one")
    shots.change()
    shots.off()
    shots.qemu.start()
    shots.truth["vda"] = bytearray(SIZE)
    result = shots.call("one", "absent").ok()
    assert not result.changed
    assert vm_of(result)["kept"] == [str(workdir / "vda.one.qcow2")]
    assert any("vda.one.qcow2" in warning for warning in result.warnings)
    shots.live()
