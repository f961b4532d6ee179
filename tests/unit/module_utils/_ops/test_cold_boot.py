# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a drive runs on beside what it was started with, and the moves that follow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._block.graph import Drive
from ansible_collections.blockops.qemu.plugins.module_utils._block.startup import StartupImage
from ansible_collections.blockops.qemu.plugins.module_utils._ops.cold_boot import Drift, Move, Startup, drifts, moves_to
from support.blocks import drive, layer

BASE, RAW, TOP = layer("/vms/base.qcow2"), layer("/vms/base.raw", driver="raw"), layer("/vms/top.qcow2")


def startup(file: str, spelled: str | None = None, fmt: str | None = "qcow2", **more: object) -> Startup:
    image = StartupImage(file, spelled or file, fmt, qdev="vda")
    return Startup(1, (dataclasses.replace(image, **more),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("started", "observed", "expected"),
    [
        (startup("/vms/base.qcow2"), drive(BASE), None),
        (startup("/vms/base.qcow2"), drive(TOP, BASE), ("/vms/base.qcow2", "/vms/top.qcow2", "qcow2", "qcow2")),
        (startup("/vms/top.qcow2"), drive(BASE), ("/vms/top.qcow2", "/vms/base.qcow2", "qcow2", "qcow2")),
        (startup("/vms/base.raw", fmt=None), drive(TOP, RAW), ("/vms/base.raw", "/vms/top.qcow2", None, "qcow2")),
        # Found by its chain: no name fits, and the topmost image that was given counts.
        (startup("/vms/base.raw", qdev=None), drive(TOP, RAW), ("/vms/base.raw", "/vms/top.qcow2", "qcow2", "qcow2")),
        (startup("/vms/top.qcow2", qdev=None), drive(TOP, BASE), None),
        (startup("/vms/other.qcow2", qdev=None), drive(TOP, BASE), None),
        # Not to be told, or not to be kept.
        (startup("/vms/base.qcow2", temporary=True), drive(TOP, BASE), None),
        (startup("/vms/base.qcow2"), drive(TOP, BASE, removable=True), None),
        (startup("/vms/base.qcow2"), drive(), None),
        (startup("nbd://h/x"), drive(layer("nbd://h/x")), None),
        (startup("/vms/base.qcow2"), drive(layer("nbd://h/x")), ("/vms/base.qcow2", "nbd://h/x", "qcow2", "qcow2")),
    ],
)  # fmt: skip
def test_drifts(started: Startup, observed: Drive, expected: tuple[str, str, str | None, str] | None) -> None:
    assert drifts(started, [observed]) == (() if expected is None else (Drift("vda", *expected),))


def test_two_names_of_one_file_are_no_drift(tmp_path: Path) -> None:
    file, link = tmp_path / "a", tmp_path / "link"
    file.touch()
    link.symlink_to(file)
    assert drifts(startup(str(link)), [drive(layer(str(file)))]) == ()


@pytest.mark.parametrize(
    ("started", "observed", "new", "expected"),
    [
        (
            startup("/vms/base.raw", "base.raw", None),
            drive(RAW),
            ("/vms/s1", "qcow2"),
            [Move("vda", ("/vms/base.raw", "base.raw"), "/vms/s1", "raw", "qcow2")],
        ),
        (
            startup("/vms/base.raw", fmt="raw"),
            drive(TOP, RAW),
            ("/vms/s2", "qcow2"),
            [
                Move("vda", ("/vms/base.raw", "/vms/base.raw"), "/vms/s2", "raw", "qcow2"),
                Move("vda", ("/vms/top.qcow2",), "/vms/s2", "qcow2", "qcow2"),
            ],
        ),
        (
            startup("/vms/base.raw", fmt="raw"),
            drive(TOP, RAW),
            ("/vms/base.raw", "raw"),
            [Move("vda", ("/vms/top.qcow2",), "/vms/base.raw", "qcow2", "raw")],
        ),
        (None, drive(TOP), ("/vms/s2", "qcow2"), [Move("vda", ("/vms/top.qcow2",), "/vms/s2", "qcow2", "qcow2")]),
        (
            startup("/vms/base.qcow2", explicit_backing=True),
            drive(BASE),
            ("/vms/s1", "qcow2"),
            [Move("vda", ("/vms/base.qcow2", "/vms/base.qcow2"), "/vms/s1", "qcow2", "qcow2", True)],
        ),
    ],
)
def test_moves(started: Startup | None, observed: Drive, new: tuple[str, str], expected: list[Move]) -> None:
    assert list(moves_to(observed, started, *new)) == expected
