# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Which drives can be backed up, and how well their changes can be tracked. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .graph import Drive


class Tracking(Enum):
    """How long a drive's dirty bitmap lives."""

    PERSISTENT = "persistent"  # stored in the image when QEMU ends
    TRANSIENT = "transient"  # until QEMU ends
    NONE = "none"  # there cannot be one


@dataclass(frozen=True)
class Fitness:
    """``possible``: a backup can be made. ``default``: it is made without being asked for by name.

    ``reason`` says why not, or why changes are not tracked persistently; ``None`` when all is well.
    """

    possible: bool
    default: bool
    tracking: Tracking
    reason: str | None = None


def fitness(drive: Drive) -> Fitness:
    if drive.empty:
        return Fitness(False, False, Tracking.NONE, "it is empty (no medium inserted)")
    if drive.active.driver in ("quorum", "blkverify"):
        return Fitness(False, False, Tracking.NONE, f"the {drive.active.driver} driver has no single image")
    if drive.qdev is None:
        return Fitness(True, False, Tracking.NONE, "no device of the VM uses it; name it in drives to include it")
    if drive.removable:
        return Fitness(True, False, Tracking.NONE, "it is a removable medium; name it in drives to include it")
    if drive.active.read_only:
        return Fitness(True, False, Tracking.NONE, "it is read-only; name it in drives to include it")
    return _writable(drive)


def _writable(drive: Drive) -> Fitness:
    image = drive.active
    if image.keeps_bitmaps:
        return Fitness(True, True, Tracking.PERSISTENT)
    if image.driver == "qcow2":
        reason = "qcow2 version 2 (compat 0.10) cannot store bitmaps; 'qemu-img amend -o compat=1.1' mends it"
    else:
        reason = f"the {image.driver} format cannot store bitmaps"
    return Fitness(True, True, Tracking.TRANSIENT, f"{reason}; changes are tracked until QEMU ends")
