# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Chains walked by headers: what is followed, and what is refused before anything opens it."""

from __future__ import annotations

import os
import struct
import typing as t
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._image.chain import has_protocol, rules_for, walk
from support.fabricate import tool

MIB = 1 << 20


def overlay(path: Path, backing: str, fmt: str = "qcow2", size: str = "1M") -> Path:
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", fmt, path, size)
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "vms").mkdir()
    tool("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "vms" / "base", "1M")
    tool("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "outside", "1M")
    return tmp_path / "vms"


def problem(path: Path, fmt: str | None = None, *allowed: Path, **limits: int) -> str | None:
    chain = walk(str(path), fmt, rules_for(str(path), [str(entry) for entry in allowed], **limits))
    return chain.problems[0].kind if chain.problems else None


def test_a_sound_chain(directory: Path) -> None:
    middle = overlay(directory / "middle", "./base")
    top = overlay(directory / "top", str(middle))
    chain = walk(str(top), "qcow2", rules_for(str(top)))
    assert not chain.problems
    assert [os.path.basename(link.real) for link in chain.links] == ["top", "middle", "base"]
    assert [link.virtual_size for link in chain.links] == [MIB] * 3


@pytest.mark.parametrize(
    ("backing", "kind"),
    [
        ("json:{}", "BackingNotFile"),
        ('json:{"driver":"qcow2","file":{"driver":"file","filename":"base"}}', "BackingNotFile"),
        ("nbd:localhost:10809", "BackingNotFile"),
        ("nbd+unix:///x?socket=/y", "BackingNotFile"),
        ("http://host/base", "BackingNotFile"),
        ("file:base", "BackingNotFile"),
        ("ssh://host/base", "BackingNotFile"),
        ("fat:rw:/etc", "BackingNotFile"),
        ("/etc/shadow", "Outside"),
        ("../outside", "Outside"),
        ("link_out", "Outside"),
        ("directory_out/outside", "Outside"),
        ("/dev/sda", "Outside"),
        ("/proc/self/mem", "Outside"),
        ("missing", "Unreadable"),
        ("dangling", "Unreadable"),
        ("circle", "Unreadable"),
        ("fifo", "NotRegular"),
        (".", "NotRegular"),
        ("cut", "HeaderInvalid"),
        ("text", "HeaderInvalid"),
        ("top", "Loop"),
        ("./same", "Loop"),
    ],
)
def test_backing_names(directory: Path, backing: str, kind: str) -> None:
    for name, target in {"link_out": "../outside", "directory_out": "..", "dangling": "missing", "same": "top"}.items():
        (directory / name).symlink_to(target)
    (directory / "circle").symlink_to("circle")
    os.mkfifo(directory / "fifo")
    (directory / "cut").write_bytes((directory / "base").read_bytes()[:90])
    (directory / "text").write_text("text")
    assert problem(overlay(directory / "top", backing), "qcow2") == kind


def test_links_inside_are_followed_and_more_directories_can_be_allowed(directory: Path) -> None:
    (directory / "link").symlink_to("base")
    assert problem(overlay(directory / "top", "link")) is None
    other = overlay(directory / "other", "../outside")
    assert problem(other) == "Outside"
    assert problem(other, None, directory, directory.parent) is None
    assert problem(other, None, directory.parent / "vm") == "Outside"  # no part of a name


def test_a_link_in_place_of_the_image(directory: Path) -> None:
    (directory / "image").symlink_to("../outside")
    assert problem(directory / "image") == "Outside"
    assert problem(directory / "image", None, directory.parent) is None


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_no_files(directory: Path, kind: str) -> None:
    path = directory / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path = Path("/dev/null")
    assert problem(path, "raw") == "NotRegular"


def test_formats(directory: Path) -> None:
    raw = directory / "raw"
    raw.write_bytes(bytes(MIB))
    assert problem(raw, "raw") is None
    assert problem(raw) == "FormatUnknown"
    assert problem(raw, "qcow2") == "HeaderInvalid"
    assert problem(overlay(directory / "on_raw", "raw", "raw")) is None
    assert problem(overlay(directory / "on_vmdk", "raw", "vmdk")) == "FormatRefused"
    # What a guest writes into its raw disk is never taken for a header.
    evil = overlay(directory / "evil", "/etc/shadow")
    assert problem(overlay(directory / "top", "evil", "raw")) is None
    assert problem(evil, "raw") is None


def without_backing_format(path: Path) -> Path:
    """Turn the extension that names it into one that nobody knows."""
    data = bytearray(path.read_bytes())
    position = data.index(struct.pack(">I", 0xE2792ACA))
    data[position : position + 4] = b"\x11\x22\x33\x44"
    path.write_bytes(data)
    return path


def test_no_backing_format(directory: Path) -> None:
    assert problem(without_backing_format(overlay(directory / "top", "base"))) is None
    (directory / "raw").write_bytes(bytes(MIB))
    assert problem(without_backing_format(overlay(directory / "on_raw", "raw"))) == "FormatUnknown"


def test_limits(directory: Path) -> None:
    assert problem(overlay(directory / "huge", "base", size="65T")) == "TooLarge"
    assert problem(overlay(directory / "huge2", "huge"), max_virtual_size=66 << 40) is None
    path = directory / "base"
    for number in range(5):
        path = overlay(directory / str(number), path.name)
    assert problem(path, max_depth=6) is None
    assert problem(path, max_depth=5) == "TooDeep"


@pytest.mark.parametrize(
    ("name", "kind"), [("{directory}/data", None), ("{directory}/../data", "DataFile"), ("fifo", "DataFile")]
)
def test_external_data_files(directory: Path, name: str, kind: str | None) -> None:
    data, image = name.format(directory=directory), directory / "image"
    os.mkfifo(directory / "fifo")
    if name == "fifo":  # the option lets qemu-img write to it, so the name is put in afterwards
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={directory}/data", image, "1M")
        image.write_bytes(image.read_bytes().replace(b"/data", b"/fifo", 1))
    else:
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", image, "1M")
    assert problem(image) == kind


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a", False), ("/a:b", False), ("./a:b", False), ("d/a:b", False), ("a:b", True), ("nbd:x", True),
        ("json:{}", True), (":", True), ("", False),
    ],
)  # fmt: skip
def test_protocols_as_qemu_sees_them(name: str, expected: bool) -> None:
    assert has_protocol(name) == expected


def test_any_header_gives_an_answer(directory: Path) -> None:
    """Damaged bytes end in a chain or a problem, never in an exception."""
    good = overlay(directory / "top", "base").read_bytes()[:65536]
    kinds: set[t.Any] = set()
    for position in range(200):
        for value in (0, 1, 0x7F, 0xFF):
            data = bytearray(good)
            data[position] = value
            (directory / "damaged").write_bytes(data)
            kinds.add(problem(directory / "damaged", "qcow2"))
    assert {None, "HeaderInvalid", "Unreadable"} <= kinds
