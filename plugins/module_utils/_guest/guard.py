# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The second place that thaws: a small process that outlives the module and thaws what the module left frozen.

A module that is killed with SIGKILL between freeze and thaw can do nothing any more; its guard sees the pipe close
and thaws. It is forked before the event loop starts and uses nothing but sockets, so that it depends on no state of
the module. Messages on the pipe are lines: ``F <seconds> <socket>`` (frozen; thaw by yourself after so many seconds)
and ``T <socket>`` (thawed).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
import typing as t

# A guest whose agent hangs is tried again for so long after the module has gone.
_GIVE_UP = 120.0
_TRY = 5.0
_THAW = b'\xff{"execute":"guest-fsfreeze-thaw"}\n'


class ThawGuard:
    """The module's end of the pipe. ``started()`` forks the guard; ``stop()`` lets it end."""

    def __init__(self, pipe: int, pid: int) -> None:
        self._pipe = pipe
        self._pid = pid

    @classmethod
    def started(cls) -> ThawGuard:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            _run_child(reading)
        os.close(reading)
        return cls(writing, pid)

    def frozen(self, path: str, seconds: float) -> None:
        """Register *before* the freeze is asked for: a freeze whose answer is lost counts as one."""
        self._say(f"F {seconds:.3f} {path}\n")

    def thawed(self, path: str) -> None:
        self._say(f"T {path}\n")

    def _say(self, line: str) -> None:
        """A guard that was killed itself (out of memory) cannot guard; the thaw at the end of the window remains."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, line.encode())

    def stop(self) -> None:
        """Close the pipe and wait for the guard unless it still has a guest to thaw."""
        os.close(self._pipe)
        os.waitpid(self._pid, os.WNOHANG)


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
        _guard(pipe)
        status = 0
    finally:
        os._exit(status)


def _guard(pipe: int) -> None:
    frozen: dict[str, float] = {}
    buffer = b""
    while True:
        wait = min((due - time.monotonic() for due in frozen.values()), default=None)
        readable, _write, _error = select.select([pipe], [], [], None if wait is None else max(0.0, wait))
        if readable:
            data = os.read(pipe, 65536)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                _note(line.decode(), frozen)
        for path in [path for path, due in frozen.items() if due <= time.monotonic()]:
            frozen[path] = time.monotonic() + 1.0
            _thaw(path, 1.0)
    _thaw_all(frozen)


def _note(line: str, frozen: dict[str, float]) -> None:
    word, _space, rest = line.partition(" ")
    if word == "T":
        frozen.pop(rest, None)
    else:
        seconds, _space, path = rest.partition(" ")
        frozen[path] = time.monotonic() + float(seconds)


def _thaw_all(frozen: t.Iterable[str]) -> None:
    end = time.monotonic() + _GIVE_UP
    left = list(frozen)
    while left and time.monotonic() < end:
        left = [path for path in left if not _thaw(path, _TRY)]
        if left:
            time.sleep(1.0)


def _thaw(path: str, timeout: float) -> bool:
    """Send a thaw and say whether the agent answered it. A thaw of what is not frozen does nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(path)
            sock.sendall(_THAW)
            received = b""
            while b'"return"' not in received:
                data = sock.recv(4096)
                if not data:
                    return False
                received += data
        except FileNotFoundError:
            return True  # the VM has gone, and its freeze with it
        except OSError:
            return False
    return True
