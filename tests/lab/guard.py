# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""The parent's end of the reaper, and the temporary directories that everything in the lab lives in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lab import reaper

_LOCK = threading.Lock()
_EVER: set[str] = set()
_REAPERS: dict[int, subprocess.Popen[str]] = {}


def _send(action: str, token: str, remove: bool) -> None:
    """Tell this process's reaper; the first call starts it. Keyed by pid because a forked child needs its own."""
    with _LOCK:
        process = _REAPERS.get(os.getpid())
        if process is None or process.poll() is not None:
            process = subprocess.Popen(
                [sys.executable, "-S", "-E", reaper.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # a terminal's Ctrl-C must not reach it
            )
            _REAPERS[os.getpid()] = process
        if process.stdin is None:  # pragma: no cover - PIPE above
            raise RuntimeError("the reaper has no stdin")
        process.stdin.write(json.dumps([action, token, remove]) + "\n")
        process.stdin.flush()


def guard(token: str | Path, *, remove: bool = False) -> None:
    """Promise that processes mentioning ``token`` (a unique path) do not outlive us; ``remove`` also its tree."""
    _EVER.add(str(token))
    _send("guard", str(token), remove)


def leftovers() -> list[int]:
    """Pids of processes that mention anything this process ever guarded; empty when all is tidy."""
    return sorted({pid for token in _EVER for pid in reaper.processes_with(token)})


def release(token: str | Path) -> None:
    """The token was cleaned up in the orderly way."""
    with suppress(BrokenPipeError):
        _send("release", str(token), False)


@contextmanager
def workspace(parent: str | Path | None = None) -> Iterator[Path]:
    """A temporary directory that takes its processes with it. Its name is short: AF_UNIX paths end at 108 bytes.

    ``parent`` chooses the file system (default: the system's temporary directory). Others may enter it (0755), because
    some tests run QEMU as another user.
    """
    directory = Path(tempfile.mkdtemp(prefix="bo-", dir=parent))
    guard(directory, remove=True)
    try:
        directory.chmod(0o755)
        yield directory
    finally:
        reaper.kill_processes_with(f"{directory}/")
        shutil.rmtree(directory, ignore_errors=True)
        release(directory)
