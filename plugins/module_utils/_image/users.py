# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Who has a file open, as /proc tells: for error messages and reports, never for a decision (the locks decide).

Other users' processes are seen by root only, and processes of other hosts on shared storage never.
"""

from __future__ import annotations

import contextlib
import os
import typing as t
from dataclasses import dataclass

_PROC = "/proc"


@dataclass(frozen=True)
class Holder:
    """A process that has the file open; ``command`` is the kernel's name for it, 15 characters at most."""

    pid: int
    command: str


def holders(path: str) -> list[Holder]:
    """The processes other than this one that have the file ``path`` is (links followed) open now, by pid."""
    return holders_of([path]).get(path, [])


def holders_of(paths: t.Iterable[str]) -> dict[str, list[Holder]]:
    """The same of many files in one look; a file that nobody has open, or that is not there, is not in the answer."""
    wanted: dict[str, os.stat_result] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            wanted[path] = os.stat(path)
    try:
        pids = sorted(int(name) for name in os.listdir(_PROC) if name.isdigit()) if wanted else []
    except OSError:
        return {}
    found: dict[str, list[Holder]] = {}
    for pid in pids:
        for path in _opened(pid, wanted) if pid != os.getpid() else ():
            found.setdefault(path, []).append(Holder(pid, _command(pid)))
    return found


def _opened(pid: int, wanted: t.Mapping[str, os.stat_result]) -> set[str]:
    directory = f"{_PROC}/{pid}/fd"
    try:
        descriptors = os.listdir(directory)
    except OSError:
        return set()  # it has ended, or it is another user's
    inodes = {stat.st_ino for stat in wanted.values()}
    return {path for descriptor in descriptors for path in _files(pid, descriptor, wanted, inodes)}


def _files(
    pid: int, descriptor: str, wanted: t.Mapping[str, os.stat_result], inodes: t.Container[int]
) -> t.Iterator[str]:
    """Those of the wanted files that the descriptor is."""
    try:
        if not os.readlink(f"{_PROC}/{pid}/fd/{descriptor}").startswith("/"):
            return  # a socket, a pipe
        # The inode's number first: to stat a file on a dead network file system would hang.
        inode = _inode(f"{_PROC}/{pid}/fdinfo/{descriptor}")
        if inode is not None and inode not in inodes:
            return
        found = os.stat(f"{_PROC}/{pid}/fd/{descriptor}")
    except OSError:
        return
    for path, stat in wanted.items():
        if (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino):
            yield path


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
