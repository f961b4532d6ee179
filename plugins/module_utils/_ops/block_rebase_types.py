# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Options, errors and data of qmp_block_rebase."""

from __future__ import annotations

import dataclasses
import os
import re
import typing as t
from dataclasses import dataclass

from .._block.graph import Drive, Layer
from .._errors import BlockOpsError, InputInvalid
from .._image.chain import Link
from .._image.extents import own, total
from .._image.snapshot_record import SnapshotRecord
from .img_rebase_build import Build
from .limits import wrong_limits
from .snapshot_options import SnapshotOptions

_TRIMMED = re.compile(r"(.*?)(?:\.trimmed(?:-[1-9]\d*)?)?", re.DOTALL)


class TrimUnsuited(BlockOpsError):
    template = "The image {image} of drive {drive} of VM {vm} cannot be trimmed: {reason}."
    advice = "Nothing was touched. {way_out}"


class TrimFailed(BlockOpsError):
    template = "Trimming {image} of drive {drive} of VM {vm} failed while {doing}: {reason}.{done}"
    advice = "{state} Mend the cause and run again."


@dataclass(frozen=True)
class TrimOptions:
    """One call. ``image``: a file, a node or a snapshot; ``None`` for all that give back ``min_gain`` bytes."""

    drives: tuple[str, ...] = ()
    exclude_drives: tuple[str, ...] = ()
    image: str | None = None
    min_gain: int = 1 << 20
    delete: bool = True
    timeout: float = 30.0
    check_mode: bool = False

    def checked(self) -> TrimOptions:
        """These options, or InputInvalid when they cannot be meant."""
        reason = f"min_gain must be at least 1 byte, not {self.min_gain}." if self.min_gain < 1 else None
        reason = reason or wrong_limits({"timeout": self.timeout})
        if reason is not None:
            raise InputInvalid(message=reason)
        return self

    def for_snapshots(self) -> SnapshotOptions:
        """What the parts that work on snapshots as well need to know."""
        return SnapshotOptions(
            name="rebase",
            state="absent",
            type="external",
            drives=self.drives,
            exclude_drives=self.exclude_drives,
            quiesce="off",
            timeout=self.timeout,
            check_mode=self.check_mode,
        )


@dataclass(frozen=True)
class Place:
    """Where an image is in a chain, and how what is above it can be given another backing image.

    ``holder``: the nearest node above that can be reopened, with ``options``, all of its own; ``rungs``: the nodes in
    between, topmost first, which QEMU opened by itself and lets nobody reopen; ``above``: the image right above.
    """

    drive: Drive
    index: int
    holder: Layer
    options: t.Mapping[str, t.Any]

    @property
    def layer(self) -> Layer:
        return self.drive.layers[self.index]

    @property
    def above(self) -> Layer:
        return self.drive.layers[self.index - 1]

    @property
    def below(self) -> Layer:
        return self.drive.layers[self.index + 1]

    @property
    def rungs(self) -> tuple[Layer, ...]:
        first = self.drive.layers.index(self.holder) + 1
        return self.drive.layers[first : self.index]


@dataclass(frozen=True)
class Trim:
    """An image to trim: ``new`` takes the place of ``layer``. ``links``: the image and those below."""

    drive: str
    layer: Layer
    record: SnapshotRecord
    links: tuple[Link, ...]
    build: Build
    new: str

    @property
    def gain(self) -> int:
        return gain_of(self.build)


@dataclass(frozen=True)
class Verdict:
    """On one image: what is to be done, or the ``reason`` why nothing is."""

    drive: str
    layer: Layer
    trim: Trim | None = None
    reason: str | None = None
    way_out: str = ""
    build: Build | None = None

    def to_result(self) -> dict[str, t.Any]:
        build = self.build
        return {
            "image": self.layer.file,
            "replaced_by": self.trim.new if self.trim is not None else None,
            "dropped_bytes": gain_of(build) if build is not None else None,
            "space_needed": build.needed if build is not None else None,
            "bitmaps": [bitmap.name for bitmap in build.bitmaps] if build is not None else [],
            "reason": self.reason,
        }


@dataclass
class Done:
    """What has happened so far, also when something fails after it."""

    trims: list[Trim] = dataclasses.field(default_factory=list)
    deleted: list[str] = dataclasses.field(default_factory=list)
    kept: list[str] = dataclasses.field(default_factory=list)
    freed: int = 0

    def sentence(self) -> str:
        return f" {len(self.trims)} images before it are trimmed." if self.trims else ""


def gain_of(build: Build) -> int:
    """Bytes of data that the image has and the trimmed one will not have."""
    return max(0, total(own(build.source.extents, zero=False)) - total(build.content.data))


def family(file: str) -> str:
    """What an image and its trimmed copies have in common."""
    stem, extension = os.path.splitext(file)
    match = _TRIMMED.fullmatch(stem)
    return (match[1] if match else stem) + extension


def name_for(file: str, free: t.Callable[[str], bool]) -> str:
    """A name for the copy: the image's own with ``.trimmed`` added, which an image that has it already loses again."""
    whole = family(file)
    stem, extension = os.path.splitext(whole)
    candidate, number = whole, 0
    while candidate == file or not free(candidate):
        number += 1
        candidate = f"{stem}.trimmed{'' if number == 1 else f'-{number}'}{extension}"
    return candidate
