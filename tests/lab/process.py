# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""What a QEMU and a storage daemon have in common: a process with two QMP sockets that never outlives the test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.guard import guard, release
from lab.qmp import Qmp, QmpError

_EXEC = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"


def interruptible(argv: Sequence[str]) -> list[str]:
    """The command, but heeding SIGINT: a run in the background (``make test &``) hands down that it is ignored."""
    return [sys.executable, "-c", _EXEC, *argv]


class LabError(Exception):
    """The lab itself failed: a QEMU that did not start, a write that was not written."""


class MonitoredProcess:
    """A QMP speaking process. ``socket`` is left free for the module under test, ``control`` serves the test itself.

    A QMP socket answers one client at a time, hence two of them. Files are named after ``name`` in ``directory``.
    """

    def __init__(self, name: str, directory: Path, *, user: int | None = None, timeout: float = 30.0) -> None:
        self.name = name
        self.directory = Path(directory)
        self.user = user
        self.timeout = timeout
        self.run_directory = self.directory if user is None else self.directory / f"{name}.run"
        self.socket = self.run_directory / f"{name}.socket"
        self.control_socket = self.run_directory / f"{name}.control"
        self.log = self.directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Qmp | None = None

    def argv(self) -> list[str]:
        """The command line; the same for each start."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id; LabError when it was never started."""
        if self._process is None:
            raise LabError(f"{self.name} was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Is the process alive?"""
        return self._process is not None and self._process.poll() is None

    @property
    def control(self) -> Qmp:
        """The test's own QMP connection; made again after ``detach``."""
        if self._control is None:
            if not self.running:
                raise LabError(f"{self.name} is not running")
            self._control = self._connect()
        return self._control

    def detach(self) -> None:
        """Leave the control monitor, e.g. when it is the only one and the module under test wants it."""
        if self._control is not None:
            self._control.close()
            self._control = None

    def start(self) -> None:
        """Start and connect the control monitor; on failure the error holds what the process printed."""
        if self.running:
            raise LabError(f"{self.name} is running already")
        self._prepare_directory()
        for path in (self.socket, self.control_socket):
            path.unlink(missing_ok=True)
        guard(self.control_socket)
        with self.log.open("ab") as log:
            # no preexec_fn: it would forbid vfork, and tests start QEMUs from threads
            self._process = subprocess.Popen(
                self.argv(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory, **self._identity()
            )
        try:
            self._control = self._connect()
        except BaseException:
            self.close()
            raise

    def _identity(self) -> dict[str, Any]:
        return {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}

    def _prepare_directory(self) -> None:
        if self.user is not None:
            self.run_directory.mkdir(exist_ok=True)
            os.chown(self.run_directory, self.user, self.user)

    def _connect(self) -> Qmp:
        """Wait for the control socket, but not for a process that has exited already."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                connection = Qmp(self.control_socket, timeout=min(0.5, self.timeout))
                connection.timeout = self.timeout
                return connection
            except (OSError, EOFError) as exc:
                if not self.running:
                    raise LabError(f"{self.name} did not start: {self.output().strip()}") from exc
                if time.monotonic() > deadline:
                    raise LabError(f"{self.name}: no QMP within {self.timeout} s") from exc

    def output(self) -> str:
        """All that the process has printed so far (over all its lives)."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def command(self, name: str, /, **arguments: Any) -> Any:
        """Run a QMP command on the control monitor; ``node_name=`` is sent as ``node-name``."""
        return self.control.command(name, **arguments)

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a QMP command with its arguments verbatim."""
        return self.control.execute(command, arguments)

    def wait_event(self, name: str, timeout: float | None = None, **data: Any) -> dict[str, Any]:
        """The next event ``name`` with these data, e.g. ``wait_event("JOB_STATUS_CHANGE", id="j", status="null")``."""
        return self.control.wait_event(name, timeout, **data)

    def jobs(self) -> list[dict[str, Any]]:
        """query-jobs."""
        return list(self.command("query-jobs"))

    def nodes(self) -> dict[str, dict[str, Any]]:
        """query-named-block-nodes (flat) by node name."""
        return {str(node["node-name"]): node for node in self.command("query-named-block-nodes", flat=True)}

    def node_names(self) -> list[str]:
        """All node names, sorted."""
        return sorted(self.nodes())

    def quit(self) -> int:
        """Clean end: images are closed, persistent bitmaps stored. Returns the exit code."""
        if self._process is None:
            raise LabError(f"{self.name} was not started")
        try:
            self.execute("quit")
        except (EOFError, OSError, QmpError):
            if self.running:
                raise
        return self._ended()

    def kill9(self) -> None:
        """SIGKILL: nothing is flushed, persistent bitmaps become inconsistent."""
        if self._process is not None:
            self._process.kill()
            self._ended()

    def _ended(self) -> int:
        if self._process is None:
            raise LabError(f"{self.name} was not started")
        code = self._process.wait(self.timeout)
        self.detach()
        release(self.control_socket)
        return code

    def restart(self) -> None:
        """Start again with the same command line after quit or kill9; quits first when still running."""
        if self.running:
            self.quit()
        self.start()

    def close(self) -> None:
        """Make sure it is gone; clean when possible."""
        if self._process is None:
            return
        if self.running and self._control is not None:
            try:
                self.quit()
                return
            except (OSError, EOFError, QmpError, subprocess.TimeoutExpired):
                pass  # stuck or broken: SIGKILL below
        self.kill9()
