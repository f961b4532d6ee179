# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Tracking bitmaps of images that are merged: they go on in the image that stays, so the next backup is an increment.

Every change since a backup is in a bitmap of some image, under the number that image had above the one backed up. So
an image takes over the bitmaps of those merged into it, each under its number, and no number is missing then. In the
active image, on which the next overlay will count, all those of one backup become one.

The image that stays can be written only while the job runs: before that, and again after it, QEMU has it read-only.
"""

from __future__ import annotations

import typing as t

from .._block.graph import Bitmap, Layer
from .._block.names import bitmap_name, moved_bitmap, origin_of, parse_bitmap
from .._qmp.session import Command


def carrying(target: Layer, dropped: t.Sequence[Layer], *, active: bool) -> Command | None:
    """The transaction that takes the bitmaps of ``dropped`` into ``target``; ``None`` when there is nothing to take.

    It can be sent twice. Bitmaps that record for an image of another size, or no longer, are left to show as a gap.
    """
    size = max(layer.virtual_size for layer in (target, *dropped))
    wanted: dict[str, list[tuple[Layer, Bitmap]]] = {}
    members = (target, *dropped) if target.virtual_size == size else tuple(dropped)
    for layer in members:
        for bitmap in layer.bitmaps if layer.virtual_size == size else ():
            if parse_bitmap(bitmap.name) is not None and bitmap.usable:
                wanted.setdefault(_name(bitmap.name, layer, target), []).append((layer, bitmap))
    if active:
        wanted = _collapsed(wanted, target)
    actions: list[dict[str, t.Any]] = []
    for name, sources in wanted.items():
        actions += _taken(target, name, sources)
    superfluous = [
        bitmap.name for layer in (target,) for bitmap in layer.bitmaps if active and _is_merged(bitmap, wanted)
    ]
    actions += [
        {"type": "block-dirty-bitmap-remove", "data": {"node": target.node, "name": name}} for name in superfluous
    ]
    return Command("transaction", {"actions": actions}) if actions else None


def _name(name: str, layer: Layer, target: Layer) -> str:
    """In the target. One that comes home to the image it tells of needs no note of it."""
    if layer is not target:
        name = moved_bitmap(name, layer.file)
    ours = parse_bitmap(name)
    if ours is not None and ours.origin == origin_of(target.file) and target.bitmap(name) is None:
        return bitmap_name(ours.repository, ours.backup)
    return name


def _collapsed(wanted: dict[str, list[tuple[Layer, Bitmap]]], target: Layer) -> dict[str, list[tuple[Layer, Bitmap]]]:
    """One bitmap for each backup: under the lowest number, which stands for all above it."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in wanted:
        ours = parse_bitmap(name)
        if ours is not None:
            found.setdefault((ours.repository, ours.backup), []).append(name)
    lowest = {key: min(names, key=_number) for key, names in found.items()}
    return {lowest[key]: [source for name in names for source in wanted[name]] for key, names in found.items()}


def _number(name: str) -> tuple[int, str]:
    ours = parse_bitmap(name)
    return (ours.layer if ours is not None else 0, name)


def _is_merged(bitmap: Bitmap, wanted: t.Mapping[str, t.Sequence[tuple[Layer, Bitmap]]]) -> bool:
    """Whether a bitmap of the target is in another one of it now."""
    return bitmap.name not in wanted and any(
        bitmap is source for sources in wanted.values() for _layer, source in sources
    )


def _taken(target: Layer, name: str, sources: t.Sequence[tuple[Layer, Bitmap]]) -> t.Iterator[dict[str, t.Any]]:
    others = [(layer, bitmap) for layer, bitmap in sources if not (layer is target and bitmap.name == name)]
    if not others:
        return
    if target.bitmap(name) is None:
        granularity = min(bitmap.granularity for _layer, bitmap in others)
        new = {"node": target.node, "name": name, "granularity": granularity, "persistent": target.keeps_bitmaps}
        yield {"type": "block-dirty-bitmap-add", "data": new}
    bitmaps = [{"node": layer.node, "name": bitmap.name} for layer, bitmap in others]
    merge = {"node": target.node, "target": name, "bitmaps": bitmaps}
    yield {"type": "block-dirty-bitmap-merge", "data": merge}
