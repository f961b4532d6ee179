# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The header reader beside qemu-img's own reading of the same files, and on files nobody should open."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import ImageInvalid
from ansible_collections.blockops.qemu.plugins.module_utils._image.header import Header, read_header
from support.fabricate import tool

MIB = 1 << 20


def create(path: Path, *arguments: str) -> Header:
    tool("qemu-img", "create", "-q", "-f", "qcow2", *arguments, path, *(() if "-b" in arguments else ("3M",)))
    return read_header(str(path))


@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "cluster_size=512", "cluster_size=2M"])
def test_plain(tmp_path: Path, options: str) -> None:
    version = 2 if "0.10" in options else 3
    assert create(tmp_path / "a", "-o", options) == Header(version, 3 * MIB, None, None, False, False, False)


@pytest.mark.parametrize("compat", ["compat=1.1", "compat=0.10"])
def test_backing(tmp_path: Path, compat: str) -> None:
    create(tmp_path / "base")
    header = create(tmp_path / "a", "-o", compat, "-b", "base", "-F", "qcow2")
    assert (header.backing_file, header.backing_format, header.virtual_size) == ("base", "qcow2", 3 * MIB)


def test_backing_without_format(tmp_path: Path) -> None:
    create(tmp_path / "a")
    tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "json:{}", tmp_path / "a")
    header = read_header(str(tmp_path / "a"))
    assert (header.backing_file, header.backing_format) == ("json:{}", "raw")


def test_data_file_and_encryption(tmp_path: Path) -> None:
    assert create(tmp_path / "a", "-o", f"data_file={tmp_path}/data").data_file
    create(tmp_path / "b")
    with (tmp_path / "b").open("r+b") as stream:  # as LUKS says it; really encrypting fails on a busy machine
        stream.seek(32)
        stream.write(struct.pack(">I", 2))
    assert read_header(str(tmp_path / "b")).encrypted


def test_corrupt_bit(tmp_path: Path) -> None:
    create(tmp_path / "a")
    with (tmp_path / "a").open("r+b") as stream:
        stream.seek(72)
        stream.write(struct.pack(">Q", 2))
    assert read_header(str(tmp_path / "a")).corrupt


def test_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "raw").write_bytes(bytes(4096))
    os.mkfifo(tmp_path / "fifo")
    create(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    for name in ("empty", "raw", "fifo", "link", "missing", "."):
        with pytest.raises(ImageInvalid):
            read_header(str(tmp_path / name))


def test_any_bytes_give_a_header_or_the_named_error(tmp_path: Path) -> None:
    create(tmp_path / "base")
    create(tmp_path / "a", "-b", "base", "-F", "qcow2")
    good = (tmp_path / "a").read_bytes()[: 1 << 16]
    dice = random.Random(3)
    refused = 0
    for _round in range(600):
        data = bytearray(good[: dice.choice([len(good), dice.randrange(200)])])
        for _change in range(dice.randrange(1, 6)):
            if data:
                data[dice.randrange(min(len(data), 160))] = dice.choice([0, 255, dice.randrange(256)])
        (tmp_path / "b").write_bytes(data)
        try:
            read_header(str(tmp_path / "b"))
        except ImageInvalid:
            refused += 1
    assert 100 < refused < 600
