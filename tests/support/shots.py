# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots of lab QEMUs beside a truth of their own: what the guest wrote, and what it had at each snapshot.

The truth is kept in the test's memory. A drive is judged by reading it all over NBD, and, once QEMU has ended, by
qemu-img compare of its image with the truth; never by what the module answered.
"""

from __future__ import annotations

import typing as t
from collections.abc import Callable
from pathlib import Path

from lab import images
from lab.qemu import Qemu
from support.forked import run_forked
from support.module import Result
from support.points import KIB, MIB, read_disk, root_node

SIZE = 8 * MIB
UNIT = 64 * KIB
NAMES = "{drive}.{name}.qcow2"


class Shots:
    """The snapshots of one VM. ``drives``: those that are written to and judged, all with images of zeros at first."""

    def __init__(self, qemu: Qemu, directory: Path, drives: t.Sequence[str] = ("vda",), size: int = SIZE) -> None:
        self.qemu = qemu
        self.directory = directory
        self.truth = {drive: bytearray(size) for drive in drives}
        self.past: dict[str, dict[str, bytearray]] = {}
        self.entry: dict[str, t.Any] = {"name": qemu.name, "socket": str(qemu.socket)}
        self.threaded = False  # drives in an iothread: NBD clients that leave, and "write -z", end QEMU 7.2
        self._writes = 0

    def write(self, drive: str, unit: int, units: int = 1) -> None:
        """The guest writes a pattern of its own."""
        self._writes += 1
        pattern, offset, length = self._writes % 254 + 1, unit * UNIT, units * UNIT
        self.qemu.write(drive, offset, length, pattern)
        self.truth[drive][offset : offset + length] = bytes([pattern]) * length

    def change(self) -> None:
        """On each drive a place of its own, one that all changes share, and one that becomes zeros."""
        for drive in self.truth:
            self.write(drive, 1 + self._writes % 60)
            self.write(drive, 62)
            self.write(drive, 64, 2)
            if self.threaded:
                continue
            self.qemu.qemu_io(drive, f"write -z {64 * UNIT} {UNIT}")
            self.truth[drive][64 * UNIT : 65 * UNIT] = bytes(UNIT)

    def call(self, name: str, state: str = "present", *, check: bool = False, **options: t.Any) -> Result:
        """Run qmp_snapshot, whatever comes of it."""
        entry = {**self.entry, **options.pop("entry", {})}
        params = {"name": name, "state": state, "quiesce": "off", "overlay_name": NAMES, "vms": [entry], **options}
        return run_forked("qmp_snapshot", params, None, check=check)

    def present(self, name: str, **options: t.Any) -> dict[str, t.Any]:
        data = self._done(self.call(name, **options), "taken")
        self.past[name] = {drive: bytearray(content) for drive, content in self.truth.items()}
        return data

    def reverted(self, name: str, **options: t.Any) -> dict[str, t.Any]:
        data = self._done(self.call(name, "reverted", **{"allow_reset": True, **options}), "reverted")
        self.truth = {drive: bytearray(content) for drive, content in self.past[name].items()}
        return data

    def absent(self, name: str, **options: t.Any) -> dict[str, t.Any]:
        return self._done(self.call(name, "absent", **options), "removed")

    def _done(self, result: Result, status: str) -> dict[str, t.Any]:
        data = vm_of(result.ok())
        assert data["status"] == status, data
        assert not leftovers(self.qemu), leftovers(self.qemu)
        return data

    def refused(self, name: str, state: str, *kinds: str, **options: t.Any) -> dict[str, t.Any]:
        """The error, in check mode as well; neither QEMU nor the directory has changed."""
        before = self.state()
        errors = [vm_of(self.call(name, state, check=check, **options)).get("error") for check in (True, False)]
        assert all(error is not None and error["kind"] in kinds for error in errors), errors
        assert self.state() == before
        self.live()
        return dict(t.cast("dict[str, t.Any]", errors[1]))

    def state(self) -> dict[str, t.Any]:
        """What a run that was refused must leave as it is."""
        files = {str(path): path.lstat().st_size for path in self.directory.rglob("*") if _is_product(path)}
        return {
            "nodes": self.qemu.node_names(),
            "active": {drive: self.qemu.active_node(drive) for drive in self.truth},
            "status": self.qemu.command("query-status")["status"],
            "files": sorted(files),
            "records": {path: Path(path).read_text() for path in files if path.endswith(".json")},
        }

    def active(self, drive: str = "vda") -> Path:
        """The file the guest writes to now."""
        return Path(self._files(drive)[0])

    def chain(self, drive: str = "vda") -> list[str]:
        """File names only, the active one first, as QEMU has them open."""
        return [file.rsplit("/", 1)[-1] for file in self._files(drive)]

    def _files(self, drive: str) -> list[str]:
        """From the protocol nodes: the name of an image is a json: text, cut off at 4096 bytes in long chains."""
        nodes, top = self.qemu.nodes(), self.qemu.active_node(drive)
        trees = self.qemu.command("query-blockstats")
        tree = next((tree for tree in trees if tree.get("node-name") == top), None)
        files = []
        while tree is not None:
            if nodes[tree["node-name"]]["drv"] in ("qcow2", "raw"):
                files.append(str(nodes[tree["parent"]["node-name"]]["file"]))
                tree = tree.get("backing")
            else:
                tree = tree.get("backing", tree.get("parent"))
        return files

    def live(self) -> None:
        """AssertionError when the guest does not see the truth."""
        for drive, content in self.truth.items():
            if self.threaded:
                self._read_as_device(drive, bytes(content))
                continue
            path = self.directory / f"{drive}.live"
            read_disk(self.qemu, root_node(self.qemu, drive), path)
            found = path.read_bytes()
            path.unlink()
            assert found == bytes(content), f"{drive} differs first at {_first_difference(found, bytes(content))}"

    def _read_as_device(self, drive: str, content: bytes) -> None:
        start = 0
        for unit in range(1, len(content) // UNIT + 1):
            if unit * UNIT == len(content) or content[unit * UNIT] != content[start]:
                assert self.qemu.holds(drive, start, unit * UNIT - start, content[start]), (
                    f"{drive}: unit {start / UNIT}"
                )
                start = unit * UNIT

    def off(self, fmt: str | None = None) -> None:
        """End QEMU; each active image alone has to be the truth, sound, and named by its chain."""
        actives = {drive: self.active(drive) for drive in self.truth}
        self.qemu.quit()
        for drive, path in actives.items():
            self.judge(path, bytes(self.truth[drive]), fmt or ("qcow2" if path.suffix == ".qcow2" else "raw"))

    def judge(self, path: Path, content: bytes, fmt: str = "qcow2") -> None:
        truth = self.directory / "truth.raw"
        truth.write_bytes(content)
        assert images.info(path, fmt)["virtual-size"] == len(content)  # strict would compare the allocation as well
        assert images.compare(path, truth, fmt, "raw"), f"{path} is not the truth"
        truth.unlink()
        if fmt == "qcow2":
            report = images.check(path)
            assert not report.get("corruptions"), report

    def files(self) -> list[str]:
        """Images and records in the directory."""
        return sorted(path.name for path in self.directory.iterdir() if _is_product(path))


def vm_of(result: Result) -> dict[str, t.Any]:
    assert result.data, result
    return dict(result.data["vms"][0])


def leftovers(qemu: Qemu) -> list[str]:
    """Jobs, and nodes of ours that nothing uses."""
    used: set[str] = set()
    for stats in qemu.command("query-blockstats"):
        _walk(stats, used)
    nodes = [name for name in qemu.node_names() if name.startswith("bo-") and name not in used]
    return [*nodes, *(job["id"] for job in qemu.jobs() if job["id"].startswith("bo-"))]


def _walk(stats: dict[str, t.Any], used: set[str]) -> None:
    used.add(str(stats.get("node-name")))
    for child in ("backing", "parent"):
        if child in stats:
            _walk(stats[child], used)


def _first_difference(a: bytes, b: bytes) -> str:
    place = next((at for at in range(0, min(len(a), len(b)), 512) if a[at : at + 512] != b[at : at + 512]), None)
    return f"unit {None if place is None else place / UNIT} (sizes {len(a)}, {len(b)})"


def _is_product(path: Path) -> bool:
    return path.suffix in (".qcow2", ".json", ".raw", ".new")


ShotsFactory = Callable[..., Shots]

__all__ = ["KIB", "MIB", "SIZE", "UNIT", "Shots", "ShotsFactory", "leftovers", "vm_of"]
