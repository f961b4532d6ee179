# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Overlays made by qemu-img are found by every spelling of their backing name, and nothing else is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._image.dependents import dependents
from support.fabricate import tool


def overlay(path: Path, backing: str) -> str:
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "qcow2", path, "1M")
    return str(path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "vms"
    directory.mkdir()
    tool("qemu-img", "create", "-q", "-f", "qcow2", directory / "base", "1M")
    return directory / "base"


@pytest.mark.parametrize(
    "spelling",
    [
        "base",
        "./base",
        "../vms/base",
        "{directory}/base",
        "file:base",
        "file:{directory}/base",
        'json:{{"driver": "qcow2", "file": {{"driver": "file", "filename": "base"}}}}',
        'json:{{"file.filename": "{directory}/base"}}',
        "link",
        "hard",
    ],
)
def test_every_spelling(base: Path, spelling: str) -> None:
    (base.parent / "link").symlink_to("base")
    (base.parent / "hard").hardlink_to(base)
    made = overlay(base.parent / "top", spelling.format(directory=base.parent))
    assert dependents(str(base), [str(base.parent)]) == [made]


@pytest.mark.parametrize("spelling", ["bas", "base2", "nbd:base", "json:base", "json:[]", "/base", "http://h/base"])
def test_other_names(base: Path, spelling: str) -> None:
    overlay(base.parent / "top", spelling)
    assert dependents(str(base), [str(base.parent)]) == []


def test_only_direct_ones_and_only_in_the_directories(base: Path, tmp_path: Path) -> None:
    middle = overlay(base.parent / "middle", "base")
    top = overlay(base.parent / "top", "middle")
    elsewhere = overlay(tmp_path / "elsewhere", str(base))
    both = [str(base.parent), str(tmp_path), str(tmp_path / "vms" / ".."), str(tmp_path / "missing")]
    assert dependents(str(base), [str(base.parent)]) == [middle]
    assert dependents(str(base), both) == sorted([middle, elsewhere])
    assert dependents(middle, both) == [top]


def test_a_link_to_an_overlay_that_lies_elsewhere(base: Path, tmp_path: Path) -> None:
    overlay(tmp_path / "top", "base")
    (base.parent / "top").symlink_to("../top")
    assert dependents(str(base), [str(base.parent)]) == [str(base.parent / "top")]


def test_a_base_that_is_gone_is_known_by_its_name(base: Path) -> None:
    made = overlay(base.parent / "top", "base")
    base.unlink()
    assert dependents(str(base), [str(base.parent)]) == [made]


def test_what_is_no_image_is_skipped(base: Path) -> None:
    directory = base.parent
    (directory / "text").write_text(json.dumps("base"))
    (directory / "cut").write_bytes(base.read_bytes()[:80])
    (directory / "directory").mkdir()
    (directory / "loop").symlink_to("loop")
    os.mkfifo(directory / "fifo")
    assert dependents(str(base), [str(directory)]) == []
