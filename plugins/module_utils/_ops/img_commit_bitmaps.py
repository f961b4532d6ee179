# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Which tracking bitmaps go where when images of a chain are committed, so that the next backup is an incremental.

A bitmap named after a backup is in the image that was active then, and ``.1``, ``.2`` after it in those above. All
together they know every change since then. Images that go give what theirs know to the image that stays.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from .._block.names import bitmap_name, parse_bitmap
from .._image import qemu_img

Entries = t.Sequence[t.Mapping[str, t.Any]]
Found = t.Sequence[tuple[str, t.Mapping[str, t.Any]]]


@dataclass(frozen=True)
class Merge:
    """Bitmap ``name`` of the image that stays gets what ``sources`` (image, bitmap) know. ``make``: it is new there."""

    name: str
    granularity: int
    sources: tuple[tuple[str, str], ...]
    make: bool
    recording: bool = True


def plan_bitmaps(
    going: t.Sequence[tuple[str, Entries]], base: Entries | None, *, into_base: bool
) -> tuple[list[Merge], list[str]]:
    """What to merge, and the names of those that nobody can follow.

    ``going``: images and their bitmaps, the topmost first. ``base``: those of the base; ``None``: it can have none.
    ``into_base``: the base takes them, else the new overlay in the place of the topmost image.
    """
    merges, lost = [], []
    for key in sorted({_key(entry) for _image, entries in going for entry in entries} - {None}, key=str):
        found = [(image, entry) for image, entries in going for entry in entries if _key(entry) == key]
        below = [entry for entry in base or () if _key(entry) == key]
        if not _complete(found, below, [image for image, _entries in going]) or (into_base and base is None):
            lost += [entry["name"] for _image, entry in found]
            continue
        lowest = min([_layer(entry) for _image, entry in found] + [_layer(entry) for entry in below if into_base])
        name = bitmap_name(*t.cast("tuple[str, str]", key), lowest)
        merges.append(
            Merge(
                name,
                min(entry["granularity"] for _image, entry in found),
                tuple((image, entry["name"]) for image, entry in found),
                make=not into_base or name not in [entry["name"] for entry in below],
            )
        )
    foreign = [(image, entry) for image, entries in going for entry in entries if _key(entry) is None]
    for image, entry in foreign:
        if into_base or image != going[0][0] or entry["inconsistent"]:
            lost.append(entry["name"])
        else:
            merges.append(
                Merge(entry["name"], entry["granularity"], ((image, entry["name"]),), True, entry["recording"])
            )
    return merges, lost


def _complete(found: Found, below: Entries, going: t.Sequence[str]) -> bool:
    """Whether they know every change: recording, from the topmost image down without a gap to the one backed up."""
    entries = [entry for _image, entry in found]
    if any(entry["inconsistent"] or not entry["recording"] for entry in (*entries, *below)):
        return False
    layers = [_layer(entry) for entry in entries]
    if [image for image, _entry in found] != list(going[: len(found)]):
        return False
    if layers != list(range(layers[0], layers[0] - len(layers), -1)) or (len(found) < len(going) and layers[-1] != 0):
        return False
    # Of the same number below: what a killed run put there.
    return all(_layer(entry) in (layers[-1] - 1, layers[-1]) for entry in below) and (layers[-1] == 0 or bool(below))


def _key(entry: t.Mapping[str, t.Any]) -> tuple[str, str] | None:
    name = parse_bitmap(entry["name"])
    return None if name is None else (name.repository, name.backup)


def _layer(entry: t.Mapping[str, t.Any]) -> int:
    name = parse_bitmap(entry["name"])
    return name.layer if name is not None else 0


async def merge_bitmaps(image: str, merges: t.Iterable[Merge]) -> None:
    """Do it in ``image``. Again after a kill it comes to the same."""
    for merge in merges:
        if merge.make:
            await qemu_img.add_bitmap(image, merge.name, merge.granularity, recording=merge.recording)
        for source, name in merge.sources:
            await qemu_img.merge_bitmap(image, merge.name, source, name)
