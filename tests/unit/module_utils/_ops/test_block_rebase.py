# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which nodes can be reopened, with which options; and names of copies."""

from __future__ import annotations

import dataclasses
import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._block.graph import Drive
from ansible_collections.blockops.qemu.plugins.module_utils._ops.block_rebase_node import (
    find_holder,
    parse_blockdevs,
    unbroken,
)
from ansible_collections.blockops.qemu.plugins.module_utils._ops.block_rebase_types import name_for
from support.blocks import layer

TOP = {"driver": "qcow2", "node-name": "top"}
BLOCKDEVS: list[tuple[str, dict[str, t.Any] | None]] = [
    ("driver=qcow2,node-name=top,file.driver=file,file.filename=/a", TOP),
    ("qcow2,node-name=top,file=f", TOP),
    ('{"driver": "qcow2", "node-name": "top", "file": "f", "l2-cache-size": 7}', {**TOP, "l2-cache-size": 7}),
    ("driver=qcow2,node-name=top,file=f,cache.direct=on,read-only=off",
     {**TOP, "cache": {"direct": True}, "read-only": False}),
    ("driver=qcow2,node-name=top,file=f,discard=unmap,detect-zeroes=on",
     {**TOP, "discard": "unmap", "detect-zeroes": "on"}),
    # Sizes may say 1M there, and must be a number here: not ours to translate.
    ("driver=qcow2,node-name=top,file=f,l2-cache-size=1M", None),
    ("driver=qcow2,node-name=top,file=f,read-only=perhaps", None),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), BLOCKDEVS)
def test_options_of_the_command_line(value: str, expected: dict[str, t.Any] | None) -> None:
    assert parse_blockdevs(["qemu", "-blockdev", value])["top"] == expected


def drive(*nodes: str, **changes: t.Any) -> Drive:
    layers = tuple(dataclasses.replace(layer(), node=node, file=f"/{node}.qcow2", **changes) for node in nodes)
    return Drive("vda", None, "", False, (), layers)


OURS = "bos-0123abcd-1"
HOLDERS: list[tuple[Drive, dict[str, dict[str, t.Any] | None] | None, str | None]] = [
    (drive(OURS, "s1", "base"), {}, OURS),
    (drive(OURS, "#block1", "s1", "base"), {}, None),  # s1 is asked for below
    (drive("top", "s1", "base"), {"top": TOP}, "top"),
    (drive("top", "s1", "base"), {}, None),
    (drive("top", "s1", "base"), {"top": None}, None),
    (drive("top", "s1", "base"), None, None),
    (drive("#block1", "s1", "base"), {}, None),
    (drive("top", "s1", "base"), {"top": {**TOP, "backing": "s1"}}, None),
    (drive("top", "s1", "base"), {"top": {**TOP, "cache": {"direct": True}}}, None),
    (drive("top", "s1", "base", direct=True), {"top": {**TOP, "cache": {"direct": True}}}, "top"),
    (drive(OURS, "s1", "base"), {OURS: None}, None),
]


@pytest.mark.parametrize(("chain", "nodes", "expected"), HOLDERS)
def test_the_node_to_reopen(
    chain: Drive, nodes: dict[str, dict[str, t.Any] | None] | None, expected: str | None
) -> None:
    if chain.layers[1].node == "#block1":
        found = find_holder(chain, 2, nodes)
        assert isinstance(found, tuple) and found[0].node == OURS
        return
    found = find_holder(chain, 1, nodes)
    assert (found[0].node if isinstance(found, tuple) else None) == expected


def test_options_are_complete() -> None:
    """What a node has is told again, as its default would take its place."""
    found = find_holder(drive(OURS, "s1", "base", direct=True, detect_zeroes="unmap"), 1, {})
    assert isinstance(found, tuple)
    assert found[1] == {
        "driver": "qcow2",
        "node-name": OURS,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "read-only": found[0].read_only,
        "cache": {"direct": True, "no-flush": False},
    }


@pytest.mark.parametrize(
    ("file", "taken", "expected"),
    [
        ("/a/vda.s1.qcow2", (), "/a/vda.s1.trimmed.qcow2"),
        ("/a/vda.s1.qcow2", ("/a/vda.s1.trimmed.qcow2",), "/a/vda.s1.trimmed-2.qcow2"),
        ("/a/vda.s1.trimmed.qcow2", (), "/a/vda.s1.qcow2"),
        ("/a/vda.s1.trimmed.qcow2", ("/a/vda.s1.qcow2",), "/a/vda.s1.trimmed-2.qcow2"),
        ("/a/vda.s1.trimmed-2.qcow2", ("/a/vda.s1.qcow2",), "/a/vda.s1.trimmed.qcow2"),
        ("/a/noextension", (), "/a/noextension.trimmed"),
    ],
)
def test_names(file: str, taken: t.Sequence[str], expected: str) -> None:
    assert name_for(file, lambda path: path not in taken) == expected


def test_a_filter_in_between_shows() -> None:
    chain = drive("a", "b", "c")
    assert unbroken(chain, 0, 2, {"a": ("fa", "b"), "b": ("fb", "c")})
    assert not unbroken(chain, 0, 2, {"a": ("fa", "throttle"), "b": ("fb", "c")})
