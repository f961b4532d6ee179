# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""An image that shows the same as another one on another backing file: what has to be in it, and how it is made.

Only what the backing file does not show has to be in it. So one comparison serves for all: rebasing (what the two
chains have in common below is not even read), flattening (compared with nothing), trimming (compared with itself).
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from .._image import qemu_img
from .._image.chain import Link
from .._image.difference import Content, Disk, copy, difference
from .._image.extents import Range, aligned, common, doubtful, extents_of, joined, nothing, own, sized, total, without
from .._image.qemu_img import Image
from .img_info import bitmap_result
from .img_rebase_types import Backing

Info = t.Mapping[str, t.Any]
_SUBCLUSTERS = 32


@dataclass(frozen=True)
class Bitmap:
    name: str
    granularity: int
    recording: bool


@dataclass(frozen=True)
class Build:
    """What the new image will hold, and how that compares with the old one (bytes of the disk).

    ``dropped``: what the old one holds and the new one need not; ``zeroed``: zeroes that took space as data;
    ``copied``: what the old one had from below.
    """

    source: Disk
    content: Content
    size: int
    options: dict[str, str]
    bitmaps: tuple[Bitmap, ...]
    lost_bitmaps: tuple[str, ...]
    dropped: int
    zeroed: int
    copied: int

    @property
    def needed(self) -> int:
        """Bytes of its file, tables included."""
        return total(self.content.data) * 1025 // 1024 + (1 << 20)


async def disk_of(links: t.Sequence[Link], size: int) -> Disk:
    """What the chain of these images shows of the first ``size`` bytes; of none: zeroes."""
    if not links:
        return Disk(None, nothing(size))
    image = Image(links[0].path, links[0].format)
    return Disk(image, sized(extents_of(await qemu_img.mapped(image), [link.real for link in links]), size))


async def plan_build(links: t.Sequence[Link], info: Info, below: t.Sequence[Link], *, trim: bool) -> Build:
    """Compare, and say what the image ``links[0]`` has to hold on the chain ``below``. With ``trim`` nothing more."""
    size = info["virtual-size"]
    old, new = await disk_of(links, size), await disk_of(below, size)
    unit = _unit(info)
    doubts = aligned(doubtful(old.extents, new.extents), unit, size)
    held = own(old.extents)
    kept = Content([], [])
    if not trim and below:
        kept = Content(own(old.extents, zero=False), own(old.extents, zero=True))
        doubts = without(doubts, held)
    found = await difference(old, new, doubts, unit)
    content = Content(joined([*kept.data, *found.data]), joined([*kept.zeroes, *found.zeroes]))
    return _build(old, content, held, info)


def _build(old: Disk, content: Content, held: list[Range], info: Info) -> Build:
    everything = joined([*content.data, *content.zeroes])
    entries = [bitmap_result(entry, False) for entry in info["format-specific"]["data"].get("bitmaps", ())]
    return Build(
        source=old,
        content=content,
        size=info["virtual-size"],
        options=options_of(info),
        bitmaps=tuple(
            Bitmap(entry["name"], entry["granularity"], entry["recording"])
            for entry in entries
            if not entry["inconsistent"]
        ),
        lost_bitmaps=tuple(entry["name"] for entry in entries if entry["inconsistent"]),
        dropped=total(without(held, everything)),
        zeroed=total(common(own(old.extents, zero=False), content.zeroes)),
        copied=total(without(everything, held)),
    )


def _unit(info: Info) -> int:
    extended = info["format-specific"]["data"].get("extended-l2", False)
    return int(info["cluster-size"]) // (_SUBCLUSTERS if extended else 1)


def options_of(info: Info) -> dict[str, str]:
    """How to create an image like this one."""
    data = info["format-specific"]["data"]
    options = {"cluster_size": str(info["cluster-size"]), "compat": data["compat"]}
    if data["compat"] != "0.10":
        options["refcount_bits"] = str(data["refcount-bits"])
        for key, option in (("lazy-refcounts", "lazy_refcounts"), ("extended-l2", "extended_l2")):
            if key in data:
                options[option] = "on" if data[key] else "off"
        if "compression-type" in data:
            options["compression_type"] = data["compression-type"]
    return options


async def make(build: Build, image: str, backing: Backing | None, new: str) -> None:
    """Make it at ``new``, in the directory of ``image``, the old one, whose bitmaps it gets."""
    below = None if backing is None else Image(backing.name, backing.format)
    await qemu_img.create(new, "qcow2", build.size, backing=below, options=build.options)
    if build.content:
        await copy(build.source, Image(new, "qcow2"), build.content)
    # Afterwards, and merged: what was written here is nothing that a guest wrote.
    for bitmap in build.bitmaps:
        await qemu_img.add_bitmap(new, bitmap.name, bitmap.granularity, recording=bitmap.recording)
        await qemu_img.merge_bitmap(new, bitmap.name, image, bitmap.name)


async def first_difference(a: t.Sequence[Link], b: t.Sequence[Link], size: int) -> int | None:
    """Where two chains differ within ``size`` bytes, not necessarily at the first such place."""
    old, new = await disk_of(a, size), await disk_of(b, size)
    found = await difference(old, new, doubtful(old.extents, new.extents), 1 << 16, first=True)
    starts = [start for start, _end in (*found.data, *found.zeroes)]
    return min(starts, default=None)
