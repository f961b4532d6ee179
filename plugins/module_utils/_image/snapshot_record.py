# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The record beside an overlay: which snapshot it follows, and that this collection made it.

``OVERLAY.snapshot.json`` is written before the overlay itself, so that nothing of a killed run is without an owner.
State lives with the images: a snapshot is found again after a restart of QEMU, from another controller, and by the
tools for images that nobody has open. Only a file with such a record is ever deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import typing as t
from dataclasses import dataclass

from .._errors import FileFailed

SUFFIX = ".snapshot.json"
_FORMAT = 1
_LIMIT = 1 << 16

PREPARING, PRESENT, MERGING, STREAMING, MERGED = "preparing", "present", "merging", "streaming", "merged"
REVERTING, DISCARDED = "reverting", "discarded"
_STATES = (PREPARING, PRESENT, MERGING, STREAMING, MERGED, REVERTING, DISCARDED)


@dataclass(frozen=True)
class SnapshotRecord:
    """One overlay's record. Snapshot ``name`` of ``drive`` is ``image``, the image below ``overlay`` (absolute paths).

    ``state``: ``preparing`` (made, and not yet known to be in use), ``present``; ``merging`` (its commit into ``image``
    was begun, so the snapshot is no longer what it was), ``streaming`` (``image`` is being copied into it), ``merged``
    (nothing needs the overlay any more); ``reverting`` (made to take the place of ``discards``, a branch to be
    discarded; ``running``: the guest ran before), ``discarded`` (of such a branch, kept aside).
    ``job``: the one that commits it, if QEMU does. ``stays``: when nothing needs the overlay
    any more, its file is left to the user.
    ``definition``: the files that were, or were to be, rewritten for this overlay, should it have to go again.
    ``created`` is UTC, ISO 8601. ``consistency`` as for backups: crash or filesystem.
    """

    name: str
    drive: str
    overlay: str
    image: str
    image_format: str
    created: str
    state: str
    vm: str | None = None
    uuid: str | None = None
    consistency: str = "crash"
    running: bool = False
    discards: tuple[str, ...] = ()
    job: str | None = None
    stays: bool = False
    definition: tuple[str, ...] = ()

    def in_state(self, state: str, **changes: t.Any) -> SnapshotRecord:
        return dataclasses.replace(self, state=state, **changes)


def record_path(overlay: str) -> str:
    return overlay + SUFFIX


def read_record(overlay: str) -> SnapshotRecord | None:
    """The record beside ``overlay``, or ``None`` when there is none, or it is not one of ours, or it is unreadable.

    A record that was moved along with its overlay is about that overlay still: its directory is the present one.
    """
    try:
        fd = os.open(record_path(overlay), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as stream:
            raw = json.loads(stream.read(_LIMIT))
    except (OSError, ValueError, RecursionError):
        return None
    return _parse(raw, overlay)


def _parse(raw: t.Any, overlay: str) -> SnapshotRecord | None:
    if not isinstance(raw, dict) or raw.get("format") != _FORMAT or raw.get("state") not in _STATES:
        return None
    texts = ("name", "drive", "overlay", "image", "image_format", "created", "state", "consistency")
    if not all(isinstance(raw.get(key), str) for key in texts):
        return None
    if os.path.basename(raw["overlay"]) != os.path.basename(overlay):
        return None
    known = {key: raw[key] for key in (*texts, "vm", "uuid", "job") if raw.get(key) is not None}
    for key in ("discards", "definition"):
        paths = raw.get(key, [])
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            return None
        known[key] = tuple(paths)
    flags = {key: bool(raw.get(key)) for key in ("running", "stays")}
    return SnapshotRecord(**{**known, **flags, "overlay": overlay})


def claim_record(record: SnapshotRecord) -> bool:
    """Write the first record of an overlay. False when somebody else has claimed the name, be it at this moment.

    Two VMs may have their images in one directory, and drives of one name. An empty file was left by a run that was
    killed before it could write, unless that run still holds its lock.

    :raise FileFailed: the directory cannot be written, or is full.
    """
    path = record_path(record.overlay)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        with os.fdopen(fd, "r+", encoding="utf-8") as stream:
            if not _lock(fd) or os.fstat(fd).st_size or not os.fstat(fd).st_nlink:
                return False
            stream.write(_text(record))
            stream.flush()
            os.fsync(fd)
    except OSError as exc:
        _forget_empty(path)
        raise FileFailed(path=path, doing="writing the record of a snapshot", reason=exc.strerror or str(exc)) from exc
    return True


def is_free(overlay: str) -> bool:
    """Whether neither the overlay nor a record of it is there."""
    try:
        claimed = os.lstat(record_path(overlay)).st_size > 0
    except OSError:
        claimed = False
    return not claimed and not os.path.lexists(overlay)


def write_record(record: SnapshotRecord) -> None:
    """Write it beside its overlay, atomically and durably.

    :raise FileFailed: the directory cannot be written, or is full.
    """
    path = record_path(record.overlay)
    temporary = f"{path}.new"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        with os.fdopen(fd, "w", encoding="utf-8") as stream:
            stream.write(_text(record))
            stream.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except OSError as exc:
        _forget(temporary)
        raise FileFailed(path=path, doing="writing the record of a snapshot", reason=exc.strerror or str(exc)) from exc


def remove_record(overlay: str) -> None:
    """Remove the record beside ``overlay``; one that is not there is removed already."""
    _forget(f"{record_path(overlay)}.new")
    _forget(record_path(overlay))


def records_in(directory: str) -> list[SnapshotRecord]:
    """All records in a directory, by overlay, whether or not the overlay exists."""
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    found = (read_record(os.path.join(directory, name[: -len(SUFFIX)])) for name in names if name.endswith(SUFFIX))
    return sorted((record for record in found if record is not None), key=lambda record: record.overlay)


def _text(record: SnapshotRecord) -> str:
    return json.dumps({"format": _FORMAT, **dataclasses.asdict(record)}, indent=1, sort_keys=True) + "\n"


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _forget_empty(path: str) -> None:
    """A claim that came to nothing (the file system is full)."""
    with contextlib.suppress(OSError):
        if os.lstat(path).st_size == 0:
            os.unlink(path)


def _forget(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise FileFailed(path=path, doing="removing the record of a snapshot", reason=exc.strerror or str(exc)) from exc
