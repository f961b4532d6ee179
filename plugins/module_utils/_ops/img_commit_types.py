# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Committing images that nobody has open: what is asked for, and the errors."""

from __future__ import annotations

from dataclasses import dataclass

from .._errors import BlockOpsError


class ImageMissing(BlockOpsError):
    template = "There is no image {image}."
    advice = "Nothing was changed. If it may have been committed and deleted before, use missing_ok=true."


class NoBase(BlockOpsError):
    template = "{image} cannot be committed into {base}, which is not below it; below it are: {known}."
    advice = "Nothing was changed."


class CommitUnsupported(BlockOpsError):
    template = "{image} cannot be committed: {reason}."
    advice = "Nothing was changed."


@dataclass(frozen=True)
class CommitRequest:
    """``base``: ``None`` for the image right below. ``directories`` empty: the image's own."""

    path: str
    base: str | None = None
    delete: bool = False
    missing_ok: bool = False
    directories: tuple[str, ...] = ()
    check_mode: bool = False
