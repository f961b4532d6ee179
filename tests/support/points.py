# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Backups of lab QEMUs, each with a witness: what the guest saw at that moment, read over NBD by qemu-img.

The VMs are paused, so nothing changes a disk between a backup and its witness but the test itself. A backup is judged
by qemu-img compare of its published chain with the witness, never by what the module answered.
"""

from __future__ import annotations

import json
import typing as t
from dataclasses import dataclass
from pathlib import Path

from lab import images
from lab.qemu import Drive, Qemu
from support.module import Result, run_module

MIB = 1 << 20
KIB = 1 << 10


@dataclass(frozen=True)
class Point:
    """One published backup of one VM: the module's answer for it, and the witnesses of its drives."""

    data: dict[str, t.Any]
    witnesses: dict[str, Path]
    warnings: tuple[str, ...]

    @property
    def id(self) -> str:
        return str(self.data["backup"])

    @property
    def path(self) -> Path:
        return Path(self.data["path"])

    @property
    def manifest(self) -> dict[str, t.Any]:
        return t.cast("dict[str, t.Any]", json.loads((self.path / "manifest.json").read_text()))

    @property
    def levels(self) -> dict[str, str]:
        return {drive["name"]: drive["level"] for drive in self.data["drives"]}

    def drive(self, name: str) -> dict[str, t.Any]:
        return next(drive for drive in self.data["drives"] if drive["name"] == name)

    def reason(self, name: str) -> str:
        return str(self.drive(name)["reason"])

    def image(self, name: str) -> Path:
        return Path(self.drive(name)["path"])

    def check(self) -> Point:
        """Itself; AssertionError when a chain does not hold what the guest saw, or an image is not sound."""
        for name, witness in self.witnesses.items():
            image = self.image(name)
            assert images.info(image, "qcow2")["virtual-size"] == witness.stat().st_size, f"{image}: wrong size"
            assert images.compare(witness, image, "raw", "qcow2"), f"{image} is not what the guest saw"
            report = images.check(image)
            assert not report.get("corruptions") and not report.get("leaks"), report
        return self


class Site:
    """A repository, and the backups that a test makes in it."""

    def __init__(self, directory: Path, repository: str = "repo") -> None:
        self.directory = directory
        self.repository = directory / repository
        self.points: list[Point] = []

    def call(
        self,
        *vms: Qemu | dict[str, t.Any],
        check: bool = False,
        diff: bool = False,
        **params: t.Any,
    ) -> Result:
        """Run qmp_drive_backup on VMs, given as lab QEMUs or as entries of ``vms``."""
        entries = [vm if isinstance(vm, dict) else {"name": vm.name, "socket": str(vm.socket)} for vm in vms]
        arguments = {"repository": str(self.repository), "quiesce": "off", "vms": entries, **params}
        return run_module("qmp_drive_backup", arguments, check=check, diff=diff)

    def backup(self, qemu: Qemu, **params: t.Any) -> Point:
        """A backup of one VM that must succeed, with the witnesses of all drives in it."""
        result = self.call(qemu, **params).ok()
        (data,) = result.data["vms"]
        assert data["status"] == "published", data
        found = {drive["name"]: self.witness(qemu, drive["name"], data["backup"]) for drive in data["drives"]}
        point = Point(data, found, tuple(result.warnings))
        self.points.append(point)
        return point

    def witness(self, qemu: Qemu, drive: str, label: str) -> Path:
        """What the guest sees of the drive right now, as a raw file."""
        path = self.directory / f"{qemu.name}-{drive.replace('/', '_')}-{label}.raw"
        read_disk(qemu, root_node(qemu, drive), path)
        return path

    def check(self) -> None:
        """Judge every backup made so far; later ones must not have changed earlier ones."""
        for point in self.points:
            point.check()


def root_node(qemu: Qemu, drive: str) -> str:
    """The node the device reads and writes: filters included. ``drive`` as the module names it."""
    for entry in qemu.command("query-block"):
        path = str(entry.get("qdev", ""))
        names = (path.removeprefix("/machine/peripheral/").split("/", 1)[0], entry.get("device"), path)
        node = entry.get("inserted", {}).get("node-name")
        if drive in names or drive == node or path.startswith(f"/machine/peripheral-anon/{drive}/"):
            return str(node)
    raise AssertionError(f"{qemu.name} has no drive {drive}")


def read_disk(qemu: Qemu, node: str, path: Path) -> None:
    """Copy what is in a node into a raw file, over an NBD export that is gone afterwards."""
    server = qemu.run_directory / f"{qemu.name}.nbd"
    server.unlink(missing_ok=True)
    qemu.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(server)}}})
    try:
        qemu.execute("block-export-add", {"type": "nbd", "id": "witness", "node-name": node, "name": "witness"})
        url = f"nbd+unix:///witness?socket={server}"
        images.run_tool("qemu-img", "convert", "-f", "raw", "-O", "raw", url, path)
    finally:
        qemu.execute("nbd-server-stop")
        if any(export["id"] == "witness" for export in qemu.command("query-block-exports")):
            qemu.wait_event("BLOCK_EXPORT_DELETED", id="witness")


def disk(directory: Path, name: str, size: int | str = 16 * MIB, fmt: str = "qcow2", **options: t.Any) -> Path:
    """A new image with some data in it: its first MiB (or all, when it is smaller)."""
    path = images.create(directory / f"{name}.{fmt}", size, fmt, **options)
    length = min(MIB, int(images.info(path, fmt)["virtual-size"]))
    if length:
        images.fill(path, [(0, length, 1)], fmt)
    return path


def tracking(qemu: Qemu, drive: str) -> list[str]:
    """Names of all bitmaps on any node of this drive's active image."""
    return sorted(qemu.bitmaps(drive))


def leftovers(qemu: Qemu) -> list[str]:
    """Jobs and nodes of the collection inside QEMU, and short-lived bitmaps; between two runs there must be none."""
    nodes = qemu.nodes()
    bitmaps = [
        bitmap["name"] for node in nodes.values() for bitmap in node.get("dirty-bitmaps", ()) if bitmap.get("name")
    ]
    names = [*nodes, *(job["id"] for job in qemu.jobs()), *(name for name in bitmaps if name.endswith("-tmp"))]
    return [name for name in names if name.startswith("bo-")]


__all__ = ["KIB", "MIB", "Drive", "Point", "Qemu", "Site", "disk", "leftovers", "read_disk", "root_node", "tracking"]
