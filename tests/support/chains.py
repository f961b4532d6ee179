# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Chains that are made shorter, beside the truth of Shots: what the guest wrote, and what it had at each snapshot."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import typing as t
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import images
from lab.daemon import StorageDaemon
from lab.fixtures import QemuFactory
from lab.qemu import Qemu
from support.forked import run_forked
from support.killer import Trap, prelude
from support.module import Result, Running, start_module
from support.points import Drive
from support.shots import SIZE, UNIT, Shots, vm_of

PREDICTED = ("changed", "status", "drives", "deleted", "kept", "recovered", "boot_drift", "skipped")
COMMIT, STREAM = "qmp_block_commit", "qmp_block_stream"
_IMAGES = ("top", "base", "bottom")


class Chain(Shots):
    """The chain of one drive, vda. Images in options may be told by their file name alone."""

    def chain(self, drive: str = "vda") -> list[str]:
        """File names only, the active one first. From the nodes of the files: images may say json:{...}, cut off."""
        return [os.path.basename(path) for path in self._paths(drive)]

    def active(self, drive: str = "vda") -> Path:
        return Path(self._paths(drive)[0])

    def _paths(self, drive: str) -> list[str]:
        nodes = {str(node["node-name"]): node for node in self.qemu.command("query-named-block-nodes", flat=True)}
        wanted = self.qemu.active_node(drive)
        stats = next(each for each in self.qemu.command("query-blockstats") if each.get("node-name") == wanted)
        found = []
        while stats:
            found.append(str(nodes[stats.get("parent", stats)["node-name"]]["image"]["filename"]))
            stats = stats.get("backing")
        return found

    def grow(self, count: int, first: int = 0) -> None:
        """Snapshots s0, s1, ..., with changes before each of them and after the last."""
        for number in range(first, first + count):
            self.change()
            self.present(f"s{number}")
        self.change()

    def run(self, module: str, *, check: bool = False, trap: Trap | None = None, **options: t.Any) -> Result:
        return run_forked(module, self.params(**options), trap, check=check)

    def commit(self, module: str = COMMIT, **options: t.Any) -> dict[str, t.Any]:
        """Done without disturbance, and nothing of it is left."""
        data = vm_of(self.run(module, **options).ok())
        assert not self.qemu.jobs(), self.qemu.jobs()
        return data

    def commit_predicted(self, module: str = COMMIT, **options: t.Any) -> tuple[dict[str, t.Any], dict[str, t.Any]]:
        """Check mode says just what is done then, and does nothing itself."""
        before = self.state()
        predicted = vm_of(self.run(module, check=True, **options).ok())
        assert self.state() == before
        data = self.commit(module, **options)
        for key in PREDICTED:
            assert _plain(predicted[key]) == _plain(data[key]), f"{key}: {predicted[key]}; the run: {data[key]}"
        names = [[each["execute"], each["arguments"].get("job-id")] for each in predicted["commands"]]
        done = [[each["execute"], each["arguments"].get("job-id")] for each in data["commands"]]
        assert [each for each in done if each[0] in ("block-commit", "block-stream")] == names
        return predicted, data

    def again(self, module: str = COMMIT, **options: t.Any) -> dict[str, t.Any]:
        data = self.commit(module, **options)
        assert (data["changed"], data["status"]) == (False, "unchanged"), data
        return data

    def refused(self, module: str = COMMIT, **options: t.Any) -> dict[str, t.Any]:  # type: ignore[override]
        """The error, in check mode as well; neither QEMU nor the directory has changed."""
        before = self.state()
        errors = [vm_of(self.run(module, check=check, **options)).get("error") for check in (True, False)]
        assert errors[0] is not None and errors[1] is not None, errors
        assert errors[0]["kind"] == errors[1]["kind"], errors
        assert self.state() == before
        self.live()
        return dict(errors[1])

    def params(self, **options: t.Any) -> dict[str, t.Any]:
        for name in _IMAGES:
            if str(options.get(name, "")).endswith(".qcow2"):
                options[name] = str(self.directory / options[name])
        return {"vms": [{**self.entry, **options.pop("entry", {})}], **options}

    @contextmanager
    def stopped(self, trap: Trap, module: str = COMMIT, **options: t.Any) -> Iterator[Running]:
        """The module, stopped at a boundary; it goes on when the block ends. The caller finishes it."""
        running = start_module(module, self.params(**options), prelude=prelude(trap))
        os.waitid(os.P_PID, running.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if Path(f"/proc/{running.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            raise AssertionError(f"it never came to {trap}: {running.finish()}")
        try:
            yield running
        finally:
            running.process.send_signal(signal.SIGCONT)

    def wait_jobs(self, *states: str) -> None:
        """Until every job is in one of the states."""
        while any(job["status"] not in states for job in self.qemu.jobs()):
            os.sched_yield()

    def live(self) -> None:
        """Read as the device does while a job has the images: it lets nobody else look at them."""
        busy = bool(self.qemu.jobs())
        self.threaded = busy
        super().live()
        self.threaded = False

    def begin(self) -> None:
        """From whatever an earlier round left to a base and four snapshots of ours, k0 the oldest."""
        if len(self.chain()) > 1:
            self.commit(base="base.qcow2", merge="commit", delete=True)
        for path in self.directory.glob("vda.*"):
            path.unlink()
        for number in range(4):
            self.change()
            self.quick(f"k{number}")
        self.change()

    def quick(self, name: str) -> None:
        """A snapshot as ours are, made in no time."""
        names = []
        for bitmap in sorted(self.qemu.bitmaps("vda")):
            first, _dot, layer = bitmap.partition("@")[0].partition(".")
            names.append(f"{first}.{int(layer or 0) + 1}")
        self._stack(name, self.qemu.active_node("vda"), self.active(), len(self.truth["vda"]), names)

    def expect_only_chain(self, *, emptied: bool) -> None:
        """Records and images of the chain, and (``emptied``) those that were merged and left; nothing else of ours."""
        chain = self.chain()
        found = [name for name in self.files() if name.startswith("vda.") and name.endswith((".qcow2", ".json"))]
        strange = [name for name in found if name.removesuffix(".snapshot.json") not in chain]
        for name in strange:
            record = self.directory / f"{name.removesuffix('.snapshot.json')}.snapshot.json"
            raw = json.loads(record.read_text())
            assert emptied and raw["state"] == "merged" and raw["stays"], (name, raw)
        for name in chain[:-1]:
            raw = json.loads((self.directory / f"{name}.snapshot.json").read_text())
            below = chain[chain.index(name) + 1]
            assert raw["state"] == "present" and not raw.get("discards"), raw
            assert os.path.basename(raw["image"]) == below, (raw, chain)

    def restart(self, active: Path) -> None:
        """After QEMU was killed: the VM is started with this image."""
        self.qemu.drives["vda"] = Drive("vda", active)
        self.qemu.start()

    def backdate(self, overlay: str, created: str) -> None:
        path = self.directory / f"{overlay}.snapshot.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "created": created}))

    def foreign(self, name: str) -> None:
        """An overlay by somebody else."""
        below, lower = self.qemu.active_node("vda"), self.active()
        _node, path = self._stack(name, below, lower, len(self.truth["vda"]), [])
        path.with_name(f"{path.name}.snapshot.json").unlink()

    def pile(self, count: int) -> None:
        node, below, size = self.qemu.active_node("vda"), self.active(), len(self.truth["vda"])
        carried = sorted(self.qemu.bitmaps("vda"))
        for number in range(count):
            self._scribble(number % 100, number % 250 + 1)
            bitmaps = [f"{name}.{number + 1}" for name in carried]
            node, below = self._stack(f"p{number}", node, below, size, bitmaps)
        self.write("vda", 101)

    def _scribble(self, unit: int, pattern: int) -> None:
        """A write without looking at the chain before: to describe a long one takes QEMU long."""
        line = f"write -P {pattern} {unit * UNIT} {UNIT}"
        self.qemu.hmp(f'qemu-io -d /machine/peripheral/vda/virtio-backend "{line}"')
        self.truth["vda"][unit * UNIT : (unit + 1) * UNIT] = bytes([pattern]) * UNIT

    def _stack(self, name: str, below: str, lower: Path, size: int, bitmaps: t.Sequence[str]) -> tuple[str, Path]:
        """An overlay with these bitmaps, and its record."""
        path, node = self.directory / f"vda.{name}.qcow2", f"bos-{zlib.crc32(name.encode()):08x}-1"
        header = ["-u", "-b", lower.name, "-F", "qcow2"]
        images.run_tool("qemu-img", "create", "-q", "-f", "qcow2", *header, path, str(size))
        protocol = {"driver": "file", "filename": str(path)}
        self.qemu.execute("blockdev-add", {"driver": "qcow2", "node-name": node, "file": protocol, "backing": None})
        actions: list[dict[str, t.Any]] = [{"type": "blockdev-snapshot", "data": {"node": below, "overlay": node}}]
        for bitmap in bitmaps:
            data = {"node": node, "name": bitmap, "persistent": True}
            actions.append({"type": "block-dirty-bitmap-add", "data": data})
        self.qemu.execute("transaction", {"actions": actions})
        record: dict[str, t.Any] = {
            "name": name,
            "drive": "vda",
            "overlay": str(path),
            "image": str(lower),
            "image_format": "qcow2",
        }
        record |= {"created": "2026-01-01T00:00:00Z", "state": "present", "vm": self.qemu.name, "uuid": self.qemu.uuid}
        record |= {"consistency": "crash", "format": 1}
        path.with_name(f"{path.name}.snapshot.json").write_text(json.dumps(record))
        return node, path

    def node_of_bottom(self) -> str:
        """Of the lowest image, which may lie on another host."""

        def lowest(stats: dict[str, t.Any]) -> dict[str, t.Any]:
            return lowest(stats["backing"]) if "backing" in stats else stats

        return str(lowest(self.qemu.command("query-blockstats")[0])["node-name"])

    def node(self, number: int) -> str:
        """Of the image ``number`` of the chain."""
        file = str(self.directory / self.chain()[number])
        nodes = self.qemu.nodes().values()
        return next(str(node["node-name"]) for node in nodes if node["drv"] == "qcow2" and _is(node, file))

    def names(self) -> list[str]:
        """The snapshots that the records beside the chain's images tell of, the newest first."""
        paths = [self.directory / f"{file}.snapshot.json" for file in self.chain()[:-1]]
        return [str(json.loads(path.read_text())["name"]) for path in paths if path.exists()]

    def resize(self, size: int) -> None:
        self.qemu.command("block_resize", node_name=self.qemu.active_node("vda"), size=size)
        self.truth["vda"] += bytes(size - len(self.truth["vda"]))

    def judge_snapshots(self, *names: str) -> None:
        """Each is, read by another tool, what the guest had then. ``names``: the only ones that are left."""
        chain = self.chain()
        found = {}
        for number, file in enumerate(chain[:-1]):
            path = self.directory / f"{file}.snapshot.json"
            if path.exists():
                found[str(json.loads(path.read_text())["name"])] = self.directory / chain[number + 1]
        assert set(found) == set(names), (found, names)
        for name, image in found.items():
            past = self.past[name]["vda"]
            reference = self.directory / "past.raw"
            reference.write_bytes(past)
            # QEMU 10 and later keep an image open for writing that was streamed into in the middle of a chain.
            assert images.compare(image, reference, "qcow2", "raw", shared=True), f"snapshot {name} ({image}) is spoilt"
            reference.unlink()


def _is(node: dict[str, t.Any], file: str) -> bool:
    return Path(file).name in str(node["image"]["filename"]).rsplit("/", 1)[-1]


def _plain(value: t.Any) -> t.Any:
    """Without what another moment changes: free space, and bytes in an image that grows meanwhile."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        volatile = ("space_free", "space_needed", "bytes")
        return {key: _plain(each) for key, each in value.items() if key not in volatile}
    return value


@contextmanager
def failing_storage(factory: QemuFactory, directory: Path, iotype: str) -> Iterator[tuple[Qemu, str]]:
    """A VM whose base image is another host's, and fails once, at its unit 50; and a directory for overlays."""
    image, server = images.create(directory / "far.raw", SIZE, "raw"), directory / "far.nbd"
    overlays = directory / "overlays"
    overlays.mkdir()
    error = {"event": "none", "iotype": iotype, "errno": errno.EIO, "once": True, "sector": 50 * UNIT // 512}
    debug: dict[str, t.Any] = {"driver": "blkdebug", "node-name": "far", "inject-error": [error]}
    debug["image"] = {"driver": "file", "filename": str(image)}
    export = ["--nbd-server", f"addr.type=unix,addr.path={server}"]
    export += ["--export", "nbd,id=far,node-name=far,name=far,writable=on"]
    with StorageDaemon("far", directory, [debug], export):
        drive = Drive("vda", f"nbd+unix:///far?socket={server}", fmt="raw", style="drive")
        qemu = factory("vm", [drive], paused=False)
        yield qemu, str(overlays)
        qemu.close()


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


__all__ = ["COMMIT", "STREAM", "Chain", "failing_storage", "fill", "mounted"]
