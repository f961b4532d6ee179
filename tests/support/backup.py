# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A bench for backups: a real QEMU, a repository, and an independent memory of what the guest wrote until each point.

The memory (``Bench.truth``) is a pattern byte per 64 KiB; a point's truth is noted when its directory, ``.partial`` or
not, is first seen on disk after a run, because a paused guest writes nothing but what the test writes between runs.
Nothing here believes what the module answers.
"""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import typing as t
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import images
from lab.drive import Drive
from lab.qemu import Qemu
from support.forked import run_forked
from support.killer import Trap, prelude
from support.module import Result, Running, start_module

KIB = 1024
MIB = 1024 * 1024
UNIT = 64 * KIB
NOBODY = 65534
MODULE = "qmp_drive_backup"

_PUBLISHED = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
_PARTIAL = re.compile(r"\.(\d{8}T\d{6}Z-[0-9a-f]{8})\.partial")
_TRANSIENT = "bo-"

Truth = dict[str, tuple[int, ...]]


class BenchFactory(t.Protocol):
    """Make a bench whose QEMU ends with the test."""

    def __call__(self, disks: int = 2, **options: t.Any) -> Bench: ...


class Bench:
    """One VM with ``disks`` qcow2 drives d0, d1, ... and its place in a repository.

    The guest's CPU runs (the firmware finds nothing to boot) unless ``paused``: QEMU closes passed file descriptors
    only in a VM that runs.
    """

    def __init__(
        self, directory: Path, disks: int = 2, *, size: int = 4 * MIB, name: str = "vm", **qemu: t.Any
    ) -> None:
        self.directory = directory
        self.size = size
        self.repository = directory / "repository"
        drives = [
            Drive(f"d{number}", images.create(directory / f"{name}-d{number}.qcow2", size)) for number in range(disks)
        ]
        self.vm = Qemu(name, drives, directory, **{"paused": False, "uuid": None, **qemu})
        self.vm.start()
        self.truth: Truth = {drive.id: (0,) * (size // UNIT) for drive in drives}
        self.points: dict[str, Truth] = {}
        self.published: set[str] = set()
        self._pattern = 0
        for drive in drives:
            self.write(drive.id, 0, size // UNIT // 2)

    # -- the guest -----------------------------------------------------------------------------------------------------

    def write(self, drive: str, unit: int, count: int = 1) -> None:
        """Write ``count`` units (64 KiB) of a new pattern at unit ``unit``, as the guest would."""
        self._pattern = self._pattern % 255 + 1
        self.vm.write(drive, unit * UNIT, count * UNIT, self._pattern)
        units = list(self.truth[drive])
        units[unit : unit + count] = [self._pattern] * count
        self.truth[drive] = tuple(units)

    def change(self) -> None:
        """A few writes on every drive, elsewhere each time."""
        for number, drive in enumerate(self.truth):
            self.write(drive, (self._pattern * 7 + number * 3) % (self.size // UNIT - 2), 2)

    # -- the module ----------------------------------------------------------------------------------------------------

    def params(self, **options: t.Any) -> dict[str, t.Any]:
        """Parameters of the module for this VM; options beginning with ``vm_`` go into its entry in ``vms``."""
        entry = {"name": self.vm.name, "socket": str(self.vm.socket)}
        entry.update({key[3:]: options.pop(key) for key in list(options) if key.startswith("vm_")})
        return {"repository": str(self.repository), "quiesce": "off", "vms": [entry], **options}

    def start(self, trap: Trap | None = None, **options: t.Any) -> Running:
        """Start the module; call ``note`` when it is over."""
        return start_module(MODULE, self.params(**options), prelude=prelude(trap) if trap else "")

    def backup(self, trap: Trap | None = None, user: int | None = None, **options: t.Any) -> Result:
        """Run the module to its end, whatever that is."""
        if options.get("quiesce", "off") == "off":
            result = run_forked(MODULE, self.params(**options), trap, user=user)
        else:  # a guard forked from a fork of pytest may outlive it
            result = self.start(trap, **options).finish()
        self.note()
        return result

    def predicted(self, **options: t.Any) -> dict[str, t.Any]:
        """Check mode's answer about the VM; nothing may have changed by it."""
        before = self.state()
        result = run_forked(MODULE, self.params(**options), None, check=True).ok()
        after = self.state()
        assert after == before, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
        return dict(result.data["vms"][0])

    @contextmanager
    def stopped(
        self, label: str, nth: int = 1, *, on_target_error: str | None = None, **options: t.Any
    ) -> Iterator[Running]:
        """The module, stopped at a boundary; it goes on when the block ends. The caller finishes it."""
        trap = Trap(label=label, nth=nth, sends=signal.SIGSTOP, on_target_error=on_target_error)
        running = self.start(trap, **options)
        os.waitid(os.P_PID, running.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if Path(f"/proc/{running.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            raise AssertionError(f"it never came to {label}: {running.finish()}")
        try:
            yield running
        finally:
            running.process.send_signal(signal.SIGCONT)

    def break_target(self, number: int, errno: int = 5) -> None:
        """Put the same image behind a node of the same name whose writes fail."""
        node = next(node for node in self.vm.node_names() if node.endswith(f"-{number}-target"))
        file = node.replace("-target", "-file")
        self.vm.command("blockdev-del", node_name=node)
        self.vm.command("blockdev-del", node_name=file)
        image = {"driver": "file", "filename": str(next(self.store.glob(".*.partial")) / f"d{number}.qcow2")}
        errors = [{"event": "none", "iotype": "write", "errno": errno}]
        node_of_file = {"driver": "blkdebug", "node-name": file, "image": image, "inject-error": errors}
        self.vm.execute("blockdev-add", node_of_file)
        self.vm.command("blockdev-add", driver="qcow2", node_name=node, file=file, backing=None)

    # -- what is there -------------------------------------------------------------------------------------------------

    @property
    def store(self) -> Path:
        return self.repository / self.vm.name

    def entries(self) -> list[str]:
        return sorted(os.listdir(self.store)) if self.store.exists() else []

    def ids(self) -> set[str]:
        """Published backups."""
        return {name for name in self.entries() if _PUBLISHED.fullmatch(name)}

    def manifest(self, backup: str) -> dict[str, t.Any]:
        return dict(json.loads((self.store / backup / "manifest.json").read_text()))

    def newest(self) -> dict[str, t.Any]:
        return max((self.manifest(backup) for backup in self.ids()), key=lambda manifest: int(manifest["sequence"]))

    def levels(self) -> dict[str, str]:
        """Of the drives in the newest backup."""
        return {drive["name"]: drive["level"] for drive in self.newest()["drives"]}

    def note(self) -> None:
        """Remember the truth of every point that was not there before; complain when a backup has gone."""
        for name in self.entries():
            partial = _PARTIAL.fullmatch(name)
            if partial or _PUBLISHED.fullmatch(name):
                self.points.setdefault(partial[1] if partial else name, dict(self.truth))
        ids = self.ids()
        assert self.published <= ids, f"lost backups: {self.published - ids}"
        self.published = ids

    def state(self) -> dict[str, t.Any]:
        """What a run might change, but for what jobs that still run change: the tree, QEMU's nodes, jobs, bitmaps."""
        tree = {
            str(path): (path.lstat().st_size, path.lstat().st_mtime_ns, path.lstat().st_mode)
            for path in [self.repository, *sorted(self.repository.rglob("*"))]
            if path.exists() and not (path.suffix == ".qcow2" and path.parent.suffix == ".partial")
        }
        named = {name: node for name, node in self.vm.nodes().items() if not name.startswith("#")}
        nodes = sorted(named)
        bitmaps = {
            name: sorted(bitmap["name"] for bitmap in node.get("dirty-bitmaps", ()) if "name" in bitmap)
            for name, node in named.items()
        }
        jobs = sorted(job["id"] for job in self.vm.jobs())
        return {"tree": tree, "nodes": nodes, "jobs": jobs, "bitmaps": bitmaps}

    # -- judgement -----------------------------------------------------------------------------------------------------

    def no_leftovers(self) -> None:
        """Nothing of ours in QEMU but the bitmaps that the next backup needs; nothing in the tree but backups."""
        nodes = [node for node in self.vm.node_names() if node.startswith(_TRANSIENT)]
        assert not self.vm.jobs() and not nodes, (self.vm.jobs(), nodes)
        for drive in self.truth:
            names = {name for name in self.vm.bitmaps(drive) if name.startswith(f"bo-{self.repository_id}-")}
            assert names == self._wanted_bitmaps(drive), (drive, names, self._wanted_bitmaps(drive))
        assert not self.open_in_qemu(), self.open_in_qemu()
        self.tidy()

    def tidy(self) -> None:
        """The tree holds what the format says, and nothing else."""
        there = set(os.listdir(self.repository))
        assert there <= {"repository.json", self.vm.name}, there
        strange = [name for name in self.entries() if name != "lock" and not _PUBLISHED.fullmatch(name)]
        assert strange == [], strange
        for backup in self.ids():
            files = {drive["file"] for drive in self.manifest(backup)["drives"]}
            found = set(os.listdir(self.store / backup))
            assert found - {"verified.json"} == files | {"manifest.json"}, f"{backup}: {found}"

    def open_in_qemu(self) -> list[str]:
        """Files of the repository, or removed ones, that QEMU still has open."""
        links = [os.readlink(link) for link in Path(f"/proc/{self.vm.pid}/fd").iterdir() if link.is_symlink()]
        # memory of QEMU's own is "(deleted)" too
        return [link for link in links if str(self.directory) in link and ("deleted" in link or "repository" in link)]

    @property
    def repository_id(self) -> str:
        return str(json.loads((self.repository / "repository.json").read_text())["id"])

    def _wanted_bitmaps(self, drive: str) -> set[str]:
        """Of the drive's newest backup, and of its newest full; copies follow nothing."""
        manifests = sorted(map(self.manifest, self.ids()), key=lambda manifest: int(manifest["sequence"]))
        found: dict[str, str] = {}
        for manifest in manifests:
            level = next((each["level"] for each in manifest["drives"] if each["name"] == drive), "copy")
            if level != "copy":
                found["newest"] = manifest["id"]
            if level == "full":
                found["full"] = manifest["id"]
        return {f"bo-{self.repository_id}-{backup}" for backup in found.values()}

    def expect_restorable(self) -> None:
        """Every published point is, drive by drive, what the guest had written by then. qemu-img compare judges."""
        for backup in sorted(self.ids()):
            for drive in self.manifest(backup)["drives"]:
                with raw(self.points[backup][drive["name"]]) as reference:
                    image = self.store / backup / drive["file"]
                    assert images.compare(image, reference, "qcow2", "raw"), f"{backup} {drive['name']}"
                    assert images.info(image)["virtual-size"] == os.path.getsize(reference)
                    assert not images.check(image).get("corruptions")

    def expect_live(self) -> None:
        """The newest backup equals the disks themselves. Ends the VM."""
        newest = self.newest()
        self.vm.quit()
        for drive in newest["drives"]:
            disk = self.vm.drives[drive["name"]].image
            assert disk is not None
            assert images.compare(self.store / newest["id"] / drive["file"], disk), drive["name"]


@contextmanager
def raw(units: t.Sequence[int]) -> Iterator[str]:
    """The raw image that a truth describes."""
    with tempfile.NamedTemporaryFile(prefix="bo-truth-") as stream:
        for unit in units:
            stream.write(bytes([unit]) * UNIT)
        stream.flush()
        yield stream.name
