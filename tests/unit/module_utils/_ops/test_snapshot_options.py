# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What cannot be meant is refused before anything is looked at."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import InputInvalid
from ansible_collections.blockops.qemu.plugins.module_utils._ops.snapshot_options import SnapshotOptions


@pytest.mark.parametrize("name", ["s", "pre-patch", "2026-11-23", "a" * 63, "v1.2_x"])
def test_names(name: str) -> None:
    assert SnapshotOptions(name=name).checked().name == name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": ""}, "name:"),
        ({"name": "a/b"}, "name:"),
        ({"name": "../x"}, "name:"),
        ({"name": "a b"}, "name:"),
        ({"name": "-x"}, "name:"),
        ({"name": "a\n"}, "name:"),
        ({"name": "a" * 64}, "name:"),
        ({"overlay_name": "{name}.qcow2"}, "lacks {drive}"),
        ({"overlay_name": "../{drive}.qcow2"}, "not a file name"),
        ({"overlay_name": "{drive}{what}"}, "not a file name"),
        ({"overlay_name": "..."}, "not a file name"),
        ({"overlay_directory": "relative"}, "absolute"),
        ({"bandwidth": 0}, "bandwidth"),
        ({"timeout": 0}, "timeout"),
        ({"freeze_timeout": -1}, "freeze_timeout"),
        ({"job_timeout": -1}, "job_timeout"),
    ],
)
def test_what_cannot_be_meant(changes: dict[str, t.Any], says: str) -> None:
    with pytest.raises(InputInvalid, match=says.replace("{", r"\{")):
        SnapshotOptions(**{"name": "s", **changes}).checked()
