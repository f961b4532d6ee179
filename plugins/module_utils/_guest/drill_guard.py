# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The second place that ends a drill: a small process that outlives the module and ends what the module left running.

A module that is killed cannot end its QEMU any more; its guard sees the pipe close and does. Messages on the pipe are
lines: ``+DIRECTORY`` (a drill begins in there) and ``-DIRECTORY`` (it has been ended).
"""

from __future__ import annotations

import contextlib
import os
import signal
import typing as t

from .room import end_room


class DrillGuard:
    """The module's end of the pipe. ``started()`` forks the guard: do that before there are threads."""

    def __init__(self, pipe: int, pid: int) -> None:
        self._pipe = pipe
        self._pid = pid

    @classmethod
    def started(cls) -> DrillGuard:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            _run_child(reading)
        os.close(reading)
        return cls(writing, pid)

    def begins(self, directory: str) -> None:
        """Say so before the first process is started in there."""
        self._say(f"+{directory}\n")

    def ended(self, directory: str) -> None:
        self._say(f"-{directory}\n")

    def _say(self, line: str) -> None:
        """A guard that was killed itself cannot guard; the next run remains."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, line.encode())

    def stop(self) -> None:
        """Close the pipe and wait: when nothing is left to end, that takes a moment."""
        os.close(self._pipe)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _run_child(pipe: int) -> t.NoReturn:
    """The guard process. Leaves the session and the standard streams of the module: Ansible waits for those."""
    status = 1
    try:
        os.setsid()
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        for directory in _registered(pipe):
            end_room(directory)
        status = 0
    finally:
        os._exit(status)


def _registered(pipe: int) -> list[str]:
    """Read until the module has gone; the drills it has not ended."""
    with os.fdopen(pipe, "r", encoding="utf-8", errors="surrogateescape") as lines:
        running: dict[str, None] = {}
        for line in lines:
            word, directory = line[:1], line[1:].rstrip("\n")
            if word == "+":
                running[directory] = None
            else:
                running.pop(directory, None)
    return list(running)
