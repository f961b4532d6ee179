# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""Start and stop VMs the way an administrator without libvirt does: a definition file and a small tool.

    vmctl.py start|stop|kill|status DEFINITION [--timeout SECONDS] [-- MORE QEMU ARGUMENTS]

The definition NAME.conf holds one QEMU option per line; the value is the rest of the line, without quoting. Empty
lines and lines that begin with # are comments. Next to it appear NAME.pid, the sockets NAME.qmp (for tools),
NAME.ctl.qmp (for vmctl) and NAME.qga (guest agent), the console in NAME.console and QEMU's words in NAME.log.

Exit codes: 0 done (stop and kill: also when it was not running), 1 QEMU refused, 2 wrong usage or definition,
3 status: not running, 4 start: running already. Any python3 will do; no installation.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.qmp import Qmp, QmpError

FAILED, BAD_DEFINITION, NOT_RUNNING, RUNNING = 1, 2, 3, 4


class DefinitionError(Exception):
    """The definition cannot be used; says where."""


def read_definition(path: Path) -> list[str]:
    """QEMU arguments of a definition file."""
    arguments: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        raise DefinitionError(f"{path}: {exc.strerror}") from exc
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if not text.startswith("-"):
            raise DefinitionError(f"{path}:{number}: an option begins with '-': {text}")
        arguments += text.split(maxsplit=1)
    return arguments


class Vm:
    """One VM by its definition file; the state is what the pid file and /proc say."""

    def __init__(self, definition: Path) -> None:
        self.definition = definition.parent.resolve() / definition.name
        self.name = definition.stem
        base = self.definition.parent
        self.pidfile, self.qmp, self.control, self.agent, self.console, self.log = (
            base / f"{self.name}.{suffix}" for suffix in ("pid", "qmp", "ctl.qmp", "qga", "console", "log")
        )

    def pid(self) -> int | None:
        """The pid when it runs. A recycled pid is told apart by its command line."""
        try:
            pid = int(self.pidfile.read_text(encoding="ascii"))
            cmdline = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if os.fsencode(self.pidfile) in cmdline else None

    def argv(self, more: list[str]) -> list[str]:
        """QEMU's command line: the definition plus what makes it a managed VM."""
        line = [os.environ.get("BLOCKOPS_QEMU") or "qemu-system-x86_64", "-name", self.name]
        line += read_definition(self.definition)
        for number, path in enumerate((self.qmp, self.control)):
            line += ["-chardev", f"socket,id=mon{number},path={path},server=on,wait=off"]
            line += ["-mon", f"chardev=mon{number},mode=control"]
        line += ["-chardev", f"socket,id=qga0,path={self.agent},server=on,wait=off", "-device", "virtio-serial-pci"]
        line += ["-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"]
        line += ["-serial", f"file:{self.console}", "-display", "none", "-nodefaults"]
        return [*line, "-daemonize", "-pidfile", str(self.pidfile), *more]

    def start(self, more: list[str]) -> int:
        """Returns when QEMU serves its sockets."""
        if self.pid() is not None:
            print(f"{self.name} is running already", file=sys.stderr)
            return RUNNING
        argv = self.argv(more)
        for path in (self.qmp, self.control, self.agent):
            path.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            start = log.tell()
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        if done.returncode != 0:
            words = self.log.read_bytes()[start:].decode(errors="replace").strip()
            print(f"{self.name} did not start: {words}", file=sys.stderr)
            return FAILED
        return 0

    def stop(self, timeout: float) -> int:
        """Power button; after ``timeout`` seconds ``quit``, which closes the images cleanly."""
        pid = self.pid()
        if pid is None:
            print(f"{self.name} is not running")
            return 0
        if self._tell("system_powerdown") and _gone(pid, timeout):
            return 0
        print(f"{self.name} did not power off within {timeout} s: quit")
        if self._tell("quit") and _gone(pid, 30.0):
            return 0
        print(f"{self.name} does not answer", file=sys.stderr)
        return FAILED

    def _tell(self, command: str) -> bool:
        try:
            with Qmp(self.control, timeout=5.0) as monitor:
                monitor.execute(command)
        except EOFError:  # gone while answering
            return True
        except (OSError, QmpError) as exc:
            print(f"{command}: {exc}", file=sys.stderr)
            return False
        return True

    def kill(self) -> int:
        """A power cut."""
        pid = self.pid()
        if pid is None:
            print(f"{self.name} is not running")
            return 0
        os.kill(pid, signal.SIGKILL)
        return 0 if _gone(pid, 10.0) else FAILED

    def status(self) -> int:
        """0 running, 3 not."""
        pid = self.pid()
        print(f"{self.name} is {'not running' if pid is None else f'running, pid {pid}'}")
        return NOT_RUNNING if pid is None else 0


def _gone(pid: int, timeout: float) -> bool:
    """Wait for a process that is not our child; a zombie counts as gone."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            if not Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def main(argv: list[str]) -> int:
    """The command line."""
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description="Start and stop a VM by its definition file.")
    parser.add_argument("action", choices=["start", "stop", "kill", "status"])
    parser.add_argument("definition", type=Path)
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for the guest to power off")
    options = parser.parse_args(own)
    vm = Vm(options.definition)
    actions = {
        "start": lambda: vm.start(more),
        "stop": lambda: vm.stop(options.timeout),
        "kill": vm.kill,
        "status": vm.status,
    }
    try:
        return actions[options.action]()
    except DefinitionError as exc:
        print(exc, file=sys.stderr)
        return BAD_DEFINITION


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
