# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Which boundaries of each chain are to go: from a range of images, or from the state that was asked for."""

from __future__ import annotations

import typing as t
from datetime import datetime, timedelta, timezone

from .._block.graph import Drive
from .._image.snapshot_record import SnapshotRecord
from .chain_options import ChainOptions, ChainTooDeep, ImageNotInChain, SnapshotUnknown, WrongOrder
from .snapshot_view import View

# For each drive the boundaries to drop; boundary k lies between the layers k - 1 and k.
Drops = dict[str, frozenset[int]]


def find_drops(
    options: ChainOptions, vm: str, drives: t.Sequence[Drive], view: View, now: datetime | None = None
) -> Drops:
    """Empty for a drive where nothing is to be done (any more).

    :raise ImageNotInChain, WrongOrder: a range that is in no chain. :raise SnapshotUnknown: of a name in ``keep``.
    :raise ChainTooDeep: what has to stay is more than ``max_depth``.
    """
    records = {drive.name: _records(drive, view) for drive in drives}
    if options.desired:
        _refuse_unknown(options, vm, view)
        moment = now or datetime.now(timezone.utc)
        return {drive.name: _desired(options, vm, drive, records[drive.name], moment) for drive in drives}
    return _ranges(options, vm, drives, records)


def _records(drive: Drive, view: View) -> dict[int, SnapshotRecord]:
    """The snapshots of a drive, by boundary."""
    return {placed.index + 1: placed.record for placed in view.placed if placed.drive.name == drive.name}


def _refuse_unknown(options: ChainOptions, vm: str, view: View) -> None:
    unknown = sorted(set(options.keep or ()) - view.names)
    if unknown:
        raise SnapshotUnknown(vm=vm, names=", ".join(unknown), known=", ".join(sorted(view.names)) or "none")


def _desired(
    options: ChainOptions, vm: str, drive: Drive, records: dict[int, SnapshotRecord], now: datetime
) -> frozenset[int]:
    """Only boundaries that are snapshots of this collection: what another tool put there is not ours to judge.

    For ``max_depth`` the oldest go first, which are the lowest.
    """
    droppable = [number for number, record in sorted(records.items()) if record.name not in (options.keep or ())]
    if options.older_than is None:
        drops = set(droppable) if options.max_depth is None else set()
    else:
        limit = now - timedelta(seconds=options.older_than)
        drops = {number for number in droppable if _created(records[number]) < limit}
    if options.max_depth is None:
        return frozenset(drops)
    spare = [number for number in droppable if number not in drops]
    while len(drive.layers) - len(drops) > options.max_depth and spare:
        drops.add(spare.pop())
    left = len(drive.layers) - len(drops)
    if left > options.max_depth:
        kept = [record.name for number, record in sorted(records.items()) if number not in drops]
        foreign = left - 1 - len(kept)
        reason = f"{left} must stay (to keep: {', '.join(kept) or 'none'}; boundaries that are no snapshots: {foreign})"
        raise ChainTooDeep(drive=drive.name, vm=vm, max_depth=options.max_depth, reason=reason)
    return frozenset(drops)


def _created(record: SnapshotRecord) -> datetime:
    """One that cannot be read counts as new: it stays."""
    try:
        return datetime.strptime(record.created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError:
        return datetime.max.replace(tzinfo=timezone.utc)


def _ranges(
    options: ChainOptions, vm: str, drives: t.Sequence[Drive], records: dict[str, dict[int, SnapshotRecord]]
) -> Drops:
    """The range in each chain that has it. An image that has left the chain is dropped already.

    What must be there is what stays: the base of a commit, the image that is streamed into, and its base.
    """
    stays = {name: getattr(options, name) for name in ("top", "base") if getattr(options, name) is not None}
    if not options.streams and "base" in stays:
        stays.pop("top", None)
    elif not options.streams:
        stays = {}
    found: Drops = {}
    for drive in drives:
        places = {name: _place(drive, reference, records[drive.name]) for name, reference in stays.items()}
        if None not in places.values():
            found[drive.name] = _range(options, vm, drive, records[drive.name])
    if stays and not found:
        name, reference = next(iter(stays.items()))
        known = "; ".join(f"{drive.name}: {', '.join(layer.file for layer in drive.layers)}" for drive in drives)
        raise ImageNotInChain(vm=vm, option=name, reference=reference, known=known or "no drives")
    return {drive.name: found.get(drive.name, frozenset()) for drive in drives}


def _range(options: ChainOptions, vm: str, drive: Drive, records: dict[int, SnapshotRecord]) -> frozenset[int]:
    top = 0 if options.top is None else _place(drive, options.top, records)
    last = len(drive.layers) - 1
    if options.bottom is not None:
        lowest = _place(drive, options.bottom, records)
    elif options.base is not None:
        lowest = _place(drive, options.base, records)
        lowest = lowest - 1 if lowest is not None and options.streams else lowest
    else:
        lowest = last
    if top is None or lowest is None:
        return frozenset()
    if lowest < top:
        upper, lower = options.top or drive.active.file, options.bottom or options.base or drive.layers[lowest].file
        raise WrongOrder(drive=drive.name, vm=vm, upper=upper, lower=lower)
    return frozenset(range(top + 1, lowest + 1))


def _place(drive: Drive, reference: str, records: dict[int, SnapshotRecord]) -> int | None:
    """An image by file, by node name, or by the name of the snapshot that it is."""
    for number, layer in enumerate(drive.layers):
        if reference in (layer.file, layer.node):
            return number
    return next((number for number, record in records.items() if record.name == reference), None)
