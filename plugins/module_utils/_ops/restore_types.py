# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What a restore is asked for, what it found, and what it will do: data only."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from .._image.qemu_img import Image
from .._repository.chain import Link
from .._repository.manifest import DefinitionRecord, DriveRecord, Manifest
from .._repository.place import Owner


@dataclass(frozen=True)
class DriveRequest:
    """A drive and the file it shall become. ``base`` is what lies below an image that does not stand alone."""

    name: str
    dest: str
    format: str
    base: Image | None = None


@dataclass(frozen=True)
class Request:
    """``drives`` empty: all of the point, into the directory ``dest``. ``definition``: none, directory or original."""

    repository: str
    vm: str
    point: str = "latest"
    drives: tuple[DriveRequest, ...] = ()
    dest: str | None = None
    format: str = "qcow2"
    instant: bool = False
    verify: bool = True
    preallocation: str = "off"
    owner: Owner = Owner()
    definition: str = "none"
    definition_dest: str | None = None
    overwrite_definition: bool = False


@dataclass(frozen=True)
class DriveStep:
    """One drive: its chain (point first), and whether ``dest`` is there already with the right content."""

    request: DriveRequest
    record: DriveRecord
    links: tuple[Link, ...]
    files: tuple[str, ...]
    instant: bool
    present: bool
    needed: int = 0

    @property
    def source(self) -> Image:
        """The image to read: the point's, on what its header names (or on the given base)."""
        return Image(self.files[0], "qcow2", self.request.base)


@dataclass(frozen=True)
class DefinitionStep:
    """One saved file. ``state`` of ``dest``: absent, same or differs (to be replaced, keeping the present one)."""

    record: DefinitionRecord
    source: str
    dest: str
    state: str


@dataclass(frozen=True)
class Plan:
    """What a restore does. ``verified``: every file of every needed chain had the checksum its manifest records."""

    manifest: Manifest
    drives: tuple[DriveStep, ...]
    definition: tuple[DefinitionStep, ...]
    verified: bool
    warnings: tuple[str, ...]

    @property
    def changes(self) -> bool:
        return any(not step.present for step in self.drives) or any(step.state != "same" for step in self.definition)

    def view(self, *, after: bool) -> dict[str, t.Any]:
        """The files before or after, for diff mode."""
        files: dict[str, t.Any] = {}
        for drive in self.drives:
            files[drive.request.dest] = self._described(drive) if after or drive.present else "absent"
        for saved in self.definition:
            files[saved.dest] = f"sha256:{saved.record.sha256}" if after or saved.state == "same" else saved.state
        return files

    def _described(self, step: DriveStep) -> str:
        kind = "overlay on" if step.instant else "copy of"
        return f"{step.request.format} {kind} drive {step.record.name} as of {self.manifest.id}"
