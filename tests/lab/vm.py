# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""A real VM with a booted guest, kept by its definition file and ``vmctl`` like an administrator keeps it."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import vmctl
from lab.agent import Agent
from lab.drive import Drive
from lab.guard import guard, release
from lab.guest import GuestImage, create_ext4, guest_image
from lab.process import LabError
from lab.qmp import Qmp, QmpError
from lab.reaper import kill_processes_with

MEMORY_MIB = 96
DISK_SIZE = 64 * 1024 * 1024


def definition_text(drives: Sequence[Drive], image: GuestImage, memory: int = MEMORY_MIB) -> str:
    """A definition file for ``vmctl``: machine, guest and drives, one option per line."""
    fixed = ["-M", "pc", "-accel", "tcg", "-m", str(memory), "-uuid", str(uuid.uuid4()), *image.arguments()]
    controllers = [text for text in dict.fromkeys(drive.controller for drive in drives) if text]
    arguments = [*fixed, *(part for text in controllers for part in ("-device", text))]
    for drive in drives:
        arguments += drive.arguments()
    lines: list[str] = ["# made by the lab; read by vmctl.py"]
    for argument in arguments:
        # a value never begins with "-" here, so pairs can be told by their option
        lines.append(argument) if argument.startswith("-") else lines.append(f"{lines.pop()} {argument}")
    return "\n".join(lines) + "\n"


def data_drives(name: str, directory: Path, count: int = 1, size: int = DISK_SIZE) -> list[Drive]:
    """Fresh ext4 disks vda, vdb, ... as the guest will see them: mounted at /mnt/vda, /mnt/vdb."""
    drives = []
    for number in range(count):
        device = f"vd{chr(ord('a') + number)}"
        image = create_ext4(directory / f"{name}-{device}.qcow2", size)
        drives.append(Drive(device, image, serial=device))
    return drives


class LabVm:
    """One VM. As a context manager it starts the VM and takes it away again, whatever has become of it."""

    def __init__(self, name: str, directory: str | Path, definition: str | None = None, disks: int = 1) -> None:
        """``definition``: text of NAME.conf; without it an existing file is used, or one with fresh disks is made."""
        self.name = name
        self.directory = Path(directory).absolute()
        self.definition = self.directory / f"{name}.conf"
        if definition is None and not self.definition.exists():
            definition = definition_text(data_drives(name, self.directory, disks), guest_image())
        if definition is not None:
            self.definition.write_text(definition, encoding="utf-8")
        self._vm = vmctl.Vm(self.definition)
        self.socket, self.control_socket, self.agent_socket = self._vm.qmp, self._vm.control, self._vm.agent

    def __enter__(self) -> LabVm:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The pid of its QEMU, None when it does not run."""
        return self._vm.pid()

    def _vmctl(self, action: str, *arguments: str) -> None:
        argv = [sys.executable, vmctl.__file__, action, str(self.definition), *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LabError(f"vmctl {action} {self.name}: exit {done.returncode}: {done.stderr}{done.stdout}")

    def start(self, *more: str) -> None:
        """Power on; ``more`` are extra QEMU arguments. Returns before the guest has booted: see ``wait_agent``."""
        guard(self._vm.pidfile)  # -daemonize leaves our process tree, the reaper still finds it
        self._vmctl("start", *(["--", *more] if more else []))

    def stop(self, timeout: float = 20.0) -> None:
        """Power button, then quit after ``timeout`` seconds."""
        self._vmctl("stop", "--timeout", str(timeout))

    def kill(self) -> None:
        """SIGKILL: a power cut."""
        self._vmctl("kill")

    def close(self) -> None:
        """Gone for good."""
        kill_processes_with(str(self._vm.pidfile))
        release(self._vm.pidfile)

    def command(self, name: str, /, **arguments: Any) -> Any:
        """One QMP command over the second monitor, which is free again afterwards."""
        with Qmp(self.control_socket) as monitor:
            return monitor.command(name, **arguments)

    def wait_agent(self, timeout: float = 120.0) -> float:
        """Wait until the guest's agent answers; returns the seconds it took."""
        begin = time.monotonic()
        while True:
            if self.pid is None:
                raise LabError(f"{self.name} is not running: {self.console()[-2000:]}")
            try:
                with Agent(self.agent_socket, timeout=0.5):  # a sync sent too early is lost: ask again
                    return time.monotonic() - begin
            except (OSError, EOFError) as exc:
                if time.monotonic() - begin > timeout:
                    raise LabError(f"{self.name}: no agent in {timeout} s: {self.console()[-2000:]}") from exc

    def console(self) -> str:
        """What the guest has printed on its serial port."""
        return self._vm.console.read_text(errors="replace") if self._vm.console.exists() else ""

    def agent(self, command: str, /, **arguments: Any) -> Any:
        """One agent command, e.g. ``agent("guest-fsfreeze-freeze")``."""
        with Agent(self.agent_socket) as agent:
            return agent.command(command, **arguments)

    def exec(self, shell_line: str, stdin: bytes | None = None) -> str:
        """Run a line in the guest's busybox sh and return its output; LabError with stderr when it fails."""
        with Agent(self.agent_socket) as agent:
            code, out, err = agent.run(["/bin/sh", "-c", shell_line], stdin)
        if code != 0:
            raise LabError(f"{self.name}: {shell_line!r}: exit {code}: {err.decode(errors='replace')}")
        return out.decode(errors="replace")

    def write_file(self, path: str, content: bytes) -> None:
        """Write a file in the guest and sync it to the disk."""
        self.exec(f"cat >'{path}' && sync", stdin=content)

    def read_file(self, path: str) -> bytes:
        """A (small) file of the guest."""
        with Agent(self.agent_socket) as agent:
            code, out, err = agent.run(["/bin/cat", path])
        if code != 0:
            raise LabError(f"{self.name}: {path}: {err.decode(errors='replace')}")
        return out

    def sha256(self, path: str) -> str:
        """Checksum of a guest file, hexadecimal."""
        return self.exec(f"sha256sum '{path}'").split()[0]

    def thaw(self) -> None:
        """Make sure that nothing is left frozen; QmpError of an agent that never froze is not an error."""
        try:
            self.agent("guest-fsfreeze-thaw")
        except QmpError:
            if self.agent("guest-fsfreeze-status") != "thawed":
                raise
