# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Drives and layers made up for tests of the planners."""

from __future__ import annotations

import typing as t

from ansible_collections.blockops.qemu.plugins.module_utils._block.graph import Bitmap, Drive, Layer

MIB = 1 << 20


def bitmap(name: str, count: int = MIB, **changes: t.Any) -> Bitmap:
    state: dict[str, t.Any] = {"recording": True, "busy": False, "persistent": True, "inconsistent": False, **changes}
    return Bitmap(name, count, state.pop("granularity", 65536), **state)


def layer(file: str = "/vms/a.qcow2", *bitmaps: Bitmap, **changes: t.Any) -> Layer:
    data: dict[str, t.Any] = {
        "node": f"node of {file}", "driver": "qcow2", "protocol": "file", "file": file, "virtual_size": 64 * MIB,
        "allocated": 10 * MIB, "read_only": False, "backing_file": None, "compat": "1.1", "data_file": None,
        "encrypted": False, "cluster_size": 65536, "bitmaps": bitmaps,
    }  # fmt: skip
    return Layer(**{**data, **changes})


def drive(*layers: Layer, name: str = "vda", removable: bool = False) -> Drive:
    return Drive(name, name, "", removable, (), layers)
