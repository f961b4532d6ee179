# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Repositories made without a VM and without this collection's code: qemu-img, qemu-io and hand-written JSON.

Every drive has an independent witness: the same writes go into a raw file with plain pwrite(), and a copy of that file
is kept for each point.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import typing as t
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
REPOSITORY_ID = "5e11ab1e"


def tool(*arguments: str | Path) -> str:
    """Run a command and return its output; CalledProcessError with what it said otherwise."""
    done = subprocess.run([str(word) for word in arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stdout}{done.stderr}")
    return done.stdout


def identical(a: Path, a_format: str, b: Path, b_format: str) -> bool:
    """qemu-img's own comparison."""
    command = ["qemu-img", "compare", "-f", a_format, "-F", b_format, str(a), str(b)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        raise RuntimeError(done.stderr)
    return done.returncode == 0


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def backup_id(number: int) -> str:
    """Ids whose order says nothing: the later the backup, the earlier the time in its name."""
    return f"20261123T{23 - number // 60:02}{59 - number % 60:02}00Z-{number:08x}"


@dataclass
class Fabricated:
    """A repository with one VM; ``witness(n, drive)`` is the raw truth of point n (0 is the full)."""

    path: Path
    vm: str
    directory: Path
    witnesses: Path
    sizes: dict[str, int]
    ids: list[str] = field(default_factory=list)
    uuid: str | None = None

    def witness(self, number: int, drive: str = "disk0") -> Path:
        return self.witnesses / f"{number}-{drive}.raw"

    def image(self, number: int, drive: str = "disk0") -> Path:
        return self.directory / self.ids[number] / f"{drive}.qcow2"

    def manifest_path(self, number: int) -> Path:
        return self.directory / self.ids[number] / "manifest.json"

    def manifest(self, number: int) -> dict[str, t.Any]:
        return t.cast("dict[str, t.Any]", json.loads(self.manifest_path(number).read_text()))

    def state(self) -> dict[Path, tuple[int, ...]]:
        """What must not change when a repository is only read."""
        found = {path: path.lstat() for path in self.path.rglob("*")}
        return {path: (stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}

    def edit(self, number: int, change: t.Callable[[dict[str, t.Any]], t.Any]) -> None:
        """Rewrite a manifest; ``change`` works on it in place."""
        manifest = self.manifest(number)
        change(manifest)
        self.manifest_path(number).unlink()
        self.manifest_path(number).write_text(json.dumps(manifest))

    def reseal(self, number: int, drive: str = "disk0") -> None:
        """After an image was tampered with: make size and checksum in the manifest true again."""
        image = self.image(number, drive)

        def change(manifest: dict[str, t.Any]) -> None:
            for record in manifest["drives"]:
                if record["name"] == drive:
                    record.update(size=image.stat().st_size, sha256=sha256(image))

        self.edit(number, change)

    def add(self, seed: int = 0, writes: int = 6, *, full: bool = False) -> str:
        """One more backup with random writes since the last one."""
        number = len(self.ids)
        self.ids.append(backup_id(number))
        (self.directory / self.ids[number]).mkdir()
        parent = None if full or number == 0 else self.ids[number - 1]
        for drive, size in self.sizes.items():
            self._image(number, drive, size, parent, random.Random(f"{seed}/{number}/{drive}"), writes)
        drives = [self._record(number, drive, parent) for drive in self.sizes]
        self.manifest_path(number).write_text(json.dumps(self._manifest(number, drives, parent)))
        return self.ids[number]

    def _image(self, number: int, drive: str, size: int, parent: str | None, dice: random.Random, writes: int) -> None:
        image, witness = self.image(number, drive), self.witness(number, drive)
        before = self.witness(number - 1, drive)
        if before.exists():
            tool("cp", "--sparse=always", before, witness)
        else:
            witness.touch()
            os.truncate(witness, size)
        below = () if parent is None else ("-b", f"../{parent}/{drive}.qcow2", "-F", "qcow2")
        if parent is None and before.exists():  # a later full holds everything
            tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", before, image)
        else:
            tool("qemu-img", "create", "-q", "-f", "qcow2", *below, image, str(size))
        commands: list[str] = []
        with witness.open("r+b") as stream:
            for _write in range(writes):
                length = dice.choice([512, 4096, 65536, 200 * 1024, 512 * 1024])
                offset = dice.randrange(0, (size - length) // 512) * 512
                value = dice.choice([0, *range(1, 255)])
                commands += ["-c", f"write -P {value} {offset} {length}"]
                stream.seek(offset)
                stream.write(bytes([value]) * length)
        tool("qemu-io", "-f", "qcow2", *commands, image)
        image.chmod(0o440)

    def _record(self, number: int, drive: str, parent: str | None) -> dict[str, t.Any]:
        image = self.image(number, drive)
        return {
            "name": drive,
            "file": f"{drive}.qcow2",
            "level": "full" if parent is None else "incremental",
            "reason": None,
            "parent": parent,
            "standalone": True,
            "node": f"{drive}-node",
            "virtual_size": self.sizes[drive],
            "size": image.stat().st_size,
            "copied": 0,
            "sha256": sha256(image),
            "source": {"file": f"/vms/{drive}.qcow2", "format": "qcow2", "serial": None},
        }

    def _manifest(self, number: int, drives: list[dict[str, t.Any]], parent: str | None) -> dict[str, t.Any]:
        moment = f"2026-11-{number + 1:02}T05:45:00.000000Z"
        return {
            "format": 1,
            "id": self.ids[number],
            "repository": REPOSITORY_ID,
            "sequence": number + 1,
            "vm": {"name": self.vm, "uuid": self.uuid},
            "level": "full" if parent is None else "incremental",
            "sync": "full" if parent is None else "bitmap",
            "consistency": "crash",
            "point": moment,
            "started": moment,
            "finished": moment,
            "freeze_ms": None,
            "tags": [],
            "drives": drives,
            "skipped": [],
            "definition": [],
            "qemu": {"version": "7.2.22"},
            "collection": "0.1.0",
            "warnings": [],
            "a key of a later release": {"is": "ignored"},
        }

    def save_file(self, number: int, source: Path, content: bytes) -> Path:
        """Let the backup hold a saved file that came from ``source`` (which need not exist)."""
        manifest = self.manifest(number)
        place = len(manifest["definition"])
        saved = self.directory / self.ids[number] / "definition" / str(place)
        saved.parent.mkdir(exist_ok=True)
        saved.write_bytes(content)
        entry = {
            "path": str(source),
            "file": f"definition/{place}",
            "mode": "0640",
            "uid": os.getuid(),
            "gid": os.getgid(),
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        self.edit(number, lambda manifest: manifest["definition"].append(entry))
        return saved

    def copy_to(self, path: Path) -> Fabricated:
        """The whole tree elsewhere, as rsync or an object store would bring it there: all times are new."""
        shutil.copytree(self.path, path, copy_function=shutil.copyfile)
        return Fabricated(
            path, self.vm, path / self.directory.name, self.witnesses, self.sizes, list(self.ids), self.uuid
        )


def fabricate(
    path: Path, *, points: int = 3, vm: str = "web1", sizes: dict[str, int] | None = None, seed: int = 0
) -> Fabricated:
    """A repository at ``path`` with a chain of ``points`` backups; witnesses lie next to it."""
    directory = path / vm
    directory.mkdir(parents=True)
    witnesses = path.parent / f"{path.name}.witnesses"
    witnesses.mkdir()
    identity = {"format": 1, "id": REPOSITORY_ID, "created": "2026-11-01T00:00:00.000000Z"}
    (path / "repository.json").write_text(json.dumps(identity))
    made = Fabricated(path, vm, directory, witnesses, sizes or {"disk0": 16 * MIB})
    for _number in range(points):
        made.add(seed)
    return made
