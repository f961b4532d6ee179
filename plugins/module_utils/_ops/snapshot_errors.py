# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Errors of snapshots that running VMs (qmp_snapshot) and images that nobody has open (qemu_img_snapshot) share."""

from __future__ import annotations

from .._errors import BlockOpsError


class SnapshotMissing(BlockOpsError):
    """``of``: the VM or the image that has none."""

    template = "{of} has no {type} snapshot {snapshot}{where}; it has: {known}."
    advice = "Nothing was touched."


class SnapshotAmbiguous(BlockOpsError):
    template = "{of} has several snapshots for the name {snapshot} ({ids})."
    advice = "Nothing was touched. Remove those that are not wanted{way_out}."


class BitmapsInTheWay(BlockOpsError):
    template = "{of} has dirty bitmaps of another tool ({bitmaps}), with which QEMU cannot go back."
    advice = "Nothing was touched. Remove them ({way_out}); that tool then needs a full backup."
