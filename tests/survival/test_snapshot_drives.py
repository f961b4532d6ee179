# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""External snapshots of every kind of drive: taken, gone back to and merged, and right at each step."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import images
from lab.daemon import StorageDaemon
from lab.fixtures import QemuFactory
from support.points import Drive
from support.shots import SIZE, Shots, vm_of

IOTHREAD = ["-object", "iothread,id=io0"]


@dataclass(frozen=True)
class ScsiInThread(Drive):
    """Behind a virtio-scsi controller with an iothread."""

    @property
    def controller(self) -> str | None:
        return "virtio-scsi-pci,id=lab-scsi,iothread=io0"


def _drive(directory: Path, fmt: str = "qcow2", kind: type[Drive] = Drive, **options: t.Any) -> Drive:
    image = images.create(directory / f"base.{fmt}", SIZE, fmt)
    return kind("vda", image, fmt=fmt, **options)


SHAPES: dict[str, dict[str, t.Any]] = {
    "virtio-blk blockdev": {},
    "virtio-blk drive": {"style": "drive"},
    "virtio-blk legacy": {"style": "legacy"},
    "scsi-hd blockdev": {"device": "scsi-hd"},
    "scsi-hd drive": {"device": "scsi-hd", "style": "drive"},
    "ide-hd blockdev": {"device": "ide-hd"},
    "ide-hd drive": {"device": "ide-hd", "style": "drive"},
    "ide legacy": {"device": "ide-hd", "style": "legacy"},
    "nvme blockdev": {"device": "nvme"},
    "nvme drive": {"device": "nvme", "style": "drive"},
    "usb-storage blockdev": {"device": "usb-storage"},
    "usb-storage drive": {"device": "usb-storage", "style": "drive"},
    "virtio-blk iothread blockdev": {"device_options": {"iothread": "io0"}},
    "virtio-blk iothread drive": {"device_options": {"iothread": "io0"}, "style": "drive"},
    "scsi-hd iothread": {"device": "scsi-hd", "kind": ScsiInThread},
    "not shared": {"share_rw": False},
    "direct blockdev": {"options": {"cache": {"direct": True}}, "file_options": {"cache": {"direct": True}}},
    "direct drive": {"style": "drive", "options": {"cache": "none", "aio": "native"}},
    "discard and zeroes": {"options": {"discard": "unmap", "detect-zeroes": "unmap"}},
    "raw blockdev": {"fmt": "raw"},
    "raw drive": {"fmt": "raw", "style": "drive"},
    "raw direct": {"fmt": "raw", "style": "drive", "options": {"cache": "none"}},
}


@pytest.mark.parametrize("merge", ["commit", "stream"])
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_life(workdir: Path, qemu_factory: QemuFactory, shape: str, merge: str) -> None:
    qemu = qemu_factory("vm", [_drive(workdir, **SHAPES[shape])], paused=False, extra_args=IOTHREAD)
    shots = Shots(qemu, workdir)
    shots.threaded = "iothread" in shape
    live(shots, merge)
    shots.off()


def live(shots: Shots, merge: str, **options: t.Any) -> None:
    """Two snapshots, one of which is gone back to, dropped from below."""
    shots.change()
    shots.present("one", **options)
    shots.live()
    shots.change()
    assert vm_of(shots.call("one", **options))["status"] == "present"
    shots.reverted("one", discarded="delete", **options)
    shots.live()
    shots.change()
    shots.present("two", **options)
    shots.change()
    shots.live()
    depth = len(shots.chain(next(iter(shots.truth))))
    assert {drive["merge"] for drive in shots.absent("one", merge=merge)["drives"]} == {merge}
    assert len(shots.chain(next(iter(shots.truth)))) == depth - 1
    shots.live()
    shots.change()
    shots.absent("two", merge=merge)
    assert len(shots.chain(next(iter(shots.truth)))) == depth - 2
    shots.live()
    shots.change()
    shots.live()


@pytest.mark.parametrize("style", ["blockdev", "drive"])
@pytest.mark.parametrize("merge", ["commit", "stream"])
def test_throttled(workdir: Path, qemu_factory: QemuFactory, style: str, merge: str) -> None:
    """Below a filter node everything works but going back live, which would lose the filter."""
    drive = _drive(workdir, style=style, throttle_bps=1 << 30)
    shots = Shots(qemu_factory("vm", [drive], paused=False), workdir)
    shots.change()
    shots.present("one")
    shots.change()
    if style == "blockdev":
        error = shots.refused("one", "reverted", "DriveUnsuited", allow_reset=True)
        assert "vda" in error["message"] and "switched off" in error["message"]
        assert "filter" in error["message"]
    else:
        shots.reverted("one", discarded="delete")  # its limits are the backend's, not a node's
        shots.live()
        shots.change()
    shots.present("two")
    shots.change()
    shots.absent("one", merge=merge)
    shots.live()
    shots.change()
    shots.absent("two", merge=merge)
    shots.live()
    drivers = {node["drv"] for node in shots.qemu.nodes().values()}
    assert ("throttle" in drivers) == (style == "blockdev")
    shots.off()


@pytest.mark.parametrize("merge", ["commit", "stream"])
def test_image_over_nbd(workdir: Path, qemu_factory: QemuFactory, merge: str) -> None:
    """An image that is no file of this host: the overlay goes where overlay_directory says."""
    image, server = images.create(workdir / "far.raw", SIZE, "raw"), workdir / "far.nbd"
    export = ["--nbd-server", f"addr.type=unix,addr.path={server}"]
    export += ["--export", "nbd,id=far,node-name=far,name=far,writable=on"]
    far = {"driver": "file", "filename": str(image), "node-name": "far"}
    with StorageDaemon("far", workdir, [far], export) as daemon:
        assert daemon.running
        drive = Drive("vda", f"nbd+unix:///far?socket={server}", fmt="raw", style="drive")
        shots = Shots(qemu_factory("vm", [drive], paused=False), workdir)
        shots.change()
        error = shots.refused("one", "present", "DriveUnsuited")
        assert "vda" in error["message"] and "overlay_directory" in error["message"]
        (workdir / "overlays").mkdir()
        live(shots, merge, overlay_directory=str(workdir / "overlays"))
        if merge == "commit":
            assert not list((workdir / "overlays").iterdir())
        shots.qemu.quit()
    if merge == "commit":
        shots.judge(image, bytes(shots.truth["vda"]), "raw")


def test_drives_of_all_kinds_at_once(workdir: Path, qemu_factory: QemuFactory) -> None:
    """What can have no snapshot is left out and said; the others share one transaction."""
    kinds = [("vda", "virtio-blk-pci", "blockdev"), ("sda", "scsi-hd", "drive"), ("hda", "ide-hd", "blockdev")]
    kinds += [("nv", "nvme", "drive")]
    drives = [
        Drive(name, images.create(workdir / f"{name}.qcow2", SIZE), device=device, style=style)  # type: ignore[arg-type]
        for name, device, style in kinds
    ]
    shared = images.create(workdir / "shared.raw", SIZE, "raw")
    drives += [Drive("cd", None, device="ide-cd"), Drive("ro", shared, fmt="raw", readonly=True)]
    shots = Shots(qemu_factory("vm", drives, paused=False), workdir, [name for name, _device, _style in kinds])
    shots.change()
    data = shots.present("one")
    assert {skip["name"] for skip in data["skipped"]} == {"cd", "ro"}
    assert [command["execute"] for command in data["commands"]].count("transaction") == 1 or not data["commands"]
    shots.change()
    shots.reverted("one", discarded="delete")
    shots.live()
    shots.change()
    shots.absent("one")
    shots.live()
    assert not [name for name in shots.files() if name.endswith(".json")]
    shots.off()


@pytest.mark.parametrize("device", ["virtio-blk-pci", "scsi-hd"])
def test_a_drive_plugged_in_later(workdir: Path, qemu_factory: QemuFactory, device: str) -> None:
    base = images.create(workdir / "base.qcow2", SIZE)
    new = images.create(workdir / "new.qcow2", SIZE)
    bus = ["-device", "virtio-scsi-pci,id=bus0"]
    qemu = qemu_factory("vm", [Drive("vda", base)], paused=False, extra_args=bus)
    shots = Shots(qemu, workdir)
    shots.change()
    shots.present("one")
    protocol = {"driver": "file", "filename": str(new)}
    qemu.execute("blockdev-add", {"driver": "qcow2", "node-name": "late", "file": protocol})
    qemu.execute("device_add", {"driver": device, "id": "vdb", "drive": "late", "share-rw": True})
    shots.truth["vdb"] = bytearray(SIZE)
    shots.change()
    for state, options in (("present", {}), ("reverted", {"allow_reset": True})):
        error = shots.refused("one", state, "SnapshotIncomplete", **options)
        assert "vda" in error["message"] and "vdb" in error["message"]
    assert vm_of(shots.call("one", drives=["vda"]))["status"] == "present"
    shots.present("two")
    shots.change()
    shots.reverted("two", discarded="delete")
    shots.live()
    kept = bytearray(shots.truth["vdb"])
    shots.past["one"]["vdb"] = kept
    shots.reverted("one", drives=["vda"], discarded="delete")
    shots.live()
    shots.absent("two")
    shots.absent("one")
    shots.live()
    shots.off()
