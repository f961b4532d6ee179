# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qmp_block_rebase on real chains: what is trimmed, what is refused, bitmaps, restarts, kills, and full disks."""

from __future__ import annotations

import json
import os
import signal
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.chains import Chain, fill, mounted
from support.killer import Trap
from support.module import Result
from support.points import Drive, Site
from support.shots import KIB, MIB, SIZE, UNIT, Shots, vm_of

REBASE = "qmp_block_rebase"
SLOW = bool(os.environ.get("BLOCKOPS_SLOW"))
STOP = int(signal.SIGSTOP)
SAME = ("changed", "status", "drives", "deleted", "kept", "recovered", "boot_drift", "skipped")


class Trimmed(Chain):
    """A chain whose images hold much twice."""

    def rewrite(self, unit: int, units: int) -> None:
        """The guest writes what is there already: of each unit, one byte's pattern."""
        for number in range(unit, unit + units):
            self.qemu.write("vda", number * UNIT, UNIT, self.truth["vda"][number * UNIT])

    def fat(self) -> None:
        """base <- k0 <- k1 <- k2, all in QEMU by our own nodes; k0 and k1 hold 20 and 10 units twice."""
        self.write("vda", 0, 30)
        self.quick("k0")
        self.rewrite(0, 20)
        self.write("vda", 40, 5)
        self.quick("k1")
        self.rewrite(10, 10)
        self.write("vda", 50, 3)
        self.quick("k2")
        self.past["k1"] = {"vda": bytearray(self.truth["vda"])}
        self.change()

    def params(self, **options: t.Any) -> dict[str, t.Any]:
        if str(options.get("image", "")).endswith(".qcow2"):
            options["image"] = str(self.directory / options["image"])
        return super().params(**options)

    def run(self, module: str, *, check: bool = False, trap: Trap | None = None, **options: t.Any) -> Result:
        least = {"min_gain": UNIT} if module == REBASE else {}
        return super().run(module, check=check, trap=trap, **{**least, **options})

    def trim(self, **options: t.Any) -> dict[str, t.Any]:
        return self.commit(REBASE, **options)

    def predicted(self, **options: t.Any) -> dict[str, t.Any]:
        """Check mode says just what is done then, and touches nothing."""
        before = self.state()
        result = self.run(REBASE, check=True, **options).ok()
        assert self.state() == before
        data = self.trim(**options)
        assert {key: vm_of(result)[key] for key in SAME} == {key: data[key] for key in SAME}
        return data

    def expect_sound(self) -> None:
        """The guest's view, the headers, the records and the files all say the same."""
        self.live()
        chain = self.chain()
        for above, below in zip(chain, chain[1:]):
            assert os.path.basename(images.info(self.directory / above)["backing-filename"]) == below, (above, below)
            record = self.directory / f"{above}.snapshot.json"
            if record.exists():
                raw = json.loads(record.read_text())
                assert raw["state"] == "present" and not raw.get("discards"), raw
                assert os.path.basename(raw["image"]) == below, (raw, chain)

    def only_chain(self) -> None:
        found = {name for name in self.files() if name.endswith(".qcow2")}
        assert found == set(self.chain()), found
        used = {self.node(number) for number in range(len(self.chain()))}
        ours = {name for name in self.qemu.node_names() if name.startswith("bos-")}
        assert ours <= used, ours - used


@pytest.fixture
def chain(workdir: Path, qemu_factory: QemuFactory) -> Trimmed:
    base = images.create(workdir / "base.qcow2", SIZE)
    return Trimmed(qemu_factory("vm", [Drive("vda", base)], paused=False), workdir)


def test_all_that_is_redundant_goes(chain: Trimmed) -> None:
    chain.fat()
    data = chain.predicted()
    assert chain.chain() == ["vda.k2.qcow2", "vda.k1.trimmed.qcow2", "vda.k0.trimmed.qcow2", "base.qcow2"]
    dropped = {os.path.basename(each["image"]): each["dropped_bytes"] for each in data["drives"][0]["images"]}
    assert dropped == {"vda.k1.qcow2": 10 * UNIT, "vda.k0.qcow2": 20 * UNIT}
    assert data["freed_bytes"] > 25 * UNIT and len(data["deleted"]) == 2
    chain.expect_sound()
    chain.only_chain()
    again = chain.trim()
    assert (again["changed"], again["status"]) == (False, "unchanged"), again
    chain.change()
    chain.live()
    chain.off()


@pytest.mark.parametrize("restarted", [False, True], ids=["ours", "blockdev"])
def test_the_options_of_the_node_above_stay(chain: Trimmed, restarted: bool) -> None:
    """QEMU resets what blockdev-reopen does not name."""
    chain.qemu.quit()
    options = {"detect-zeroes": "unmap", "discard": "unmap", "l2-cache-size": 1 << 17, "cache": {"direct": True}}
    chain.qemu.drives["vda"] = Drive("vda", chain.directory / "base.qcow2", options=options)
    chain.qemu.start()
    chain.present("s0")
    chain.write("vda", 0, 30)
    chain.present("s1")
    chain.rewrite(0, 20)
    chain.present("s2")
    if restarted:
        image = chain.active()
        chain.qemu.quit()
        chain.qemu.drives["vda"] = Drive("vda", image, options=options)
        chain.qemu.start()
    before = {name: chain.qemu.nodes()[name] for name in chain.qemu.node_names()}
    active = chain.qemu.active_node("vda")
    assert chain.trim()["drives"][0]["images"][0]["dropped_bytes"] == 20 * UNIT
    after = chain.qemu.nodes()
    for key in ("detect_zeroes", "cache", "ro"):
        assert after[active][key] == before[active][key]
    size = (chain.directory / "vda.s2.qcow2").stat().st_blocks
    chain.write("vda", 0, 32)
    chain.qemu.qemu_io("vda", f"discard 0 {32 * UNIT}")
    chain.truth["vda"][: 32 * UNIT] = bytes(32 * UNIT)
    chain.qemu.flush("vda")
    assert (chain.directory / "vda.s2.qcow2").stat().st_blocks < size + 8 * UNIT // 512  # what is discarded is freed
    chain.expect_sound()
    chain.off()


@pytest.mark.parametrize("name", ["k1", "vda.k0.qcow2"])
def test_one_image_by_name(chain: Trimmed, name: str) -> None:
    """By the snapshot that it is, and by its file, under which it is found again when it is trimmed."""
    chain.fat()
    chain.predicted(image=name)
    assert sum("trimmed" in file for file in chain.chain()) == 1
    again = chain.trim(image=name)
    assert not again["changed"], again
    chain.expect_sound()
    chain.off()


def test_kept_and_deleted_by_a_later_run(chain: Trimmed) -> None:
    chain.fat()
    data = chain.predicted(delete=False)
    assert not data["deleted"] and len(data["kept"]) == 2
    chain.expect_sound()
    assert not chain.trim(delete=False)["changed"]
    data = chain.predicted()
    assert len(data["deleted"]) == 2
    chain.only_chain()
    chain.off()


def test_after_a_restart_and_from_the_command_line(chain: Trimmed) -> None:
    """-blockdev names the active image only: QEMU opens those below by itself, and reopens none of them."""
    chain.fat()
    active = chain.active()
    chain.qemu.quit()
    chain.restart(active)
    chain.predicted()
    chain.expect_sound()
    chain.change()
    active = chain.active()
    chain.qemu.quit()
    chain.restart(active)
    chain.live()
    assert not chain.trim()["changed"]
    chain.off()


def test_the_trimmed_chain_lives_on(chain: Trimmed) -> None:
    """Snapshots, going back, commits into a copy and out of it."""
    chain.fat()
    chain.trim()
    chain.present("later")
    chain.change()
    chain.reverted("later", discarded="delete")
    chain.live()
    chain.commit(top="vda.k2.qcow2", base="vda.k1.trimmed.qcow2", merge="commit", delete=True)
    chain.live()
    chain.change()
    chain.commit(base="base.qcow2", merge="commit", delete=True)
    chain.live()
    chain.off()


def test_backups_go_on_as_exact_increments(chain: Trimmed) -> None:
    """The bitmaps of an image are in its copy."""
    site = Site(chain.directory)
    chain.write("vda", 0, 30)
    site.backup(chain.qemu)
    chain.write("vda", 60)
    chain.present("s0")
    chain.rewrite(0, 20)
    chain.write("vda", 61)
    chain.present("s1")
    chain.write("vda", 63)
    data = chain.trim()
    assert len(data["drives"][0]["images"][0]["bitmaps"]) == 1, data
    point = site.backup(chain.qemu)
    assert point.levels == {"vda": "incremental"}, point.reason("vda")
    assert point.drive("vda")["copied"] <= 24 * UNIT, point.drive("vda")
    chain.write("vda", 70)
    assert site.backup(chain.qemu).levels == {"vda": "incremental"}
    active = chain.active()
    chain.qemu.quit()
    chain.restart(active)
    chain.write("vda", 71)
    assert site.backup(chain.qemu).levels == {"vda": "incremental"}
    site.check()
    chain.off()


def test_refused(chain: Trimmed, qemu_factory: QemuFactory) -> None:
    chain.fat()
    assert chain.refused(REBASE, image="vda.k9.qcow2")["kind"] == "ImageNotInChain"
    assert "writes to it" in chain.refused(REBASE, image="vda.k2.qcow2")["reason"]
    assert "lowest" in chain.refused(REBASE, image="base.qcow2")["reason"]
    other = images.create(chain.directory / "other.qcow2", SIZE, backing=chain.directory / "vda.k0.qcow2")
    assert "other.qcow2" in chain.refused(REBASE, image="vda.k0.qcow2")["reason"]
    other.unlink()
    (chain.directory / "vda.k0.qcow2.snapshot.json").rename(chain.directory / "aside")
    assert "no overlay that this collection made" in chain.refused(REBASE, image="vda.k0.qcow2")["reason"]
    chain.off()


def test_drive_of_dash_drive_needs_a_snapshot_first(workdir: Path, qemu_factory: QemuFactory) -> None:
    """QEMU cannot reopen its nodes, which have no names; under an overlay of ours it works."""
    base = images.create(workdir / "base.qcow2", SIZE)
    chain = Trimmed(qemu_factory("vm", [Drive("vda", base)], paused=False), workdir)
    chain.fat()
    active = chain.active()
    chain.qemu.quit()
    chain.qemu.drives["vda"] = Drive("vda", active, style="drive")
    chain.qemu.start()
    error = chain.refused(REBASE, image="k1")
    assert "qmp_snapshot" in error["message"], error
    chain.present("now")
    chain.predicted()
    assert chain.chain()[2:] == ["vda.k1.trimmed.qcow2", "vda.k0.trimmed.qcow2", "base.qcow2"]
    chain.expect_sound()
    chain.change()
    chain.live()
    chain.off()


def test_options_that_nobody_knows(chain: Trimmed) -> None:
    """A node that somebody has attached by hand: it would lose what QEMU does not tell."""
    chain.fat()
    active = chain.active()
    below = chain.qemu.active_node("vda")
    path = chain.directory / "hand.qcow2"
    images.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", active.name, "-F", "qcow2", path, str(SIZE))
    protocol = {"driver": "file", "filename": str(path)}
    node = {"driver": "qcow2", "node-name": "hand", "file": protocol, "backing": None}
    chain.qemu.execute("blockdev-add", node)
    chain.qemu.command("blockdev-snapshot", node=below, overlay="hand")
    assert "not known" in chain.refused(REBASE, image="vda.k2.qcow2")["reason"]
    chain.trim()
    assert chain.chain()[1:] == ["vda.k2.qcow2", "vda.k1.trimmed.qcow2", "vda.k0.trimmed.qcow2", "base.qcow2"]
    chain.off()


def test_iothread(workdir: Path, qemu_factory: QemuFactory) -> None:
    base = images.create(workdir / "base.qcow2", SIZE)
    drive = Drive("vda", base, device_options={"iothread": "io0"})
    chain = Trimmed(qemu_factory("vm", [drive], paused=False, extra_args=["-object", "iothread,id=io0"]), workdir)
    chain.threaded = True
    chain.present("s0")
    chain.write("vda", 0, 30)
    chain.present("s1")
    chain.rewrite(0, 20)
    chain.present("s2")
    chain.write("vda", 3)
    chain.trim()
    assert "vda.s1.trimmed.qcow2" in chain.chain()
    Shots.live(chain)
    chain.off()


def test_throttled_and_on_a_raw_image(workdir: Path, qemu_factory: QemuFactory) -> None:
    base = images.create(workdir / "base.raw", SIZE, "raw")
    chain = Trimmed(qemu_factory("vm", [Drive("vda", base, fmt="raw", throttle_bps=1 << 30)], paused=False), workdir)
    chain.present("s0")
    chain.write("vda", 0, 30)
    chain.present("s1")
    chain.rewrite(0, 20)
    chain.present("s2")
    chain.write("vda", 3)
    data = chain.trim()
    assert Path(data["drives"][0]["after"][1]).name == "vda.s1.trimmed.qcow2"
    chain.live()
    active = Path(data["drives"][0]["after"][0])
    chain.qemu.quit()
    chain.judge(active, bytes(chain.truth["vda"]))


def test_jobs_are_left_alone(chain: Trimmed) -> None:
    chain.write("vda", 0, 100)
    chain.fat()
    target = images.create(chain.directory / "copy.qcow2", SIZE)
    chain.qemu.execute("blockdev-add", {"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "filename": str(target)}})  # fmt: skip  # noqa: E501
    node = chain.qemu.active_node("vda")
    chain.qemu.command("blockdev-backup", job_id="j", device=node, target="t", sync="full", speed=KIB)
    assert vm_of(chain.run(REBASE))["error"]["kind"] == "JobsRunning"
    chain.qemu.command("block-job-cancel", device="j", force=True)
    chain.wait_jobs()
    chain.qemu.command("blockdev-del", node_name="t")
    chain.trim()
    chain.off()


def test_no_room_for_the_copy(workdir: Path, qemu_factory: QemuFactory) -> None:
    with mounted(workdir / "small", 24 * MIB) as directory:
        base = images.create(directory / "base.qcow2", SIZE)
        chain = Trimmed(qemu_factory("vm", [Drive("vda", base)], paused=False), directory)
        chain.fat()
        filler = fill(directory, 256 * KIB)
        for check in (True, False):
            assert vm_of(chain.run(REBASE, check=check))["error"]["kind"] == "NoSpace"
        filler.unlink()
        chain.trim()
        chain.off()


@pytest.mark.parametrize("part", range(4 if SLOW else 1))
def test_a_kill_at_any_step_loses_nothing(chain: Trimmed, part: int) -> None:
    """And the next run, with the same VM, comes to the same end."""
    stride, log = 4 if SLOW else 13, chain.directory / "steps"
    renew(chain)
    chain.run(REBASE, trap=Trap(log=str(log))).ok()
    steps = log.read_text().splitlines()
    for number in range(part, len(steps), stride):
        print(f"killed before {steps[number]} ({number})")
        renew(chain)
        chain.run(REBASE, trap=Trap(number=number))
        chain.live()
        chain.change()
        predicted = vm_of(chain.run(REBASE, check=True).ok())
        data = chain.trim()
        assert {key: predicted[key] for key in SAME} == {key: data[key] for key in SAME}
        chain.expect_sound()
        chain.only_chain()
        assert not chain.trim()["changed"]
    chain.off()


# A QEMU that dies has a header that names the copy, and has, or has not, the old image open; or is done with it.
DECISIVE = ("after qmp blockdev-add", "after qmp change-backing-file", "after qmp blockdev-reopen", "qmp blockdev-del")


@pytest.mark.parametrize("label", DECISIVE if SLOW else DECISIVE[1:3])
def test_killed_and_then_qemu_restarted(chain: Trimmed, label: str) -> None:
    """Whatever the header names then is right; nothing that it names has gone."""
    chain.fat()
    chain.qemu.flush("vda")
    chain.run(REBASE, trap=Trap(label=label))
    chain.live()
    active = chain.active()
    chain.qemu.flush("vda")
    chain.qemu.kill9()
    chain.restart(active)
    chain.live()
    chain.change()
    chain.trim()
    chain.expect_sound()
    chain.only_chain()
    chain.off()


def renew(chain: Trimmed) -> None:
    if len(chain.chain()) > 1:
        chain.commit(base="base.qcow2", merge="commit", delete=True)
    for path in chain.directory.glob("vda.*"):
        path.unlink()
    chain.fat()


def test_qemu_refuses_the_exchange(chain: Trimmed) -> None:
    """All is as before, or left so that the next run can sort it out; a cold start would be right at any time."""
    chain.fat()
    with chain.stopped(Trap(label="qmp blockdev-reopen", sends=STOP), REBASE, min_gain=UNIT) as running:
        chain.qemu.command("block-stream", job_id="j", device=chain.qemu.active_node("vda"), speed=1)
    error = vm_of(running.finish())["error"]
    assert error["kind"] == "TrimFailed", error
    chain.qemu.command("block-job-cancel", device="j")
    chain.wait_jobs()
    assert chain.chain() == ["vda.k2.qcow2", "vda.k1.qcow2", "vda.k0.qcow2", "base.qcow2"]
    named = images.info(chain.directory / "vda.k2.qcow2")["backing-filename"]
    chain.judge(chain.directory / named, bytes(chain.past["k1"]["vda"]))  # QEMU lets nobody write headers meanwhile
    chain.live()
    assert chain.trim()["recovered"]
    chain.expect_sound()
    chain.only_chain()
    chain.off()


def test_no_room_while_it_is_built(workdir: Path, qemu_factory: QemuFactory) -> None:
    with mounted(workdir / "small", 24 * MIB) as directory:
        base = images.create(directory / "base.qcow2", SIZE)
        chain = Trimmed(qemu_factory("vm", [Drive("vda", base)], paused=False), directory)
        chain.fat()
        with chain.stopped(
            Trap(label="file open in write_record", sends=STOP), REBASE, min_gain=UNIT, image="k1"
        ) as running:
            filler = fill(directory, 256 * KIB)
        assert vm_of(running.finish())["error"]["kind"] == "TrimFailed"
        filler.unlink()
        assert chain.chain() == ["vda.k2.qcow2", "vda.k1.qcow2", "vda.k0.qcow2", "base.qcow2"]
        chain.expect_sound()
        chain.only_chain()
        chain.off()
