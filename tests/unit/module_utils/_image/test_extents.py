# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import random
import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._image.extents import (
    Extent,
    Extents,
    Range,
    aligned,
    common,
    doubtful,
    extents_of,
    joined,
    nothing,
    own,
    pieces,
    sized,
    total,
    without,
)

Bytes = set[int]


def entry(start: int, length: int, depth: int, *, zero: bool = False, offset: int | None = 0, **more: t.Any) -> t.Any:
    found = {"start": start, "length": length, "depth": depth, "zero": zero, "data": not zero, **more}
    return found if offset is None or zero else {**found, "offset": offset}


REPORT = [
    entry(0, 10, 0, present=True),
    entry(10, 10, 1, present=True, offset=None),  # compressed
    entry(20, 10, 0, zero=True, present=True),
    entry(30, 10, 1, zero=True, present=False),
    entry(40, 10, 0, zero=True, present=False),  # beyond the end of what is below
]


def test_extents_of() -> None:
    found = extents_of(REPORT, ["top", "below"])
    assert [(each.file, each.zero, each.top, each.mapped) for each in found] == [
        ("top", False, True, True),
        ("below", False, False, False),
        ("top", True, True, True),
        ("below", True, False, True),
        ("top", True, False, True),
    ]
    assert own(found) == [(0, 10), (20, 30)]
    assert (own(found, zero=True), own(found, zero=False)) == ([(20, 30)], [(0, 10)])


def test_before_present_was_told() -> None:
    report = [{key: value for key, value in each.items() if key != "present"} for each in REPORT]
    assert own(extents_of(report, ["top", "below"])) == [(0, 10), (20, 30), (40, 50)]


def test_more_images_than_are_known() -> None:
    (found,) = extents_of([entry(0, 10, 3)], ["top", "below"])
    assert (found.file, found.offset, found.mapped) == (None, None, False)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, []), (5, [(0, 5)]), (50, [(0, 10), (10, 20), (20, 30), (30, 40), (40, 50)])],
)
def test_sized(size: int, expected: list[Range]) -> None:
    assert [(each.start, each.end) for each in sized(extents_of(REPORT, ["top", "below"]), size)] == expected


def test_sized_beyond_the_end() -> None:
    longer = sized(extents_of(REPORT, ["top", "below"]), 70)
    assert (longer[-1].start, longer[-1].end, longer[-1].zero, longer[-1].top) == (50, 70, True, False)
    assert sized((), 7) == nothing(7)


def disk(rng: random.Random, files: t.Sequence[str], size: int) -> Extents:
    found, position = [], 0
    while position < size:
        length = min(rng.randint(1, 9), size - position)
        found.append(Extent(position, length, rng.choice(files), position, rng.random() < 0.3, rng.random() < 0.5))
        position += length
    return tuple(found)


@pytest.mark.parametrize("seed", range(50))
def test_doubtful_is_what_byte_by_byte_is_doubtful(seed: int) -> None:
    rng = random.Random(seed)
    a, b = disk(rng, ["x", "y"], 60), disk(rng, ["y", "z"], 60)
    expected = set()
    for byte in range(60):
        (one,) = [each for each in a if each.start <= byte < each.end]
        (other,) = [each for each in b if each.start <= byte < each.end]
        if not ((one.zero and other.zero) or one.file == other.file):
            expected.add(byte)
    assert bytes_of(doubtful(a, b)) == expected


def test_the_same_image_far_below_needs_no_reading() -> None:
    """Also where it is compressed."""
    a = (Extent(0, 4, "top", 0, False, True), Extent(4, 6, "base", None, False, False))
    b = (Extent(0, 10, "base", None, False, True),)
    assert doubtful(a, b) == [(0, 4)]


def bytes_of(ranges: t.Iterable[Range]) -> Bytes:
    return {byte for start, end in ranges for byte in range(start, end)}


@pytest.mark.parametrize("seed", range(50))
def test_ranges_are_sets_of_bytes(seed: int) -> None:
    rng = random.Random(seed)

    def some() -> list[Range]:
        starts = [rng.randint(0, 90) for _number in range(rng.randint(0, 6))]
        return joined((start, start + rng.randint(0, 9)) for start in starts)

    a, b = some(), some()
    assert bytes_of(without(a, b)) == bytes_of(a) - bytes_of(b)
    assert bytes_of(common(a, b)) == bytes_of(a) & bytes_of(b)
    assert bytes_of(joined([*a, *b])) == bytes_of(a) | bytes_of(b)
    assert total(a) == len(bytes_of(a))
    cut = list(pieces(a, 8))
    assert bytes_of(cut) == bytes_of(a) and all(start // 8 == (end - 1) // 8 for start, end in cut)
    whole = bytes_of(aligned(a, 8, 97))
    assert whole == {byte for byte in range(97) if byte // 8 in {each // 8 for each in bytes_of(a)}}
