# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Options of a backup, and the plan of one: what each drive gets, and why. Pure.

The rule: *a bitmap is named after the backup it follows*. A drive whose images carry a usable bitmap named after a
published, intact backup can continue from that backup; every other drive gets a full, with the reason.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from .._block.fitness import Fitness, Tracking
from .._block.graph import Bitmap, Drive, Layer
from .._block.names import bitmap_name, origin_of, parse_bitmap
from .._repository.manifest import DriveRecord

# Clusters and their tables: 8 bytes per 64 KiB in L2, 2 in refcounts, and the header, L1 and first tables.
_METADATA_SHARE = 4096
_METADATA_BASE = 1 << 20
_HEADROOM = 16 << 20


# What changed since a backup: the images from the active one down to the one backed up then, each with its bitmap.
_Changes = t.Sequence[tuple[Layer, Bitmap]]


@dataclass(frozen=True)
class Candidate:
    """A published backup that a drive might build on, newest first. ``defect`` says why it must not be trusted."""

    backup: str
    record: DriveRecord
    defect: str | None


@dataclass(frozen=True)
class DrivePlan:
    """What one drive gets. ``merge``: (node, bitmap) pairs whose union is what changed since ``parent``."""

    drive: Drive
    level: str
    sync: str
    reason: str | None = None
    parent: str | None = None
    parent_file: str | None = None
    merge: tuple[tuple[str, str], ...] = ()
    granularity: int = 65536
    track: bool = False
    persistent: bool = False
    bytes_bound: int = 0
    standalone: bool = True
    bitmap: str | None = None
    bitmap_mode: str | None = None
    lost: bool = False

    @property
    def reservation(self) -> int:
        """Bytes the target may need at most, tables included."""
        return self.bytes_bound + self.bytes_bound // _METADATA_SHARE + _METADATA_BASE

    @property
    def headroom(self) -> int:
        """Bytes that may come on top while the point in time is prepared, when there is room."""
        return min(self.bytes_bound // 16 + _HEADROOM, max(0, self.drive.active.virtual_size - self.bytes_bound))

    @property
    def flat(self) -> bool:
        """Whether the drive is one qcow2 image, in which what is not allocated reads as zeros."""
        return len(self.drive.layers) == 1 and self.drive.active.driver == "qcow2"

    def to_result(self) -> dict[str, t.Any]:
        return {
            "name": self.drive.name,
            "level": self.level,
            "sync": self.sync,
            "reason": self.reason,
            "parent": self.parent,
            "node": self.drive.active.node,
            "source": self.drive.active.file,
            "virtual_size": self.drive.active.virtual_size,
            "bytes_bound": self.bytes_bound,
        }


def plan_drive(
    drive: Drive, fit: Fitness, level: str, candidates: t.Sequence[Candidate], repository: str | None
) -> DrivePlan:
    """Decide the level of one drive. ``level`` is what was asked for: auto, full, incremental, differential, copy."""
    if level == "copy":
        return _full(drive, fit, "copy", track=False)
    if level == "full" or repository is None:
        return _full(drive, fit, "full", reason=None if level == "full" else _FIRST)
    if fit.tracking is Tracking.NONE:
        return _full(drive, fit, "full", reason=f"changes of this drive cannot be tracked: {fit.reason}")
    if level == "differential":
        candidates = [candidate for candidate in candidates if candidate.record.level == "full"][:1]
    if not candidates:
        return _full(drive, fit, "full", reason=_FIRST)
    refusals: list[str] = []
    for candidate in candidates:
        refusal, changes = _continuation(drive, fit, candidate, repository)
        if refusal is None:
            newest = refusals[0] if refusals else None
            return _incremental(drive, fit, candidate, changes, level, newest)
        refusals.append(refusal)
    return _full(drive, fit, "full", reason=refusals[0], lost=True)


_FIRST = "there is no earlier backup of this drive"


def _full(
    drive: Drive, fit: Fitness, level: str, *, reason: str | None = None, track: bool = True, lost: bool = False
) -> DrivePlan:
    image = drive.active
    return DrivePlan(
        drive=drive,
        level=level,
        sync="full",
        reason=reason,
        track=track and fit.tracking is not Tracking.NONE,
        persistent=fit.tracking is Tracking.PERSISTENT,
        bytes_bound=min(image.virtual_size, sum(layer.data_bound for layer in drive.layers)),
        lost=lost,
    )


def _incremental(
    drive: Drive,
    fit: Fitness,
    candidate: Candidate,
    changes: _Changes,
    level: str,
    reason: str | None,
) -> DrivePlan:
    return DrivePlan(
        drive=drive,
        level="differential" if level == "differential" else "incremental",
        sync="bitmap",
        reason=None if reason is None else f"builds on {candidate.backup} because {reason}",
        parent=candidate.backup,
        parent_file=candidate.record.file,
        merge=tuple((layer.node, bitmap.name) for layer, bitmap in changes),
        granularity=min(bitmap.granularity for _layer, bitmap in changes),
        track=True,
        persistent=fit.tracking is Tracking.PERSISTENT,
        bytes_bound=min(drive.active.virtual_size, sum(bitmap.count for _layer, bitmap in changes)),
    )


def _continuation(drive: Drive, fit: Fitness, candidate: Candidate, repository: str) -> tuple[str | None, _Changes]:
    """Why the drive cannot continue from the candidate, or ``None`` and the bitmaps that hold the changes."""
    if candidate.defect is not None:
        return f"backup {candidate.backup} is damaged: {candidate.defect}", ()
    image, parent = drive.active, candidate.record
    if image.virtual_size < parent.virtual_size:
        return f"the drive has shrunk from {parent.virtual_size} to {image.virtual_size} bytes", ()
    if image.virtual_size > parent.virtual_size and image.driver != "qcow2":
        # What a qcow2 grows by reads as zeros; what a device grows by may hold anything.
        return f"the {image.driver} drive has grown from {parent.virtual_size} to {image.virtual_size} bytes", ()
    return _tracked_changes(drive, fit, candidate, repository)


def _tracked_changes(drive: Drive, fit: Fitness, candidate: Candidate, repository: str) -> tuple[str | None, _Changes]:
    """Bitmaps from the active image down to the one that was active at the candidate's point in time.

    A snapshot taken since then put an overlay on top, and only if that overlay got its bitmap in the same transaction,
    and no image was dropped without its bitmap going on in another one, do all of them together know every change: no
    number may be missing.
    """
    since = candidate.record.source.file
    depth = _depth(drive, since, repository, candidate.backup)
    if depth is None:
        return f"the image that was active then ({since}) is no longer in the drive's chain", ()
    changes: list[tuple[Layer, Bitmap]] = []
    known = -1
    for layer in reversed(drive.layers[: depth + 1]):
        where = "" if layer is drive.active else f" in the image {layer.file} below the active one"
        numbered = _numbered(layer, repository, candidate.backup, since)
        if not numbered or min(numbered) > known + 1 or max(numbered) - min(numbered) >= len(numbered):
            return _absent(drive, fit, candidate.backup, where, depth), ()
        for bitmap in numbered.values():
            reason = _unusable(bitmap, where, active=layer is drive.active)
            if reason is not None:
                return reason, ()
            changes.insert(0, (layer, bitmap))
        known = max(numbered)
    if len({layer.virtual_size for layer, _bitmap in changes}) > 1:
        return "the drive was resized across a snapshot", ()
    return None, changes


def _depth(drive: Drive, since: str | None, repository: str, backup: str) -> int | None:
    """How far down the changes began: at the image backed up then, or the one that its bitmap has been moved to."""
    moved = bitmap_name(repository, backup, origin=origin_of(since)) if since else ""
    plain = bitmap_name(repository, backup)
    for number, layer in enumerate(drive.layers):
        if layer.bitmap(moved) is not None or (layer.file == since and layer.bitmap(plain) is not None):
            return number
    return next((number for number, layer in enumerate(drive.layers) if layer.file == since), None)


def _numbered(layer: Layer, repository: str, backup: str, since: str | None) -> dict[int, Bitmap]:
    """The image's bitmaps that follow the backup, by number; one that other images were merged into has several."""
    found: dict[int, Bitmap] = {}
    for bitmap in layer.bitmaps:
        ours = parse_bitmap(bitmap.name)
        if ours is None or (ours.repository, ours.backup) != (repository, backup):
            continue
        origin = layer.file == since if ours.origin is None else since is not None and ours.origin == origin_of(since)
        if ours.layer or origin:
            found[ours.layer] = bitmap
    return found


def _unusable(bitmap: Bitmap, where: str, *, active: bool) -> str | None:
    if bitmap.inconsistent:
        return f"its bitmap{where} is inconsistent: QEMU was killed or the host crashed since then"
    if bitmap.busy:
        return f"its bitmap{where} is in use by another operation"
    if not bitmap.recording and active:
        return f"its bitmap{where} was disabled"
    return None


def _absent(drive: Drive, fit: Fitness, backup: str, where: str, depth: int) -> str:
    if fit.tracking is Tracking.TRANSIENT:
        return f"{fit.reason}, and QEMU was restarted since backup {backup}"
    if depth and not where:
        return (
            f"the active image {drive.active.file} has no bitmap that continues the one of backup {backup}: it, or an "
            "image below it, was put there or dropped since then"
        )
    return f"there is no bitmap of backup {backup}{where}: QEMU was killed, or the image was replaced or restored"
