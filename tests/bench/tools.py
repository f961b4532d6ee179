# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How each tool is run for the clock: what is timed is the whole process, from its start to its end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.machines import Machine
from support.module import run_module

_HERE = Path(__file__).parent
_TIMEOUT = 600


class ToolFailed(Exception):
    """A contender ended with an error: a figure without a backup is none."""


def command(*argv: str | Path, stdin: str = "", **options: Any) -> tuple[float, str]:
    """Run a command; seconds and standard output. ToolFailed with its words when it fails."""
    words = [str(word) for word in argv]
    begin = time.monotonic()
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False, timeout=_TIMEOUT, **options)
    seconds = time.monotonic() - begin
    if done.returncode:
        raise ToolFailed(f"{' '.join(words)}: exit {done.returncode}: {done.stderr}{done.stdout}"[-4000:])
    return seconds, done.stdout


def fresh(directory: Path) -> Path:
    """An empty directory in the place of whatever was there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


@dataclass
class Module:
    """qmp_drive_backup with a repository of its own. ``answers`` keeps each run's results of its VMs."""

    repository: Path
    options: dict[str, Any] = field(default_factory=dict)
    answers: list[list[dict[str, Any]]] = field(default_factory=list)

    def params(self, machines: Sequence[Machine], level: str) -> dict[str, Any]:
        vms = [machine.entry() for machine in machines]
        return {"repository": str(self.repository), "vms": vms, "level": level, **self.options}

    def run(self, machines: Sequence[Machine], level: str = "auto", python: str | None = None) -> float:
        """Run the module as Ansible would on the host: its own interpreter, arguments as JSON."""
        begin = time.monotonic()
        result = run_module("qmp_drive_backup", self.params(machines, level), timeout=_TIMEOUT, python=python).ok()
        seconds = time.monotonic() - begin
        self.answers.append(result.data["vms"])
        expected = {"auto": "incremental"}.get(level, level)
        for vm in result.data["vms"]:
            if vm["level"] != expected:
                raise ToolFailed(
                    f"{vm['name']}: level {vm['level']} instead of {expected}: {vm['drives'][0]['reason']}"
                )
        return seconds

    def full(self, machines: Sequence[Machine], level: str = "full") -> float:
        """A full; what older rounds left goes afterwards, so that the disk does not fill up."""
        seconds = self.run(machines, level)
        for machine in machines:
            backups = sorted((self.repository / machine.qemu.name).glob("2*"), key=lambda path: path.stat().st_mtime)
            for old in backups[:-1]:
                shutil.rmtree(old)
        return seconds


@dataclass
class Bare:
    """The bare script with a target directory and a bitmap of its own. ``inside`` keeps its own clock's seconds."""

    directory: Path
    direct: bool = True
    parallel: int = 8
    bitmap: str | None = None
    inside: list[float] = field(default_factory=list)
    newest: dict[str, Path] = field(default_factory=dict)

    def full(self, machines: Sequence[Machine]) -> float:
        """A full with a new bitmap; replaces what was in the directory."""
        fresh(self.directory)
        self.newest.clear()
        self.bitmap = f"bare-{self.directory.name}"
        for machine in machines:
            if self.bitmap in machine.qemu.bitmaps("d0"):
                machine.qemu.command("block-dirty-bitmap-remove", node=machine.node, name=self.bitmap)
        return self._run(machines, incremental=False)

    def incremental(self, machines: Sequence[Machine]) -> float:
        """What changed since the last run, on top of it."""
        return self._run(machines, incremental=True)

    def _run(self, machines: Sequence[Machine], *, incremental: bool) -> float:
        job = {"parallel": self.parallel, "direct": self.direct, "vms": [self._vm(m, incremental) for m in machines]}
        seconds, printed = command(sys.executable, _HERE / "bare.py", stdin=json.dumps(job))
        self.inside.append(json.loads(printed)["seconds"])
        return seconds

    def _vm(self, machine: Machine, incremental: bool) -> dict[str, Any]:
        target = self.directory / f"{machine.qemu.name}-{len(self.inside)}.qcow2"
        drive: dict[str, Any] = {"node": machine.node, "target": str(target), "size": machine.size}
        if incremental:
            drive.update({"bitmap": self.bitmap, "backing": str(self.newest[machine.qemu.name])})
        else:
            drive["add"] = self.bitmap
        self.newest[machine.qemu.name] = target
        return {"socket": str(machine.qemu.socket), "drives": [drive]}


def convert(machine: Machine, target: Path, *, proved: bool = False) -> float:
    """The practical ceiling of a qcow2 copy: offline, no point in time, nothing recorded.

    ``proved``: followed by what ``verify: true`` does, with the tools an administrator has for it.
    """
    target.unlink(missing_ok=True)
    options = ["-U", "-f", "qcow2", "-O", "qcow2", "-W", "-m", "16", "-t", "none"]
    seconds, _printed = command("qemu-img", "convert", *options, machine.image, target)
    if proved:
        seconds += command("qemu-img", "check", "-f", "qcow2", target)[0] + command("sha256sum", target)[0]
    target.unlink()
    return seconds


def playbook(directory: Path, tasks: Sequence[dict[str, Any]]) -> float:
    """One play on localhost with these tasks, by ansible-playbook, from its start to its end."""
    play = {"hosts": "localhost", "gather_facts": False, "tasks": list(tasks)}
    path = directory / "play.json"
    path.write_text(json.dumps([play]))
    tree = Path(__file__).resolve().parents[2] / ".collections"
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")},
        "ANSIBLE_COLLECTIONS_PATH": str(tree),
        "ANSIBLE_LOCAL_TEMP": str(directory / "ansible"),
        "ANSIBLE_HOME": str(directory / "ansible"),
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
    }
    program = Path(sys.executable).parent / "ansible-playbook"
    seconds, _printed = command(
        sys.executable, program, "-i", "localhost,", "-c", "local", path, env=environment, cwd=directory
    )
    return seconds
