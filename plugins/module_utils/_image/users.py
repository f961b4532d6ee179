# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Who has a file open, as /proc tells: for error messages and reports, never for a decision (the locks decide).

Other users' processes are seen by root only, and processes of other hosts on shared storage never.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_PROC = "/proc"


@dataclass(frozen=True)
class Holder:
    """A process that has the file open; ``command`` is the kernel's name for it, 15 characters at most."""

    pid: int
    command: str


def holders(path: str) -> list[Holder]:
    """The processes other than this one that have the file ``path`` is (links followed) open now, by pid."""
    try:
        wanted = os.stat(path)
        pids = sorted(int(name) for name in os.listdir(_PROC) if name.isdigit())
    except OSError:
        return []
    return [Holder(pid, _command(pid)) for pid in pids if pid != os.getpid() and _has_open(pid, wanted)]


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    directory = f"{_PROC}/{pid}/fd"
    try:
        descriptors = os.listdir(directory)
    except OSError:
        return False  # it has ended, or it is another user's
    return any(_is(pid, descriptor, wanted) for descriptor in descriptors)


def _is(pid: int, descriptor: str, wanted: os.stat_result) -> bool:
    try:
        if not os.readlink(f"{_PROC}/{pid}/fd/{descriptor}").startswith("/"):
            return False  # a socket, a pipe
        # The inode's number first: to stat a file on a dead network file system would hang.
        inode = _inode(f"{_PROC}/{pid}/fdinfo/{descriptor}")
        if inode not in (None, wanted.st_ino):
            return False
        found = os.stat(f"{_PROC}/{pid}/fd/{descriptor}")
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)


def _inode(path: str) -> int | None:
    """What fdinfo says; ``None`` before Linux 5.14, which does not say it."""
    with open(path, encoding="ascii", errors="replace") as stream:
        for line in stream:
            key, _colon, value = line.partition(":")
            if key == "ino":
                return int(value)
    return None


def _command(pid: int) -> str:
    try:
        with open(f"{_PROC}/{pid}/comm", encoding="utf-8", errors="replace") as stream:
            return stream.read().rstrip("\n")
    except OSError:
        return ""
