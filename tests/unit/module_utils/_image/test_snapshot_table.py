# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tables of real images: equal exactly while nothing was written; damaged ones give the named error."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import ImageInvalid
from ansible_collections.blockops.qemu.plugins.module_utils._image.snapshot_table import at_snapshot, has_data
from support.fabricate import identical, tool

OPTIONS = ["cluster_size=65536", "cluster_size=512", "cluster_size=2M", "compat=0.10", "extended_l2=on"]


def io(path: Path, *commands: str) -> None:
    tool("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), path)


@pytest.mark.parametrize("options", OPTIONS)
def test_equal_means_equal(tmp_path: Path, options: str) -> None:
    """Random writes and jumps: whenever the tables say so, qemu-img finds the same content; after a jump they do."""
    image, dice, said = tmp_path / "image", random.Random(options), 0
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, "9M")
    for number in (1, 2, 3):
        io(image, f"write -P {number} {number}M 1M")
        tool("qemu-img", "snapshot", "-c", f"s{number}", image)
        tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, tmp_path / f"s{number}")
    for _round in range(12):
        number = dice.choice((1, 2, 3))
        tool("qemu-img", "snapshot", "-a", f"s{number}", image)
        assert at_snapshot(str(image), str(number))
        if dice.random() < 0.7:
            position = dice.randrange(0, 9 * 2048 - 8) * 512
            io(image, dice.choice([f"write -P 7 {position} 512", f"write -z {position} 4k", f"discard {position} 4k"]))
        for other in (1, 2, 3):
            if at_snapshot(str(image), str(other)):
                said += 1
                assert identical(image, "qcow2", tmp_path / f"s{other}", "raw")
    assert said > 2
    assert not at_snapshot(str(image), "9")


def test_size(tmp_path: Path) -> None:
    image = tmp_path / "image"
    tool("qemu-img", "create", "-q", "-f", "qcow2", image, "9M")
    tool("qemu-img", "snapshot", "-c", "s1", image)
    assert at_snapshot(str(image), "1")
    tool("qemu-img", "resize", "-q", "-f", "qcow2", image, "10M")
    assert not at_snapshot(str(image), "1")


@pytest.mark.parametrize("options", OPTIONS)
def test_has_data(tmp_path: Path, options: str) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    tool("qemu-img", "create", "-q", "-f", "qcow2", base, "9M")
    io(base, "write -P 1 0 9M")
    assert has_data(str(base))
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "qcow2", top)
    assert not has_data(str(top))
    if "0.10" not in options:
        tool("qemu-img", "bitmap", "--add", top, "b")
        assert not has_data(str(top))
    io(top, "write -z 0 2M")  # zeroes that hide what lies below
    assert has_data(str(top))


def test_damaged_ones(tmp_path: Path) -> None:
    image, damaged = tmp_path / "image", tmp_path / "damaged"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "1M")
    tool("qemu-img", "snapshot", "-c", "s1", image)
    good, dice, refused = image.read_bytes(), random.Random(1), 0
    for _round in range(400):
        data = bytearray(good[: dice.choice([len(good), dice.randrange(len(good))])])
        for _change in range(dice.randrange(1, 4)):
            if data:
                data[dice.randrange(min(len(data), 112))] = dice.randrange(256)
        damaged.write_bytes(data)
        for look in (lambda: at_snapshot(str(damaged), "1"), lambda: has_data(str(damaged))):
            try:
                look()
            except ImageInvalid:
                refused += 1
    assert refused > 100
    with pytest.raises(ImageInvalid):
        has_data(str(tmp_path / "missing"))
