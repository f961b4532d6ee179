# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Cold boot safety: what a VM would start from, beside what it runs on, and the files that have to say the latter.

After a change of the active image a plain restart would boot the old one: what was written since is not there, and
writing to it ruins the overlay above. A definition is rewritten *before* such a change: an overlay that is still empty
reads as the image below it, so nothing is wrong when the change then does not come.
"""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from .._block.graph import Drive, Layer
from .._block.startup import StartupImage, looks_like_qemu, parse_startup, started_with, startup_gaps
from .._errors import BlockOpsError
from .._image.definition import (
    DefinitionFile,
    keep_copy,
    read_definition,
    remove_copy,
    replace_definition,
    require_writable,
)
from .._qmp.session import Process
from .cold_boot_text import Move, Unsure, rewrite

_PROGRAMS = ("qemu-system", "qemu-kvm", "qemu-storage-daemon")

__all__ = [
    "DefinitionChange",
    "DefinitionUnsafe",
    "Drift",
    "Move",
    "Startup",
    "drifts",
    "moves_to",
    "origin",
    "plan_definitions",
    "read_startup",
    "undo_definition",
    "unmentioned",
    "write_definition",
]


class DefinitionUnsafe(BlockOpsError):
    template = "{file} cannot be rewritten for drive {drive}: {reason}."
    advice = (
        "Nothing was touched. Leave the file out of definition, and write {new} (format {new_format}) in place of "
        "{old} (format {old_format}) into it by hand before the VM is started again."
    )


@dataclass(frozen=True)
class Startup:
    """What the QEMU process ``pid`` was started with. ``gaps``: why that may not be all."""

    pid: int
    images: tuple[StartupImage, ...]
    gaps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drift:
    """``drive`` was started from ``old`` and runs on ``new``. A format is ``None`` where the command line has none."""

    drive: str
    old: str
    new: str
    old_format: str | None
    new_format: str

    def to_result(self) -> dict[str, str]:
        return {"drive": self.drive, "old": self.old, "new": self.new}

    @property
    def warning(self) -> str:
        return (
            f"Drive {self.drive} was started from {self.old} and runs on {self.new}: "
            "a cold start as before would boot the old image."
        )


@dataclass(frozen=True)
class DefinitionChange:
    """One listed file: ``path`` as listed, ``real`` where a link leads. ``drives``: those it says anything of.

    ``text`` is false for firmware variables and the like, which are never changed.
    """

    path: str
    real: str
    before: bytes
    after: bytes
    drives: frozenset[str]
    text: bool = True

    @property
    def changed(self) -> bool:
        return self.before != self.after

    @property
    def untouched(self) -> bool:
        """It names neither an old nor a new image of any drive: most likely it is not the right file."""
        return self.text and not self.drives

    def texts(self) -> tuple[str, str]:
        """Before and after, for a diff."""
        return self.before.decode(errors="replace"), self.after.decode(errors="replace")


def read_startup(process: Process) -> tuple[Startup | None, str | None]:
    """What the process was started with, or ``None`` and the reason why nobody can tell."""
    if process.pid <= 0:
        return None, "the kernel does not show the process behind the socket (it is in another PID namespace)"
    try:
        with open(f"/proc/{process.pid}/cmdline", "rb") as stream:
            argv = [os.fsdecode(part) for part in stream.read().split(b"\0")[:-1]]
    except OSError as exc:
        return None, f"the command line of process {process.pid} cannot be read: {exc.strerror or exc}"
    argv = _without_loader(argv)
    if not looks_like_qemu(argv):
        return None, f"process {process.pid}, which made the socket, is no QEMU with a command line"
    return Startup(process.pid, parse_startup(argv, _directory(process.pid)), startup_gaps(argv)), None


def drifts(startup: Startup, drives: t.Iterable[Drive]) -> tuple[Drift, ...]:
    """The drives whose active image is not the one they were started with.

    Not among them: drives without a medium or with a removable one, drives whose writes are not to be kept
    (snapshot=on), and drives that were not on the command line.
    """
    return tuple(drift for drift in (_drift(startup, drive) for drive in drives) if drift is not None)


def moves_to(drive: Drive, startup: Startup | None, new: str, new_format: str) -> tuple[Move, ...]:
    """The moves that make a start-up file name ``new`` for the drive, whichever of its images the file names now.

    That is the one it was started with, or the active one, if the file was rewritten since.
    """
    moves: dict[str, Move] = {}
    image = origin(startup, drive) if startup is not None else None
    if image is not None:
        was = image.format or _format_of(drive, image.file)
        moves[image.file] = Move(drive.name, (image.file, image.spelled), new, was, new_format, image.explicit_backing)
    if not drive.empty and drive.active.file not in moves:
        active = drive.active
        moves[active.file] = Move(drive.name, (active.file,), new, active.driver, new_format)
    return tuple(move for move in moves.values() if move.old[0] != new)


def plan_definitions(files: t.Iterable[str], moves: t.Sequence[Move]) -> tuple[DefinitionChange, ...]:
    """What has to change in the files. A file that is listed twice, or by two links, is one file.

    :raise DefinitionUnsafe: a path stands where it cannot be exchanged for sure.
    :raise DefinitionUnreadable: a file is not there.
    :raise TargetUnwritable: a file that has to change cannot.
    """
    changes: dict[str, DefinitionChange] = {}
    for path in files:
        file = read_definition(path)
        if file.real in changes:
            continue
        change = _change(file, moves) if file.text else DefinitionChange(path, file.real, b"", b"", frozenset(), False)
        if change.changed:
            require_writable(file.real)
        changes[file.real] = change
    return tuple(changes.values())


def _change(file: DefinitionFile, moves: t.Sequence[Move]) -> DefinitionChange:
    # Bytes that are no UTF-8 come out as they went in.
    text = file.content.decode("utf-8", "surrogateescape")
    try:
        after, drives = rewrite(text, moves)
    except Unsure as exc:
        raise _unsafe(file.path, exc) from exc
    return DefinitionChange(file.path, file.real, file.content, after.encode("utf-8", "surrogateescape"), drives)


def unmentioned(changes: t.Iterable[DefinitionChange], moves: t.Iterable[Move]) -> tuple[str, ...]:
    """The drives that none of the files says anything of: they still start from the old image."""
    known = frozenset().union(*(change.drives for change in changes))
    return tuple(dict.fromkeys(move.drive for move in moves if move.drive not in known))


def write_definition(change: DefinitionChange) -> str | None:
    """Make the change; the path of the copy of the file as it was, ``None`` when there was nothing to change.

    :raise DefinitionChanged: the file is not what it was when this was planned; it was not touched.
    """
    if not change.changed:
        return None
    kept = keep_copy(change.real, change.before)
    replace_definition(change.real, change.before, change.after)
    return kept


def undo_definition(change: DefinitionChange, kept: str | None) -> None:
    """Take the change back, and the copy with it. For when what the file was rewritten for did not happen.

    :raise DefinitionChanged: somebody else changed the file since; it was not touched.
    """
    if kept is None or not change.changed:
        return
    replace_definition(change.real, change.after, change.before)
    remove_copy(kept, change.before)


def _unsafe(path: str, exc: Unsure) -> DefinitionUnsafe:
    move = exc.move
    return DefinitionUnsafe(
        file=path,
        drive=move.drive,
        reason=exc.reason,
        old=move.old[0],
        new=move.new,
        old_format=move.old_format,
        new_format=move.new_format,
    )


def _drift(startup: Startup, drive: Drive) -> Drift | None:
    if drive.empty or drive.removable:
        return None
    image, active = origin(startup, drive), drive.active
    if image is None or image.temporary or not _is_path(image.file) or _same(image, active):
        return None
    return Drift(drive.name, image.file, active.file, image.format, active.driver)


def origin(startup: Startup, drive: Drive) -> StartupImage | None:
    """What the drive was started with; when no name tells, the topmost image of its chain that was given at all."""
    image = started_with(drive, startup.images)
    if image is not None:
        return image
    files = {image.file: image for image in reversed(startup.images)}
    return next((files[layer.file] for layer in drive.layers if layer.file in files), None)


def _same(image: StartupImage, active: Layer) -> bool:
    if active.file in (image.file, image.spelled):
        return True
    # Two names of one file (a link, a bind mount) are no drift.
    return _is_path(active.file) and os.path.realpath(image.file) == os.path.realpath(active.file)


def _is_path(file: str) -> bool:
    return file.startswith("/")


def _format_of(drive: Drive, file: str) -> str:
    found = next((layer.driver for layer in drive.layers if layer.file == file), None)
    return found or ("" if drive.empty else drive.active.driver)


def _without_loader(argv: list[str]) -> list[str]:
    """Without ``ld-linux.so --library-path ... qemu``, which may stand before the program."""
    if not argv or not os.path.basename(argv[0]).startswith(("ld-linux", "ld.so", "ld64")):
        return argv
    programs = (number for number, part in enumerate(argv) if os.path.basename(part).startswith(_PROGRAMS))
    return argv[next(programs, 0) :]


def _directory(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return None
