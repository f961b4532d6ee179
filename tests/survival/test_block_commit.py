# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qmp_block_commit on real chains: ranges, states, what forbids it, backups that go on, kills, errors, long chains."""

from __future__ import annotations

import os
import signal
import time
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.chains import Chain, failing_storage, fill, mounted
from support.killer import Trap
from support.points import Drive, Site
from support.shots import MIB, SIZE, UNIT, vm_of

STOP = int(signal.SIGSTOP)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
SLOW = bool(os.environ.get("BLOCKOPS_SLOW"))


@pytest.fixture
def chain(workdir: Path, qemu_factory: QemuFactory) -> Chain:
    base = images.create(workdir / "base.qcow2", SIZE)
    return Chain(qemu_factory("vm", [Drive("vda", base)], paused=False), workdir)


# --- ranges


def test_all_into_the_base(chain: Chain) -> None:
    """Predicted, done, done once; the emptied files stay until told to go."""
    chain.grow(3)
    predicted, data = chain.commit_predicted(base="base.qcow2")
    assert data["status"] == predicted["status"] == "merged"
    assert chain.chain() == ["base.qcow2"]
    assert [step["how"] for step in data["drives"][0]["steps"]] == ["commit"]
    assert len(data["kept"]) == 3 and data["deleted"] == []
    assert not chain.again(base="base.qcow2")["kept"]
    chain.live()
    chain.write("vda", 5)
    predicted, data = chain.commit_predicted(base="base.qcow2", delete=True)
    assert data["status"] == "unchanged" and len(data["deleted"]) == 3
    assert chain.files() == ["base.qcow2"]
    chain.live()
    chain.off()


def test_a_range_in_the_middle(chain: Chain) -> None:
    """By the names of snapshots; those above and below are what they were."""
    chain.grow(5)
    _predicted, data = chain.commit_predicted(top="s3", base="s1", delete=True)
    # Snapshot s3 is the image below its overlay: vda.s2.qcow2; and s1 is vda.s0.qcow2.
    assert chain.chain() == ["vda.s4.qcow2", "vda.s3.qcow2", "vda.s0.qcow2", "base.qcow2"]
    assert [Path(path).name for path in data["deleted"]] == ["vda.s2.qcow2", "vda.s1.qcow2"]
    chain.live()
    chain.judge_snapshots("s0", "s3", "s4")
    chain.again(top="vda.s1.qcow2", base="base.qcow2")
    chain.off()


def test_by_node_name_and_bad_references(chain: Chain) -> None:
    chain.grow(2)
    assert chain.refused(base="nothing.qcow2")["kind"] == "ImageNotInChain"
    assert chain.refused(top="base.qcow2", base=chain.node(1))["kind"] == "WrongOrder"
    assert chain.refused(base="base.qcow2", drives=["vdz"])["kind"] == "DriveUnsuited"
    chain.commit(base=chain.node(1), delete=True)
    assert chain.chain() == ["vda.s0.qcow2", "base.qcow2"]
    chain.live()
    chain.off()


@pytest.mark.parametrize("active", [True, False])
def test_a_top_that_is_larger_than_its_base(chain: Chain, active: bool) -> None:
    chain.grow(1)
    chain.resize(2 * SIZE)
    chain.write("vda", 2 * SIZE // UNIT - 1)
    if not active:
        chain.present("s1")
        chain.change()
    chain.commit(top="vda.s0.qcow2", base="base.qcow2", delete=True)
    chain.live()
    assert images.info(chain.directory / "base.qcow2")["virtual-size"] == 2 * SIZE
    chain.off()


def test_relative_and_absolute_backing_names_stay_so(chain: Chain) -> None:
    chain.grow(1)
    (chain.directory / "elsewhere").mkdir()
    chain.present("far", overlay_directory=str(chain.directory / "elsewhere"))
    chain.change()
    chain.present("s2", overlay_directory=str(chain.directory / "elsewhere"))
    chain.commit(top="elsewhere/vda.far.qcow2", base="base.qcow2")
    header = images.info(chain.directory / "elsewhere" / "vda.s2.qcow2")["backing-filename"]
    assert header == "../base.qcow2"
    chain.live()
    chain.off()


# --- a state


def test_max_depth_drops_the_oldest(chain: Chain) -> None:
    chain.grow(6)
    _predicted, data = chain.commit_predicted(max_depth=3, delete=True)
    assert len(chain.chain()) == 3 and len(data["deleted"]) == 4
    chain.judge_snapshots("s4", "s5")
    chain.again(max_depth=3, delete=True)
    chain.live()
    chain.commit(max_depth=1, delete=True)
    assert len(chain.files()) == 1 + len(chain.names())
    chain.live()
    chain.off()


def test_keep(chain: Chain) -> None:
    """What is kept reads as it did, and can be gone back to; a misspelt name is no reason to drop the one meant."""
    chain.grow(6)
    assert chain.refused(keep=["s1", "s9"])["kind"] == "SnapshotUnknown"
    error = chain.refused(keep=["s1", "s4"], max_depth=2)
    assert error["kind"] == "ChainTooDeep" and "s1" in error["message"]
    chain.commit_predicted(keep=["s1", "s4"], delete=True)
    chain.judge_snapshots("s1", "s4")
    assert len(chain.chain()) == 3
    chain.again(keep=["s1", "s4"], delete=True)
    chain.reverted("s4", discarded="delete")
    chain.live()
    chain.reverted("s1", discarded="delete")
    chain.live()
    chain.commit(keep=[], delete=True)
    chain.live()
    chain.off()


def test_older_than(chain: Chain) -> None:
    chain.grow(4)
    for name in ("s0", "s2"):
        chain.backdate(f"vda.{name}.qcow2", "2020-01-01T00:00:00Z")
    chain.commit_predicted(older_than="1d", keep=["s0"], delete=True)
    chain.judge_snapshots("s0", "s1", "s3")
    chain.again(older_than="1d", keep=["s0"])
    chain.live()
    chain.commit(older_than="1d", delete=True)
    chain.judge_snapshots("s1", "s3")
    chain.off()


def test_the_planner_takes_both_directions(chain: Chain) -> None:
    """The largest of each group stays; the snapshot in the middle of two groups is not touched."""
    sizes = (1, 40, 1, 1, 1, 60, 1)
    for number, size in enumerate(sizes):
        chain.present(f"s{number}")
        chain.write("vda", number, size)
    chain.write("vda", 100)
    _predicted, data = chain.commit_predicted(keep=["s0", "s4"], delete=True)
    steps = [(step["how"], Path(step["target"]).name, len(step["dropped"])) for step in data["drives"][0]["steps"]]
    assert steps == [
        ("commit", "vda.s5.qcow2", 1), ("stream", "vda.s5.qcow2", 1),
        ("commit", "vda.s1.qcow2", 2), ("stream", "vda.s1.qcow2", 1),
    ]  # fmt: skip
    assert data["drives"][0]["bytes"] < 16 * UNIT + 7 * MIB  # metadata counts, the data of the largest does not
    assert chain.chain() == ["vda.s5.qcow2", "vda.s1.qcow2", "base.qcow2"]
    chain.judge_snapshots("s0", "s4")
    chain.live()
    chain.again(keep=["s0", "s4"], delete=True)
    chain.off()


def test_foreign_images_are_not_judged(chain: Chain) -> None:
    """An overlay by another tool is no snapshot of ours: a state leaves it alone, a range takes it, its file stays."""
    chain.grow(1)
    chain.foreign("theirs")
    chain.change()
    chain.grow(2, 1)
    assert chain.refused(max_depth=1)["kind"] == "ChainTooDeep"
    chain.commit_predicted(keep=[], delete=True)
    assert "vda.theirs.qcow2" in chain.chain() and len(chain.chain()) == 2
    chain.live()
    _predicted, data = chain.commit_predicted(base="base.qcow2", delete=True)
    assert data["kept"] == [str(chain.directory / "vda.theirs.qcow2")]
    assert chain.files() == ["base.qcow2", "vda.theirs.qcow2"]
    chain.live()
    chain.off()


# --- what forbids it


@pytest.mark.parametrize("based_on", ["base.qcow2", "vda.s0.qcow2", "vda.s1.qcow2"])
def test_a_linked_clone(chain: Chain, based_on: str) -> None:
    chain.grow(3)
    clone = chain.directory / "clone.qcow2"
    images.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", based_on, "-F", "qcow2", clone, str(SIZE))
    error = chain.refused(base="base.qcow2")
    assert error["kind"] == "ChainImageNeeded" and "clone.qcow2" in error["message"] and based_on in error["message"]
    clone.unlink()
    chain.commit(base="base.qcow2", delete=True)
    chain.live()
    chain.off()


def test_a_base_that_two_vms_share(chain: Chain, qemu_factory: QemuFactory) -> None:
    """It lies elsewhere than the other one's overlay, so that only its being open tells."""
    chain.grow(1)
    (chain.directory / "other").mkdir()
    clone = chain.directory / "other" / "clone.qcow2"
    base = chain.directory / "base.qcow2"
    images.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", base, "-F", "qcow2", clone, str(SIZE))
    other = qemu_factory("other", [Drive("vda", clone)])
    error = chain.refused(base="base.qcow2")
    assert error["kind"] == "ChainImageNeeded" and str(other.pid) in error["message"]
    chain.grow(2, 1)
    chain.commit(keep=["s0"], delete=True)
    chain.commit(base="base.qcow2", merge="stream", delete=True)
    assert chain.files()[0] == "base.qcow2"
    chain.live()
    other.quit()
    assert images.compare(clone, base)
    chain.off()


def test_a_base_that_two_drives_share(workdir: Path, qemu_factory: QemuFactory) -> None:
    """Of one VM: to commit into it would change what the other drive shows."""
    base = images.create(workdir / "base.qcow2", SIZE)
    drives = []
    for name in ("vda", "vdb"):
        overlay = workdir / f"{name}.qcow2"
        images.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay, str(SIZE))
        drives.append(Drive(name, overlay))
    chain = Chain(qemu_factory("vm", drives, paused=False), workdir)
    chain.change()
    error = chain.refused(base="base.qcow2", drives=["vda"])
    assert error["kind"] == "ChainImageNeeded" and "vdb.qcow2" in error["message"]
    chain.off()


def test_while_a_backup_runs(chain: Chain) -> None:
    site = Site(chain.directory)
    chain.write("vda", 0, 100)
    chain.grow(1)
    site.call(chain.qemu, bandwidth=MIB // 4, wait=False).ok()
    assert chain.refused(base="base.qcow2")["kind"] == "JobsRunning"
    site.call(chain.qemu, state="cancelled").ok()
    chain.commit(base="base.qcow2", delete=True)
    chain.live()
    chain.off()


def test_internal_snapshots_are_not_lost(chain: Chain) -> None:
    chain.grow(1)
    chain.qemu.command("blockdev-snapshot-internal-sync", device=chain.qemu.active_node("vda"), name="inner")
    chain.grow(1, 1)
    error = chain.refused(base="base.qcow2")
    assert error["kind"] == "ChainImageNeeded" and "inner" in error["message"]
    chain.off()


@as_root
def test_no_room(chain: Chain, workdir: Path, qemu_factory: QemuFactory) -> None:
    with mounted(workdir / "small", 12 * MIB) as small:
        base = images.create(small / "base.qcow2", 4 * SIZE)
        (workdir / "overlays").mkdir()
        own = Chain(qemu_factory("little", [Drive("vda", base)], paused=False), workdir / "overlays", size=4 * SIZE)
        own.present("s0", overlay_directory=str(workdir / "overlays"))
        own.write("vda", 0, 250)
        error = own.refused(keep=[])
        assert error["kind"] == "NoSpace" and error["needed"] > error["available"] and error["path"] == str(small)
        own.qemu.close()


# --- backups go on


COMBINATIONS = [(how, backups) for how in ("commit", "stream", "auto") for backups in ("both", "below", "between")]


@pytest.mark.parametrize(("how", "backups"), COMBINATIONS if SLOW else COMBINATIONS[::2])
def test_the_next_backup_is_an_exact_increment(chain: Chain, how: str, backups: str) -> None:
    """Whichever image was active at the backup, and whether or not that one is dropped."""
    site = Site(chain.directory)
    if backups in ("below", "both"):
        site.backup(chain.qemu)
    chain.grow(1)
    if backups in ("between", "both"):
        site.backup(chain.qemu)
    chain.grow(3, 1)
    chain.commit(top="vda.s2.qcow2", base="vda.s0.qcow2", merge=how, delete=True)
    chain.change()
    _incremental(chain, site)
    chain.grow(1, 5)
    chain.commit(base="base.qcow2", merge=how, delete=True)
    chain.change()
    _incremental(chain, site)
    chain.grow(2, 6)
    chain.commit(max_depth=2, merge=how)
    _incremental(chain, site)
    chain.live()
    chain.off()


def _incremental(chain: Chain, site: Site) -> None:
    point = site.backup(chain.qemu)
    assert point.levels == {"vda": "incremental"}, point.reason("vda")
    site.check()


def test_a_differential_across_merges(chain: Chain) -> None:
    site = Site(chain.directory)
    full = site.backup(chain.qemu)
    chain.grow(2)
    site.backup(chain.qemu)
    chain.grow(2, 2)
    chain.commit(keep=["s3"], merge="commit", delete=True)
    chain.change()
    point = site.backup(chain.qemu, level="differential")
    assert point.drive("vda")["parent"] == full.id and point.levels == {"vda": "differential"}
    site.check()
    chain.off()


def test_exchanged_drives_do_not_go_on_from_each_others_backup(workdir: Path, qemu_factory: QemuFactory) -> None:
    """The origin of a moved bitmap is in its name: of a swapped pair it is the wrong one."""
    bases = [images.create(workdir / f"{name}.qcow2", SIZE) for name in ("a", "b")]
    qemu = qemu_factory("vm", [Drive("vda", bases[0]), Drive("vdb", bases[1])], paused=False)
    chain, site = Chain(qemu, workdir, ("vda", "vdb")), Site(workdir)
    chain.change()
    chain.present("s0")
    site.backup(qemu)
    chain.change()
    chain.commit(keep=[], merge="commit", delete=True)
    _same = site.backup(qemu)
    assert set(_same.levels.values()) == {"incremental"}
    chain.present("s1")
    site.backup(qemu)
    chain.change()
    chain.commit(keep=[], merge="commit", delete=True)
    qemu.quit()
    swapped = qemu_factory("vm2", [Drive("vda", bases[1]), Drive("vdb", bases[0])], uuid=qemu.uuid)
    (data,) = site.call({"name": "vm", "socket": str(swapped.socket)}).ok().data["vms"]
    assert {drive["level"] for drive in data["drives"]} == {"full"}
    site.check()


# --- errors


def test_a_job_that_is_cancelled_while_ready(chain: Chain) -> None:
    """By somebody else, in the instant before the switch: the guest goes on where it was."""
    chain.grow(2)
    trap = Trap(label="qmp job-complete", sends=STOP)
    with chain.stopped(trap, base="base.qcow2") as running:
        chain.qemu.command("job-cancel", id=chain.qemu.jobs()[0]["id"])
        chain.wait_jobs("concluded")
    error = vm_of(running.finish())["error"]
    assert error["kind"] in ("ChainJobFailed", "CommandFailed"), error
    chain.live()
    chain.write("vda", 70)
    chain.commit(base="base.qcow2", delete=True)
    chain.live()
    chain.off()


@as_root
@pytest.mark.parametrize("policy", ["report", "stop", "enospc"])
def test_a_file_system_that_fills_up(chain: Chain, workdir: Path, qemu_factory: QemuFactory, policy: str) -> None:
    """``stop`` and ``enospc`` keep the job, which goes on when there is room; ``report`` ends it."""
    with mounted(workdir / "small", 24 * MIB) as small:
        base = images.create(small / "base.qcow2", SIZE)
        (workdir / "overlays").mkdir()
        own = Chain(qemu_factory("little", [Drive("vda", base)], paused=False), workdir / "overlays")
        own.present("s0", overlay_directory=str(workdir / "overlays"))
        own.write("vda", 0, 60)
        with own.stopped(Trap(label="qmp block-commit", sends=STOP), keep=[], on_error=policy) as running:
            filler = fill(small, 256 << 10)
        error = vm_of(running.finish())["error"]
        assert error["kind"] == ("ChainJobFailed" if policy == "report" else "ChainJobStalled"), error
        own.write("vda", 100)
        own.live()
        if policy != "report":
            assert [job["status"] for job in own.qemu.jobs()] == ["paused"]
            error = vm_of(own.run("qmp_block_commit", keep=[], on_error=policy))["error"]
            assert error["kind"] == "ChainJobStalled"
        filler.unlink()
        own.commit(keep=[], delete=True, on_error=policy)
        own.live()
        own.off()
        own.qemu.close()


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("how", ["commit", "stream"])
def test_an_io_error(workdir: Path, qemu_factory: QemuFactory, how: str, middle: bool) -> None:
    with failing_storage(qemu_factory, workdir, "write" if how == "commit" else "read") as (qemu, overlays):
        chain = Chain(qemu, workdir)
        where = {"overlay_directory": overlays}
        chain.write("vda", 50 if how == "stream" else 49)
        for name in ("s0", "s1", *(["s2"] if middle else [])):
            chain.present(name, **where)
            chain.write("vda", 20 if how == "stream" else 50)
        options: dict[str, t.Any] = {"top": "s2"} if middle else {}
        error = vm_of(chain.run("qmp_block_commit", base=chain.node_of_bottom(), merge=how, **options))["error"]
        assert error["kind"] == "ChainJobFailed" and "Input/output" in error["message"], error
        assert not chain.qemu.jobs()
        chain.write("vda", 90)
        if how == "stream":  # the storage goes on failing
            assert len(chain.chain()) == (4 if middle else 3)
            predicted = chain.run("qmp_block_commit", base=chain.node_of_bottom(), merge=how, check=True, **options)
            assert vm_of(predicted.ok())["status"] == "merged"
            chain.qemu.close()
            return
        chain.commit(base=chain.node_of_bottom(), merge=how, delete=True, **options)
        chain.live()
        chain.qemu.close()


# --- long chains


def test_a_long_chain(workdir: Path, qemu_factory: QemuFactory) -> None:
    """Down to one image, with a guest that goes on, and a backup that is still an increment."""
    base = images.create(workdir / "base.qcow2", SIZE)
    chain = Chain(qemu_factory("vm", [Drive("vda", base)], paused=False), workdir)
    site = Site(workdir)
    site.backup(chain.qemu)
    count = 200 if SLOW else 50  # to pile up 200 takes longer than to drop them
    chain.pile(count)
    assert len(chain.chain()) == count + 1
    before = time.monotonic()
    data = chain.commit(max_depth=1, merge="commit", delete=True)
    assert time.monotonic() - before < 60
    assert [name for name in chain.files() if name != "base.qcow2" and "vda.p" in name] == [] and len(
        data["deleted"]
    ) == count
    _incremental(chain, site)
    chain.live()
    chain.off()


# --- kills


RANGES: dict[str, dict[str, t.Any]] = {
    # Snapshots k0 to k3 are the images base, vda.k0, vda.k1 and vda.k2.
    "active": {"base": "base.qcow2", "delete": True},
    "middle": {"top": "vda.k1.qcow2", "base": "base.qcow2", "delete": True},
    "middle-kept": {"top": "vda.k1.qcow2", "base": "base.qcow2"},
    "auto": {"keep": ["k2"], "delete": True},
    "stream": {"keep": ["k0", "k2"], "merge": "stream", "delete": True},
}


@pytest.mark.parametrize("name", RANGES)
def test_a_kill_at_any_step_loses_nothing(chain: Chain, name: str) -> None:
    """The same task again does what check mode said, and leaves nothing behind; the next backup is exact."""
    site, task, stride = Site(chain.directory), RANGES[name], 1 if SLOW else 11
    log = chain.directory / "steps"
    chain.begin()
    chain.run("qmp_block_commit", trap=Trap(log=str(log)), **task).ok()
    steps = log.read_text().splitlines()
    for number in range(list(RANGES).index(name) % stride, len(steps), stride):
        print(f"killed before {steps[number]} ({number})")
        chain.begin()
        if number % 3 == 0:
            site.backup(chain.qemu)
        chain.run("qmp_block_commit", trap=Trap(number=number), **task)
        chain.live()
        chain.change()
        predicted = vm_of(chain.run("qmp_block_commit", check=True, **task).ok())
        data = chain.commit(**task)
        assert predicted["changed"] == data["changed"], (predicted, data)
        chain.live()
        chain.expect_only_chain(emptied=not task.get("delete"))
        chain.again(**task)
    chain.off()


@pytest.mark.parametrize("label", ["after qmp block-commit", "qmp job-finalize", "after qmp job-finalize"])
def test_qemu_killed(chain: Chain, label: str) -> None:
    """At a boundary: started again with the image that was active, the guest has all that it had flushed."""
    chain.begin()
    chain.qemu.flush("vda")
    with chain.stopped(Trap(label=label, sends=STOP), top="vda.k1.qcow2", base="base.qcow2", delete=True) as running:
        active = chain.active()
        chain.qemu.kill9()
    assert vm_of(running.finish())["error"]["kind"] == "VmGone"
    chain.restart(active)
    chain.live()
    chain.commit(base="base.qcow2", delete=True)
    chain.live()
    chain.off()
