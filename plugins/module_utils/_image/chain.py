# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The chain of an image, walked by headers alone, before any tool opens one of its files.

QEMU opens whatever a header names: other people's files, devices, servers. Here a name is only followed when it is
the plain name of a regular file inside the allowed directories; anything else is a problem, and the walk ends there.
Names are resolved as QEMU does it: relative to the directory of the overlay's name, links not resolved.
"""

from __future__ import annotations

import os
import stat
import typing as t
from dataclasses import dataclass

from .._errors import ImageInvalid
from .header import Header, read_header
from .snapshot_record import SnapshotRecord, read_record

FORMATS = ("qcow2", "raw")
_MAGIC = b"QFI\xfb"


@dataclass(frozen=True)
class Rules:
    """``directories``: where files may lie, absolute; sizes in bytes."""

    directories: tuple[str, ...]
    max_depth: int = 200
    max_virtual_size: int = 64 << 40


@dataclass(frozen=True)
class Problem:
    """Why the image ``path`` must not be opened. ``kind`` is a stable word."""

    path: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Link:
    """One image: ``path`` as QEMU would spell it, ``real`` with links resolved; ``header`` of a qcow2 image only."""

    path: str
    real: str
    format: str
    header: Header | None
    size: int
    allocated: int

    @property
    def virtual_size(self) -> int:
        return self.header.virtual_size if self.header is not None else self.size

    @property
    def backing(self) -> str | None:
        """The backing file's path, once :func:`walk` has found no fault with its name."""
        name = self.header.backing_file if self.header is not None else None
        return None if name is None else os.path.join(os.path.dirname(self.path), name)


@dataclass(frozen=True)
class Chain:
    """The images from the active one downwards, as far as they may be followed, and why not further."""

    links: tuple[Link, ...]
    problems: tuple[Problem, ...] = ()


def rules_for(path: str, directories: t.Sequence[str] = (), **limits: int) -> Rules:
    """Without ``directories`` only the image's own is allowed."""
    return Rules(tuple(directories) or (os.path.dirname(os.path.abspath(path)),), **limits)


def walk(path: str, fmt: str | None, rules: Rules) -> Chain:
    """The chain of ``path``. Without ``fmt`` a file that begins as a qcow2 image does is taken for one.

    So is a backing file whose format its overlay does not name: QEMU would do the same.
    """
    links: list[Link] = []
    following: str | None = os.path.join(os.getcwd(), path)
    while following is not None:
        found = _problem_of_file(following, rules) or _look(following, fmt)
        if isinstance(found, Problem):
            return Chain(tuple(links), (found,))
        links.append(found)
        problem = _problem_of_content(found, rules) or _problem_of_place(links, rules)
        if problem is not None:
            return Chain(tuple(links), (problem,))
        following, fmt = found.backing, found.header.backing_format if found.header is not None else None
    return Chain(tuple(links))


def snapshot_records(links: t.Sequence[Link]) -> list[SnapshotRecord | None]:
    """For each image the record beside it, if it tells the truth: the image below is the one it names.

    It is so too after all were moved to another directory together. After a commit, a stream or a rebase it is not.
    """
    records = [_record(overlay, below) for overlay, below in zip(links, links[1:])]
    return [*records, *([None] if links else [])]


def _record(overlay: Link, below: Link) -> SnapshotRecord | None:
    record = read_record(overlay.real)
    if record is None:
        return None
    moved = os.path.join(os.path.dirname(overlay.real), os.path.basename(record.image))
    return record if below.real in (os.path.realpath(record.image), os.path.realpath(moved)) else None


def _problem_of_file(path: str, rules: Rules) -> Problem | None:
    """Regular, and inside; asked before the file is opened."""
    real = os.path.realpath(path)
    if not _inside(real, rules.directories):
        reason = f"it leads to {real}, outside of the allowed directories ({', '.join(rules.directories)})"
        return Problem(path, "Outside", reason)
    try:
        mode = os.stat(real).st_mode
    except OSError as exc:
        return Problem(path, "Unreadable", exc.strerror or str(exc))
    return None if stat.S_ISREG(mode) else Problem(path, "NotRegular", "it is not a regular file")


def _look(path: str, fmt: str | None) -> Link | Problem:
    """Open the file, and read its header if it has one."""
    real = os.path.realpath(path)
    try:
        with open(real, "rb", opener=_open) as stream:
            magic, status = stream.read(len(_MAGIC)), os.fstat(stream.fileno())
    except OSError as exc:
        return Problem(path, "Unreadable", exc.strerror or str(exc))
    if fmt is None and magic != _MAGIC:
        return Problem(path, "FormatUnknown", "nobody says its format, and it is not qcow2; formats are never guessed")
    if fmt is not None and fmt not in FORMATS:
        return Problem(path, "FormatRefused", f"its format is given as {fmt!r}; only qcow2 and raw are opened")
    header = None
    if fmt != "raw":
        try:
            header = read_header(real)
        except ImageInvalid as exc:
            return Problem(path, "HeaderInvalid", str(exc.data["reason"]))
    return Link(path, real, fmt or "qcow2", header, status.st_size, status.st_blocks * 512)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _problem_of_content(link: Link, rules: Rules) -> Problem | None:
    """What a header says that must not be believed."""
    if link.virtual_size > rules.max_virtual_size:
        reason = f"its virtual size is {link.virtual_size} bytes, more than the {rules.max_virtual_size} allowed"
        return Problem(link.path, "TooLarge", reason)
    header = link.header
    if header is None:
        return None
    if header.data_file:
        return _problem_of_data_file(link, header.data_file_name, rules)
    name = header.backing_file
    if name is not None and ("\0" in name or has_protocol(name)):
        reason = f"its backing file {printable(name)!r} is not the plain name of a file"
        return Problem(link.path, "BackingNotFile", reason)
    return None


def _problem_of_data_file(link: Link, name: str | None, rules: Rules) -> Problem | None:
    if name is None or "\0" in name or has_protocol(name):
        return Problem(link.path, "DataFile", "its data is in an external file that it does not name plainly")
    problem = _problem_of_file(os.path.join(os.path.dirname(link.path), name), rules)
    if problem is None:
        return None
    return Problem(link.path, "DataFile", f"its data is in the external file {printable(name)!r}: {problem.reason}")


def _problem_of_place(links: t.Sequence[Link], rules: Rules) -> Problem | None:
    last = links[-1]
    if any(last.real == earlier.real for earlier in links[:-1]):
        return Problem(last.path, "Loop", "it is its own backing file, directly or through others")
    if len(links) > rules.max_depth:
        return Problem(last.path, "TooDeep", f"the chain has more than {rules.max_depth} images")
    return None


def has_protocol(name: str) -> bool:
    """Whether QEMU would take a part of the name for a protocol (``json:``, ``nbd:``, ``file:``, or any other)."""
    return ":" in name.split("/", 1)[0]


def printable(name: str) -> str:
    """A name from a file, with what is no text replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _inside(real: str, directories: t.Sequence[str]) -> bool:
    return any(os.path.commonpath([real, root]) == root for root in map(os.path.realpath, directories))
