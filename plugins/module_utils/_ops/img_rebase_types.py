# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Giving an image another backing file: what is asked for, and the errors."""

from __future__ import annotations

from dataclasses import dataclass

from .._errors import BlockOpsError

COMPARE, CONTENTS_EQUAL = "compare", "contents_equal"


class BackingMissing(BlockOpsError):
    template = "{backing}, which {image} is based on, cannot be read: {reason}."
    advice = (
        "Nothing was changed. If it was renamed or moved, give its new path as backing, with unsafe=true and "
        "acknowledge=contents_equal; if it is lost, so is what {image} does not hold itself."
    )


class ContentsDiffer(BlockOpsError):
    template = "{backing} does not hold what {image} is based on now: the first difference is at byte {offset}."
    advice = "Nothing was changed. Without unsafe, {image} gets a copy of what differs."


class RebaseUnsupported(BlockOpsError):
    template = "{image} cannot be rebased: {reason}."
    advice = "Nothing was changed."


@dataclass(frozen=True)
class RebaseRequest:
    """``backing``: ``None`` for the present one, empty for none. ``relative``: ``None`` for what fits.

    ``proof`` and ``acknowledge`` matter with ``unsafe`` only. ``directories`` empty: the image's own.
    """

    path: str
    backing: str | None
    backing_format: str | None = None
    relative: bool | None = None
    unsafe: bool = False
    proof: str | None = None
    acknowledge: str | None = None
    trim: bool = False
    in_place: bool = False
    backup: bool = False
    directories: tuple[str, ...] = ()
    check_mode: bool = False


@dataclass(frozen=True)
class Backing:
    """A backing file: ``name`` as a header spells it, ``path`` as QEMU would find it, ``real`` with links resolved."""

    name: str
    path: str
    real: str
    format: str
