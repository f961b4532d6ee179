# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What both kinds of snapshots of an image that nobody has open share: the request, the errors, who is in the way."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .._errors import BlockOpsError, ImageInUse
from .._image import qemu_img
from .._image.users import Holder, holders
from .snapshot_errors import SnapshotAmbiguous, SnapshotMissing

PRESENT, ABSENT, APPLIED = "present", "absent", "applied"
KEEP, DELETE = "keep", "delete"


class SnapshotUnsupported(BlockOpsError):
    template = "{image} cannot be used for this: {reason}."
    advice = "Nothing was changed."


class ImageHasDependents(BlockOpsError):
    template = "{image} was not {doing}, because other images are based on it: {dependents}."
    advice = "Nothing was changed. They would be destroyed by it; remove or rebase them first."


@dataclass(frozen=True)
class SnapshotRequest:
    """``directories`` empty: the image's own. ``discarded`` and ``remove_bitmaps`` matter when applying only."""

    path: str
    name: str
    state: str
    type: str
    discarded: str = KEEP
    remove_bitmaps: str = "ours"
    directories: tuple[str, ...] = ()
    check_mode: bool = False


def missing(image: str, request: SnapshotRequest, known: str) -> SnapshotMissing:
    about = {"of": f"The image {image}", "image": image, "type": request.type, "snapshot": request.name}
    return SnapshotMissing(where="", known=known, **about)


def ambiguous(image: str, request: SnapshotRequest, ids: str, way_out: str) -> SnapshotAmbiguous:
    about = {"of": f"The image {image}", "image": image, "snapshot": request.name}
    return SnapshotAmbiguous(ids=ids, way_out=way_out, **about)


def refuse_in_use(path: str) -> None:
    """The locks decide, and a QEMU that was told not to lock is seen in /proc.

    :raise ImageInUse: it names the processes, as far as this user may see them.
    """
    found = holders(path)
    if qemu_img.in_use(path) or any(holder.command.startswith("qemu") for holder in found):
        raise in_use(path, found)


def in_use(path: str, found: list[Holder]) -> ImageInUse:
    who = ", ".join(f"process {holder.pid} ({holder.command})" for holder in found)
    said = f"{who} has it" if who else "somebody holds a lock on it, and this user may not see who"
    return ImageInUse(image=path, said=said, holders=[asdict(holder) for holder in found])
