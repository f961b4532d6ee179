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
from .._block.graph import Drive, Layer
from .._block.names import bitmap_name
from .._repository.manifest import DriveRecord

# Clusters and their tables: 8 bytes per 64 KiB in L2, 2 in refcounts, and the header, L1 and first tables.
_METADATA_SHARE = 4096
_METADATA_BASE = 1 << 20


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
        refusal, layers = _continuation(drive, fit, candidate, repository)
        if refusal is None:
            newest = refusals[0] if refusals else None
            return _incremental(drive, fit, candidate, layers, repository, level, newest)
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
    layers: t.Sequence[Layer],
    repository: str,
    level: str,
    reason: str | None,
) -> DrivePlan:
    name = bitmap_name(repository, candidate.backup)
    bitmaps = [bitmap for layer in layers for bitmap in layer.bitmaps if bitmap.name == name]
    return DrivePlan(
        drive=drive,
        level="differential" if level == "differential" else "incremental",
        sync="bitmap",
        reason=None if reason is None else f"builds on {candidate.backup} because {reason}",
        parent=candidate.backup,
        parent_file=candidate.record.file,
        merge=tuple((layer.node, name) for layer in layers),
        granularity=min(bitmap.granularity for bitmap in bitmaps),
        track=True,
        persistent=fit.tracking is Tracking.PERSISTENT,
        bytes_bound=min(drive.active.virtual_size, sum(bitmap.count for bitmap in bitmaps)),
    )


def _continuation(
    drive: Drive, fit: Fitness, candidate: Candidate, repository: str
) -> tuple[str | None, t.Sequence[Layer]]:
    """Why the drive cannot continue from the candidate, or ``None`` and the layers whose bitmaps hold the changes."""
    if candidate.defect is not None:
        return f"backup {candidate.backup} is damaged: {candidate.defect}", ()
    image, parent = drive.active, candidate.record
    if image.virtual_size < parent.virtual_size:
        return f"the drive has shrunk from {parent.virtual_size} to {image.virtual_size} bytes", ()
    if image.virtual_size > parent.virtual_size and image.driver != "qcow2":
        # What a qcow2 grows by reads as zeros; what a device grows by may hold anything.
        return f"the {image.driver} drive has grown from {parent.virtual_size} to {image.virtual_size} bytes", ()
    return _tracked_layers(drive, fit, candidate, bitmap_name(repository, candidate.backup))


def _tracked_layers(
    drive: Drive, fit: Fitness, candidate: Candidate, name: str
) -> tuple[str | None, t.Sequence[Layer]]:
    """Layers from the active image down to the one that was active at the candidate's point in time.

    Every one of them must have the bitmap: a snapshot taken since then put an overlay on top, and only if that
    overlay got the bitmap in the same transaction do all layers together know every change.
    """
    since = candidate.record.source.file
    layers: list[Layer] = []
    for layer in drive.layers:
        bitmap = layer.bitmap(name)
        where = "" if layer is drive.active else f" in the image {layer.file} below the active one"
        if bitmap is None:
            return _absent(drive, fit, candidate.backup, where), ()
        if bitmap.inconsistent:
            return f"its bitmap{where} is inconsistent: QEMU was killed or the host crashed since then", ()
        if bitmap.busy:
            return f"its bitmap{where} is in use by another operation", ()
        if not bitmap.recording and layer is drive.active:
            return f"its bitmap{where} was disabled", ()
        layers.append(layer)
        if layer.file == since:
            if len({layer.virtual_size for layer in layers}) > 1:
                return "the drive was resized across a snapshot", ()
            return None, layers
    return f"the image that was active then ({since}) is no longer in the drive's chain", ()


def _absent(drive: Drive, fit: Fitness, backup: str, where: str) -> str:
    if fit.tracking is Tracking.TRANSIENT:
        return f"{fit.reason}, and QEMU was restarted since backup {backup}"
    if len(drive.layers) > 1 and not where:
        return f"the active image {drive.active.file} has no bitmap of backup {backup}: it was put there since then"
    return f"there is no bitmap of backup {backup}{where}: QEMU was killed, or the image was replaced or restored"
