# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What an image shows and where that lies, as ``qemu-img map`` tells: pure.

Two chains need only be read where their maps leave a doubt: what both take from the same image is the same, and so is
what reads as zeroes in both.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

Range = tuple[int, int]  # start and end, in bytes of the disk


@dataclass(frozen=True)
class Extent:
    """A part of a disk. ``file``: the image of the chain that it comes from; ``offset``: where in that file it lies.

    ``offset`` is ``None`` for what is not there as the guest sees it, such as compressed clusters. ``top``: the topmost
    image has it itself, be it as zeroes.
    """

    start: int
    length: int
    file: str | None
    offset: int | None
    zero: bool
    top: bool

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def mapped(self) -> bool:
        """Whether its bytes can be read from the file directly, if any need to be read."""
        return self.zero or self.offset is not None


Extents = tuple[Extent, ...]


def extents_of(report: t.Iterable[t.Mapping[str, t.Any]], files: t.Sequence[str]) -> Extents:
    """The answer of ``qemu-img map`` on the chain of these files, the topmost first."""
    found = []
    for entry in report:
        depth = entry["depth"]
        known = 0 <= depth < len(files)
        found.append(
            Extent(
                start=entry["start"],
                length=entry["length"],
                file=files[depth] if known else None,
                offset=entry.get("offset") if known and entry["data"] else None,
                zero=bool(entry["zero"]),
                # QEMU before 6.1 does not tell "present"; then its zeroes count as there.
                top=depth == 0 and bool(entry.get("present", True)),
            )
        )
    return tuple(found)


def nothing(size: int) -> Extents:
    """A disk of zeroes: what an image without backing file is compared with."""
    return (Extent(0, size, None, None, True, False),) if size else ()


def sized(extents: Extents, size: int) -> Extents:
    """The same disk seen through an overlay of ``size`` bytes: cut off there, or zeroes up to there."""
    end = extents[-1].end if extents else 0
    cut = tuple(replace(each, length=min(each.end, size) - each.start) for each in extents if each.start < size)
    return (*cut, Extent(end, size - end, None, None, True, False)) if end < size else cut


def own(extents: Extents, *, zero: bool | None = None) -> list[Range]:
    """What the topmost image has itself; with ``zero`` only the zeroes, or only the rest."""
    wanted = (each for each in extents if each.top and zero in (None, each.zero))
    return joined((each.start, each.end) for each in wanted)


def doubtful(a: Extents, b: Extents) -> list[Range]:
    """Where the two could differ, as far as the maps tell. Both have the same size: see :func:`sized`."""
    found, others = [], iter(b)
    other = next(others, None)
    for each in a:
        position = each.start
        while position < each.end and other is not None:
            if other.end <= position:
                other = next(others, None)
                continue
            stop = min(each.end, other.end)
            if not _equal(each, other):
                found.append((position, stop))
            position = stop
    return joined(found)


def _equal(a: Extent, b: Extent) -> bool:
    return (a.zero and b.zero) or (a.file is not None and a.file == b.file)


def aligned(ranges: t.Iterable[Range], unit: int, size: int) -> list[Range]:
    """The ranges made whole multiples of ``unit``, but for the end of the disk."""
    return joined((start // unit * unit, min(-(-end // unit) * unit, size)) for start, end in ranges)


def joined(ranges: t.Iterable[Range]) -> list[Range]:
    """In order, and those that touch each other as one."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif start < end:
            found.append((start, end))
    return found


def without(ranges: t.Sequence[Range], others: t.Sequence[Range]) -> list[Range]:
    """What of ``ranges`` is in none of ``others``; both in order."""
    found, number = [], 0
    for start, end in ranges:
        while number < len(others) and others[number][1] <= start:
            number += 1
        rest, position = start, number
        while position < len(others) and others[position][0] < end:
            if rest < others[position][0]:
                found.append((rest, others[position][0]))
            rest, position = others[position][1], position + 1
        if rest < end:
            found.append((rest, end))
    return found


def common(ranges: t.Sequence[Range], others: t.Sequence[Range]) -> list[Range]:
    return without(ranges, without(ranges, others))


def total(ranges: t.Iterable[Range]) -> int:
    return sum(end - start for start, end in ranges)


def pieces(ranges: t.Iterable[Range], length: int) -> t.Iterator[Range]:
    """The ranges in pieces that do not cross a multiple of ``length``."""
    for start, end in ranges:
        position = start
        while position < end:
            stop = min(end, (position // length + 1) * length)
            yield position, stop
            position = stop
