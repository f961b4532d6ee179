# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A bench for external snapshots: a real QEMU, and an independent memory of what the guest wrote until each of them.

The memory (``SnapshotBench.truth``) is a pattern byte per 64 KiB. What the guest sees is read as the guest would, what
the images hold is told by qemu-img. Nothing here believes what the module answers.

The VM is started by running ``vm.sh``, as its administrator would, so that the file can be given as ``definition``.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import typing as t
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import images
from lab.drive import Drive
from lab.qemu import Qemu
from support.backup import MIB, UNIT, Truth, raw
from support.forked import run_forked
from support.killer import Trap, prelude
from support.module import Result, Running, start_module

MODULE = "qmp_snapshot"
RECORD = ".snapshot.json"
_OURS = "bos-"
_DEFINITION_COPY = ".before-snapshot"


def _plain(filename: str) -> str:
    """QEMU says json:... for an image whose backing file it was given by other means than the header."""
    return str(json.loads(filename[5:])["file"]["filename"]) if filename.startswith("json:") else filename


class Scripted(Qemu):
    """A QEMU whose command line is in a script."""

    @property
    def script(self) -> Path:
        return self.directory / f"{self.name}.sh"

    def argv(self) -> list[str]:
        if not self.script.exists():
            line = " \\\n  ".join(shlex.quote(part) for part in super().argv())
            self.script.write_text(f"#!/bin/sh\nexec {line}\n")
            self.script.chmod(0o755)
        return [str(self.script)]


class SnapshotBench:
    """One running VM with two drives: ``d0`` given by -blockdev, ``d1`` by -drive. ``defined``: tasks rewrite vm.sh."""

    def __init__(self, directory: Path, *, defined: bool = False, size: int = 2 * MIB, name: str = "vm") -> None:
        self.directory = directory
        self.size = size
        self.defined = defined
        self.bases = {drive: str(images.create(directory / f"{name}-{drive}.qcow2", size)) for drive in ("d0", "d1")}
        drives = [Drive("d0", self.bases["d0"]), Drive("d1", self.bases["d1"], style="drive")]
        self.vm = Scripted(name, drives, directory, paused=False)
        self.vm.start()
        self.truth: Truth = dict.fromkeys(self.bases, (0,) * (size // UNIT))
        self.points: dict[str, Truth] = {}
        self._pattern = 0
        for drive in self.bases:
            self.write(drive, 0, 8)

    # -- the guest -----------------------------------------------------------------------------------------------------

    def write(self, drive: str, unit: int, count: int = 1) -> None:
        """Write ``count`` units (64 KiB) of a new pattern at unit ``unit``, as the guest would."""
        self._pattern = self._pattern % 255 + 1
        self.vm.write(drive, unit * UNIT, count * UNIT, self._pattern)
        units = list(self.truth[drive])
        units[unit : unit + count] = [self._pattern] * count
        self.truth[drive] = tuple(units)

    def change(self) -> None:
        """A write on every drive, elsewhere each time."""
        for number, drive in enumerate(self.truth):
            self.write(drive, (self._pattern * 7 + number * 3) % (self.size // UNIT - 2), 2)

    def flush(self) -> None:
        self.vm.flush()

    def sees(self, drive: str, truth: Truth) -> bool:
        """Does the guest read this on the drive?"""
        position = 0
        for pattern, group in itertools.groupby(truth[drive]):
            length = len(list(group)) * UNIT
            if not self.vm.holds(drive, position, length, pattern):
                return False
            position += length
        return True

    def wrong(self, drive: str) -> list[int]:
        """The units that the guest does not read as it wrote them."""
        units = enumerate(self.truth[drive])
        return [number for number, byte in units if not self.vm.holds(drive, number * UNIT, UNIT, byte)]

    def settle(self, *candidates: Truth) -> Truth:
        """What the guest reads is one of these, on all drives the same one; that is the truth from now on."""
        found = {
            drive: [number for number, each in enumerate(candidates) if self.sees(drive, each)] for drive in self.bases
        }
        common = set.intersection(*(set(numbers) for numbers in found.values()))
        assert common, f"the drives are of no one moment: {found}"
        self.truth = dict(candidates[min(common)])
        return self.truth

    @property
    def status(self) -> str:
        return str(self.vm.command("query-status")["status"])

    def power_cut(self) -> None:
        """SIGKILL; what the guest had flushed is on the disk."""
        self.vm.flush()
        self.vm.kill9()

    # -- the module ----------------------------------------------------------------------------------------------------

    def params(self, **options: t.Any) -> dict[str, t.Any]:
        """Parameters of the module for this VM; ``monitor`` is the socket to take."""
        entry = {"name": self.vm.name, "socket": str(options.pop("monitor", self.vm.socket))}
        if self.defined:
            options = {"definition": [str(self.vm.script)], **options}
        return {"quiesce": "off", "overlay_name": "{drive}.{name}.qcow2", "vms": [entry], **options}

    def run(self, trap: Trap | None = None, **options: t.Any) -> Result:
        """Run the module to its end, whatever that is."""
        return run_forked(MODULE, self.params(**options), trap)

    def one(self, **options: t.Any) -> dict[str, t.Any]:
        """Run it without disturbance, and answer its result about the VM."""
        return dict(self.run(**options).ok().data["vms"][0])

    def take(self, name: str, **options: t.Any) -> None:
        self.points[name] = dict(self.truth)
        self.one(name=name, state="present", **options)

    def start(self, trap: Trap | None = None, **options: t.Any) -> Running:
        return start_module(MODULE, self.params(**options), prelude=prelude(trap) if trap else "")

    @contextmanager
    def stopped(self, trap: Trap, **options: t.Any) -> Iterator[Running]:
        """The module, stopped at a boundary; it goes on when the block ends. The caller finishes it."""
        running = self.start(trap, **options)
        os.waitid(os.P_PID, running.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if Path(f"/proc/{running.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            raise AssertionError(f"it never came to {trap}: {running.finish()}")
        try:
            yield running
        finally:
            running.process.send_signal(signal.SIGCONT)

    def predicted(self, **options: t.Any) -> dict[str, t.Any]:
        """Check mode's answer about the VM (its error, if that is what it says); nothing may have changed by it."""
        before = self.state()
        result = run_forked(MODULE, self.params(**options), None, check=True)
        after = self.state()
        assert after == before, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
        assert result.data, result
        return dict(result.data["vms"][0])

    # -- what is there -------------------------------------------------------------------------------------------------

    def files(self) -> list[str]:
        """All but what the lab itself makes."""
        return sorted(path.name for path in self.directory.iterdir() if path.name not in self._of_lab())

    def _of_lab(self) -> set[str]:
        vm = self.vm
        return {path.name for path in (vm.socket, vm.control_socket, vm.log, vm.script)} | {"steps"}

    def chain(self, drive: str) -> list[str]:
        """The files that QEMU has open for the drive, the active one first."""
        image: dict[str, t.Any] | None = self.vm.block(drive)["inserted"]["image"]
        found = []
        while image is not None:
            found.append(_plain(str(image["filename"])))
            image = image.get("backing-image")
        return found

    def names(self) -> list[str]:
        """The snapshots of drive d0, oldest first, by the records beside the images of its chain."""
        records = (Path(file + RECORD) for file in reversed(self.chain("d0")))
        return [json.loads(record.read_text())["name"] for record in records if record.exists()]

    def state(self) -> dict[str, t.Any]:
        """What a run might change."""
        stats = {path.name: path.lstat() for path in self.directory.iterdir() if path.name != self.vm.log.name}
        disks = {name for name in stats if name.endswith(".qcow2")}  # a job may be writing to them
        return {
            "files": {
                name: stat.st_mode if name in disks else (stat.st_size, stat.st_mtime_ns, stat.st_mode)
                for name, stat in stats.items()
            },
            "nodes": self.vm.node_names(),
            "jobs": sorted((job["id"], job["status"]) for job in self.vm.jobs()),
            "chains": {drive: self.chain(drive) for drive in self.bases},
            "status": self.status,
            "script": self.vm.script.read_text(),
        }

    def _nodes_in_use(self) -> set[str]:
        """Names of all nodes that are reached from a device."""

        def walk(entry: dict[str, t.Any] | None) -> Iterator[str]:
            if entry is not None:
                yield str(entry.get("node-name"))
                yield from walk(entry.get("parent"))
                yield from walk(entry.get("backing"))

        return {name for entry in self.vm.command("query-blockstats") for name in walk(entry)}

    # -- judgement -----------------------------------------------------------------------------------------------------

    def expect(self, *snapshots: str, kept: t.Collection[str] = ()) -> None:
        """The guest runs and reads the truth, the snapshots (oldest first) are whole, and nothing else is there."""
        assert self.status == "running", self.status
        for drive in self.bases:
            assert self.sees(drive, self.truth), f"{drive} does not hold what the guest wrote: {self.wrong(drive)}"
        assert self.vm.jobs() == []
        nodes = {node for node in self.vm.node_names() if node.startswith(_OURS)}
        assert nodes <= self._nodes_in_use(), nodes - self._nodes_in_use()
        wanted = set(map(os.path.basename, kept)) | {f"{os.path.basename(file)}{RECORD}" for file in kept}
        for drive in self.bases:
            wanted |= self._expect_chain(drive, snapshots)
        there = {name for name in self.files() if _DEFINITION_COPY not in name}
        assert there == wanted, f"strange: {there - wanted}, missing: {wanted - there}"

    def _expect_chain(self, drive: str, snapshots: t.Sequence[str]) -> set[str]:
        """The chain holds these snapshots, in this order; the files that belong to it."""
        chain = self.chain(drive)
        assert images.chain(chain[0]) == chain, "qemu-img finds another chain than QEMU has open"
        overlays = [file for file in reversed(chain) if os.path.exists(file + RECORD)]
        assert len(overlays) == len(snapshots), (chain, overlays, snapshots)
        for name, overlay in zip(snapshots, overlays):
            with raw(self.points[name][drive]) as reference:
                below = chain[chain.index(overlay) + 1]
                assert images.compare(below, reference, "qcow2", "raw"), f"snapshot {name} of {drive} is spoilt"
        names = {os.path.basename(file) for file in chain}
        return names | {f"{os.path.basename(overlay)}{RECORD}" for overlay in overlays}

    def expect_bootable(self) -> None:
        """The definition names what the VM runs on: every active image, and no image that is not active."""
        text = self.vm.script.read_text()
        for drive in self.bases:
            active, *below = self.chain(drive)
            assert active in text and not any(file in text for file in below), (active, text)

    def finish(self) -> None:
        """End the VM: the images are sound, and hold what the guest wrote."""
        actives = {drive: self.chain(drive) for drive in self.bases}
        self.vm.quit()
        for drive, chain in actives.items():
            self.judge(drive, chain)

    def judge(self, drive: str, chain: t.Sequence[str], truth: Truth | None = None) -> None:
        """For a VM that is off: the images of this chain are sound, and hold the truth."""
        assert images.chain(chain[0]) == list(chain)
        for file in chain:
            report = images.check(file)
            assert not report.get("corruptions") and not report["check-errors"], (file, report)
        with raw((truth or self.truth)[drive]) as reference:
            assert images.compare(chain[0], reference, "qcow2", "raw"), f"{drive}: {chain[0]}"

    def orphans(self) -> list[str]:
        """Images that are in no chain."""
        used = {file for drive in self.bases for file in self.chain(drive)}
        return sorted(str(path) for path in self.directory.glob("*.qcow2") if str(path) not in used)

    def sweep(self) -> None:
        """Remove by hand what is in no chain, so that the next round begins as the first did."""
        for orphan in self.orphans():
            for path in self.directory.glob(f"{os.path.basename(orphan)}*"):
                path.unlink()
