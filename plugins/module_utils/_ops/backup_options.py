# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Options of qmp_drive_backup as frozen data, checked for what cannot be meant together."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from .._errors import InputInvalid
from .._repository.names import has_control_characters
from .limits import wrong_limits

_LONGEST_TAG = 1024
_EXPERT = ("top", "none", "incremental", "bitmap")


@dataclass(frozen=True)
class Ownership:
    """Who may read what is written. ``None`` leaves the owner to the process; modes are octal integers."""

    uid: int | None = None
    gid: int | None = None
    directory_mode: int = 0o700
    file_mode: int = 0o400

    @property
    def directory(self) -> tuple[int, int | None, int | None]:
        """Mode and owner of a directory that is made."""
        return self.directory_mode, self.uid, self.gid


@dataclass(frozen=True)
class BackupOptions:
    """One call of qmp_drive_backup. Ages and time-outs in seconds, ``bandwidth`` in bytes per second for the host."""

    repository: str
    state: str = "present"
    level: str = "auto"
    sync: str | None = None
    bitmap: str | None = None
    bitmap_mode: str | None = None
    max_age: int | None = None
    drives: tuple[str, ...] = ()
    exclude_drives: tuple[str, ...] = ()
    definition: tuple[str, ...] = ()
    compress: bool = False
    bandwidth: int | None = None
    quiesce: str = "try"
    freeze_timeout: float = 10.0
    on_lost_bitmap: str = "full"
    verify: bool = True
    wait: bool = True
    timeout: float = 30.0
    job_timeout: float | None = None
    tags: tuple[str, ...] = ()
    ownership: Ownership = Ownership()
    check_mode: bool = False
    collection: str = ""

    @property
    def expert(self) -> bool:
        """Whether an expert's sync mode was asked for, which stands outside every chain."""
        return self.sync in _EXPERT

    def checked(self) -> BackupOptions:
        """These options, or InputInvalid when they contradict each other."""
        reason = _contradiction(self) or _out_of_range(self)
        if reason is not None:
            raise InputInvalid(message=reason)
        return self


def _contradiction(options: BackupOptions) -> str | None:
    if options.sync is not None and options.level not in ("auto", "copy"):
        return (
            f"sync={options.sync} makes a copy outside every chain, so it cannot be level={options.level}; omit level."
        )
    if options.sync in ("incremental", "bitmap") and options.bitmap is None:
        return f"sync={options.sync} needs bitmap, the name of a dirty bitmap of your own."
    if options.bitmap is not None and options.sync not in ("incremental", "bitmap"):
        return "bitmap is for sync=incremental and sync=bitmap only; the collection's own bitmaps need not be named."
    if options.bitmap_mode is not None and options.sync != "bitmap":
        return "bitmap_mode is for sync=bitmap only."
    if options.sync == "none" and options.wait and options.state == "present":
        return "sync=none never ends by itself: use wait=false now, and state=cancelled to end and publish it."
    return None


def _out_of_range(options: BackupOptions) -> str | None:
    for tag in options.tags:
        if not tag or len(tag) > _LONGEST_TAG or has_control_characters(tag):
            return f"tags: {tag!r} is empty, longer than {_LONGEST_TAG} characters, or has control characters."
    if options.ownership.file_mode & 0o222:
        return f"file_mode {options.ownership.file_mode:04o} allows writing, but backups are never changed; omit w."
    times = {"timeout": options.timeout, "freeze_timeout": options.freeze_timeout}
    return wrong_limits(times, options.job_timeout, options.bandwidth)


def merged(entry: t.Sequence[str], general: t.Sequence[str]) -> tuple[str, ...]:
    """What a VM says for itself goes before what the task says for all."""
    return tuple(entry) or tuple(general)
