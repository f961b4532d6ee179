# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qmp_dirty_bitmap on real QEMUs. What a bitmap holds is judged by qemu-img, which reads it through an export."""

from __future__ import annotations

import json
import os
import signal
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from lab.qemu import Qemu
from support.forked import run_forked
from support.killer import Trap, prelude
from support.module import Result, start_module
from support.points import Drive
from support.shots import MIB

UNIT = 65536
SIZE = 4 * MIB
MODULE = "qmp_dirty_bitmap"


class Vm:
    """A QEMU with the drives vda and vdb (qcow2) and vdc (raw)."""

    def __init__(self, directory: Path, factory: QemuFactory) -> None:
        self.directory = directory
        disks = [Drive(name, images.create(directory / f"{name}.qcow2", SIZE)) for name in ("vda", "vdb")]
        raw = Drive("vdc", images.create(directory / "vdc.raw", SIZE, fmt="raw"), fmt="raw")
        self.qemu: Qemu = factory("vm", [*disks, raw])

    def params(self, **options: t.Any) -> dict[str, t.Any]:
        return {"name": "b", "vms": [{"name": "vm", "socket": str(self.qemu.socket)}], **options}

    def run(self, *, check: bool = False, **options: t.Any) -> Result:
        return run_forked(MODULE, self.params(**options), None, check=check)

    def reach(self, **options: t.Any) -> dict[str, t.Any]:
        """Check mode says what is done then, and touches nothing; a second run finds nothing to do."""
        before = self.bitmaps()
        predicted = self.run(check=True, **options).ok()
        assert self.bitmaps() == before
        done = self.run(**options).ok()
        for key in ("changed", "status", "commands", "skipped", "bitmap"):
            assert predicted.data["vms"][0][key] == done.data["vms"][0][key], key
        for mine, real in zip(predicted.data["vms"][0]["drives"], done.data["vms"][0]["drives"]):
            if mine["bitmap"] is not None and mine["bitmap"]["count"] is None:
                mine["bitmap"]["count"] = real["bitmap"]["count"]
            assert mine == real
        assert predicted.data["diff"] == done.data["diff"]
        again = self.run(**options).ok()
        assert not again.changed, again.data
        return dict(done.data["vms"][0])

    def refused(self, **options: t.Any) -> str:
        before = self.bitmaps()
        kinds = set()
        for check in (True, False):
            result = self.run(check=check, **options)
            assert result.failed and "Traceback" not in result.stdout
            error = result.data.get("error") or result.data["vms"][0]["error"]
            kinds.add(str(error["kind"]))
        assert self.bitmaps() == before and len(kinds) == 1
        return kinds.pop()

    def bitmaps(self) -> dict[str, tuple[bool, bool, int]]:
        """Of all nodes: whether it records, whether it persists, and what it counts."""
        return {
            f"{node} {bitmap['name']}": (bitmap["recording"], bitmap["persistent"], bitmap["count"])
            for node, raw in self.qemu.nodes().items()
            for bitmap in raw.get("dirty-bitmaps", [])
        }

    def dirty(self, node: str, name: str) -> list[int]:
        """The dirty units, read by qemu-img from an NBD export of the bitmap, which must not record for that."""
        socket = self.directory / "nbd.sock"
        self.qemu.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
        try:
            options = {"id": "x", "type": "nbd", "node-name": node, "name": "x", "bitmaps": [name]}
            self.qemu.command("block-export-add", **options)
            server = (
                f"driver=nbd,server.type=unix,server.path={socket},export=x,x-dirty-bitmap=qemu:dirty-bitmap:{name}"
            )
            done = images.run_tool("qemu-img", "map", "--output=json", "--image-opts", server)
        finally:
            self.qemu.command("nbd-server-stop")
        # With x-dirty-bitmap what is dirty comes as a hole, says QEMU's documentation.
        holes = [each for each in json.loads(done.stdout) if not each["data"]]
        return [
            unit for each in holes for unit in range(each["start"] // UNIT, (each["start"] + each["length"]) // UNIT)
        ]

    def write(self, drive: str, *units: int) -> None:
        for unit in units:
            self.qemu.write(drive, unit * UNIT, UNIT, unit + 1)


@pytest.fixture
def vm(workdir: Path, qemu_factory: QemuFactory) -> Vm:
    return Vm(workdir, qemu_factory)


def test_every_state_in_turn(vm: Vm) -> None:
    made = vm.reach(state="present")
    assert [(each["name"], each["bitmap"]["persistent"]) for each in made["drives"]] == [
        ("vda", True),
        ("vdb", True),
        ("vdc", False),
    ]
    vm.write("vda", 3, 5)
    vm.reach(state="disabled")
    vm.write("vda", 9)
    assert vm.dirty("vda-node", "b") == [3, 5]
    vm.reach(state="enabled", drives=["vda"])
    vm.write("vda", 11)
    assert vm.bitmaps()["vda-node b"] == (True, True, 3 * UNIT)
    vm.reach(state="cleared")
    assert {bitmap[2] for bitmap in vm.bitmaps().values()} == {0}
    vm.reach(state="absent", exclude_drives=["vdb"])
    assert list(vm.bitmaps()) == ["vdb-node b"]


def test_all_drives_change_together_or_none(vm: Vm) -> None:
    """QEMU refuses one drive's bitmap after the module looked: no other drive gets one."""
    trap = Trap(label="qmp transaction", sends=int(signal.SIGSTOP))
    running = start_module(MODULE, vm.params(state="present"), prelude=prelude(trap))
    os.waitid(os.P_PID, running.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    vm.qemu.command("block-dirty-bitmap-add", node="vdb-node", name="b")
    running.process.send_signal(signal.SIGCONT)
    result = running.finish()
    assert result.failed and result.data["vms"][0]["error"]["kind"] == "BitmapRefused"
    assert list(vm.bitmaps()) == ["vdb-node b"]
    vm.reach(state="present")


@pytest.mark.parametrize("where", ["qmp transaction", "after qmp transaction"])
def test_killed(vm: Vm, where: str) -> None:
    run_forked(MODULE, vm.params(state="present"), Trap(label=where))
    assert len(vm.bitmaps()) in (0, 3)
    vm.reach(state="present")
    assert len(vm.bitmaps()) == 3


def test_merging(vm: Vm) -> None:
    vm.run(name="x", state="present").ok()
    vm.write("vda", 1)
    vm.run(name="y", state="present", drives=["vda"]).ok()
    vm.write("vda", 2)
    merge = {"name": "sum", "state": "merged", "drives": ["vda"]}
    vm.reach(**merge, sources=[{"name": "y"}])
    assert vm.dirty("vda-node", "sum") == [2]
    vm.reach(**merge, sources=[{"name": "x"}, {"name": "y", "drive": "vda"}])
    assert vm.dirty("vda-node", "sum") == [1, 2]
    assert vm.bitmaps()["vda-node sum"][0] is False
    vm.write("vdb", 7)
    vm.reach(**merge, sources=[{"name": "x", "node": "vdb-node"}])
    assert vm.dirty("vda-node", "sum") == [1, 2, 7]


def test_across_a_snapshot(vm: Vm, workdir: Path) -> None:
    """What was recorded in all images of the chain comes together; the image below keeps its bitmap."""
    vm.run(name="x", state="present", drives=["vda"]).ok()
    vm.write("vda", 1)
    overlay = images.create(workdir / "over.qcow2", SIZE)
    file = {"driver": "file", "filename": str(overlay)}
    vm.qemu.command("blockdev-add", **{"driver": "qcow2", "node-name": "over", "file": file, "backing": None})
    vm.qemu.command("blockdev-snapshot", node="vda-node", overlay="over")
    made = vm.reach(name="x", state="present", drives=["vda"])
    assert made["drives"][0]["node"] == "over" and made["drives"][0]["below"] == [str(workdir / "vda.qcow2")]
    vm.write("vda", 4)
    vm.reach(name="sum", state="merged", sources=[{"name": "x"}], drives=["vda"])
    assert vm.dirty("over", "sum") == [1, 4]
    gone = vm.reach(name="x", state="absent", drives=["vda"])
    assert gone["drives"][0]["below"] == [str(workdir / "vda.qcow2")] and "vda-node x" in vm.bitmaps()


def test_it_persists_and_an_inconsistent_one_can_be_removed(vm: Vm) -> None:
    vm.reach(state="present", drives=["vda"])
    vm.write("vda", 2)
    vm.qemu.quit()
    vm.qemu.start()
    assert vm.bitmaps()["vda-node b"][2] == UNIT
    vm.write("vda", 3)
    vm.qemu.kill9()
    vm.qemu.start()
    for state in ("present", "enabled", "cleared"):
        assert vm.refused(state=state, drives=["vda"]) == "BitmapInconsistent"
    assert vm.run(state="present").data["vms"][0]["error"]["drive"] == "vda"
    vm.reach(state="absent", drives=["vda"])
    vm.qemu.quit()
    vm.qemu.start()
    assert vm.bitmaps() == {}
    vm.qemu.quit()
    assert not images.check(vm.directory / "vda.qcow2")["check-errors"]


def test_busy(vm: Vm) -> None:
    vm.run(state="present", drives=["vda"]).ok()
    vm.write("vda", *range(8))
    vm.qemu.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(vm.directory / "n.sock")}})
    vm.run(state="disabled", drives=["vda"]).ok()
    vm.qemu.command("block-export-add", **{"id": "x", "type": "nbd", "node-name": "vda-node", "bitmaps": ["b"]})
    for state in ("absent", "cleared", "enabled"):
        assert vm.refused(state=state, drives=["vda"]) == "BitmapBusy"
    vm.reach(state="present", drives=["vda"])
    vm.qemu.command("nbd-server-stop")


def test_bad_input(vm: Vm) -> None:
    vm.run(state="present").ok()
    cases: list[tuple[str, dict[str, t.Any]]] = [
        ("InputInvalid", {"granularity": 1000}),
        ("InputInvalid", {"state": "merged"}),
        ("BitmapProtected", {"name": "bo-0123abcd-20261123T054500Z-0000abcd", "state": "absent"}),
        ("BitmapProtected", {"name": "bo-0123abcd-20261123T054500Z-0000abcd", "state": "cleared", "ours": True}),
        ("DriveUnsuited", {"drives": ["vdz"]}),
        ("DriveUnsuited", {"drives": ["vdc"], "persistent": True}),
        ("BitmapDiffers", {"granularity": 4096}),
        ("BitmapMissing", {"state": "merged", "sources": [{"name": "nothing"}]}),
    ]
    for kind, options in cases:
        assert vm.refused(**options) == kind, options


def test_a_tracking_bitmap_is_removed_only_when_asked(vm: Vm) -> None:
    name = "bo-0123abcd-20261123T054500Z-0000abcd"
    vm.qemu.command("block-dirty-bitmap-add", node="vda-node", name=name, persistent=True)
    assert vm.refused(name=name, state="absent") == "BitmapProtected"
    vm.reach(name=name, state="absent", ours=True)
    assert vm.bitmaps() == {}
