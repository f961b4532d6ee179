# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Names of what we make inside QEMU, and how to recognise them again. Nothing without such a name is ever touched.

A bitmap is named after the backup it follows: ``bo-<repository id>-<backup id>``. An external snapshot taken since
then puts an overlay on top; the overlay's bitmap, made in the transaction of the snapshot, is called ``.1`` after
that, the next one's ``.2``: so it shows when an image in between was dropped, and its changes with it. When an image is
merged into another, its bitmaps go on there: a numbered one under its name, and the plain one, which says which image
was backed up, as ``@<16 digits of a hash of that image's file name>``.

Nodes, jobs and short-lived bitmaps of one run are ``bo-<repository id>-<last 8 digits of the backup id>-<drive
number>-<role>``, at most 31 bytes, which is QEMU's limit for node names. The repository id keeps two repositories of
one VM out of each other's way.

Overlays of snapshots stay for long and have names of their own: ``bos-<8 digits of a hash of snapshot and drive>-<n>``;
jobs and short-lived nodes that work on them end with a role instead of the number.
"""

from __future__ import annotations

import hashlib
import re
import typing as t
from dataclasses import dataclass

_BITMAP = re.compile(r"bo-([0-9a-f]{8})-(\d{8}T\d{6}Z-[0-9a-f]{8})(?:\.([1-9]\d{0,3})|@([0-9a-f]{16}))?")
_OBJECT = re.compile(r"bo-([0-9a-f]{8})-([0-9a-f]{8})-(\d{1,2})-([a-z]{1,7})")
_SNAPSHOT = re.compile(r"bos-[0-9a-f]{8}-(\d+|[a-z]{1,7})")

# At most this many drives of one VM fit into the two digits.
MAX_DRIVES = 100


@dataclass(frozen=True)
class BitmapName:
    """Which backup of which repository a tracking bitmap follows, and how many images above the one backed up then.

    ``origin``: which image that was (``origin_of`` its file), when the bitmap is now in another one.
    """

    repository: str
    backup: str
    layer: int = 0
    origin: str | None = None


@dataclass(frozen=True)
class ObjectName:
    """Which run made a node, a job or a temporary bitmap. ``run`` is the last eight digits of its backup id."""

    repository: str
    run: str
    drive: int
    role: str


def bitmap_name(repository: str, backup: str, layer: int = 0, origin: str | None = None) -> str:
    return f"bo-{repository}-{backup}" + (f".{layer}" if layer else f"@{origin}" if origin else "")


def parse_bitmap(name: str) -> BitmapName | None:
    match = _BITMAP.fullmatch(name)
    return BitmapName(match[1], match[2], int(match[3] or 0), match[4]) if match else None


def origin_of(file: str) -> str:
    """What a bitmap says of the image it came from: two drives whose images were exchanged must show."""
    return hashlib.sha256(file.encode()).hexdigest()[:16]


def moved_bitmap(name: str, file: str) -> str:
    """What a tracking bitmap of the image ``file`` is called once it is in another image."""
    ours = parse_bitmap(name)
    if ours is None or ours.layer or ours.origin:
        return name
    return bitmap_name(ours.repository, ours.backup, origin=origin_of(file))


def object_name(repository: str, backup: str, drive: int, role: str) -> str:
    return f"bo-{repository}-{run_of(backup)}-{drive}-{role}"


def parse_object(name: str) -> ObjectName | None:
    match = _OBJECT.fullmatch(name)
    return ObjectName(match[1], match[2], int(match[3]), match[4]) if match else None


def run_of(backup: str) -> str:
    """The part of a backup id that names its run inside QEMU."""
    return backup[-8:]


def is_ours(name: str) -> bool:
    """Whether a name has the shape of ours, whatever the repository."""
    return parse_bitmap(name) is not None or parse_object(name) is not None or of_snapshot(name)


def snapshot_object(snapshot: str, drive: str, role: str) -> str:
    """Name of a job or short-lived node that works on one snapshot of one drive; a next run finds it again by that."""
    digest = hashlib.sha256(f"{snapshot}\0{drive}".encode()).hexdigest()
    return f"bos-{digest[:8]}-{role}"


def overlay_node(snapshot: str, drive: str, taken: t.Container[str]) -> str:
    """A free node name for an overlay; after a revert the old one and the new are there at the same time."""
    number = 1
    while snapshot_object(snapshot, drive, str(number)) in taken:
        number += 1
    return snapshot_object(snapshot, drive, str(number))


def of_snapshot(name: str) -> bool:
    """Whether a node or job was made by work on snapshots."""
    return _SNAPSHOT.fullmatch(name) is not None
