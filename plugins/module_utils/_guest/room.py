# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The private directory of one drill, and the end of whatever runs in it.

Every process of a drill has the directory in its environment, and hands it down. So it is found again however it was
started, by this process, by the guard, or by the next run; and nothing else can be taken for it. The flock on ``lock``
is the module's alone and tells a living drill from a leftover.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
import time
from dataclasses import dataclass

VARIABLE = "BLOCKOPS_DRILL_DIRECTORY"
_NAME = re.compile(r"\.blockops-drill-[0-9a-f]{8}")
_LOCK = "lock"
# A process between fork and exec is not seen yet; so it has to be quiet for some looks in a row.
_QUIET, _PAUSE, _GIVE_UP = 3, 0.03, 10.0


@dataclass(frozen=True)
class Room:
    """A claimed directory (mode 0700). ``lock`` is an open descriptor that no child inherits."""

    directory: str
    lock: int

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def environment(self) -> dict[str, str]:
        """What every process of the drill must have in its environment."""
        return {VARIABLE: self.directory}

    def end(self) -> bool:
        """End all processes of the drill, remove the directory. Whether that was possible; the next run tries again."""
        gone = end_room(self.directory)
        with contextlib.suppress(OSError):
            os.close(self.lock)
        return gone


def new_room(work_directory: str) -> Room:
    """:raise OSError: it cannot be made there."""
    directory = os.path.join(work_directory, f".blockops-drill-{secrets.token_hex(4)}")
    os.mkdir(directory, 0o700)
    lock = os.open(os.path.join(directory, _LOCK), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return Room(directory, lock)


def leftovers(work_directory: str) -> list[str]:
    """The directories of drills whose module has gone."""
    try:
        names = sorted(name for name in os.listdir(work_directory) if _NAME.fullmatch(name))
    except OSError:
        return []
    return [path for path in (os.path.join(work_directory, name) for name in names) if _is_dead(path)]


def remove_leftovers(work_directory: str) -> list[str]:
    """End and remove what killed runs left behind. What was removed."""
    return [directory for directory in leftovers(work_directory) if end_room(directory)]


def _is_dead(directory: str) -> bool:
    """Ours (in a directory that others may write to, a name proves nothing), and nobody holds its lock."""
    try:
        info = os.lstat(directory)
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            return False
        lock = os.open(os.path.join(directory, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return _is_old(directory)  # killed before the lock was made, or just about to make it
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(lock)


def _is_old(directory: str) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - os.lstat(directory).st_mtime > _GIVE_UP
    return False


def end_room(directory: str) -> bool:
    """SIGKILL to every process of the drill until there is none, then remove the directory. Idempotent.

    Nothing in there is of value, so nothing is asked to end politely.
    """
    token = os.fsencode(f"{VARIABLE}={directory}")
    deadline, quiet = time.monotonic() + _GIVE_UP, 0
    while quiet < _QUIET:
        found = _processes_with(token)
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        quiet = 0 if found else quiet + 1
        time.sleep(_PAUSE)
    shutil.rmtree(directory, ignore_errors=True)
    return not os.path.lexists(directory)


def _processes_with(token: bytes) -> list[int]:
    """By the environment they were started with. One that has ended has none, even before it is waited for."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as stream:
                if token in stream.read().split(b"\0"):
                    found.append(int(name))
    return found
