# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import InputInvalid
from ansible_collections.blockops.qemu.plugins.module_utils._ops.backup_options import BackupOptions, Ownership, merged


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sync": "top", "level": "full"}, "level=full"),
        ({"sync": "bitmap"}, "needs bitmap"),
        ({"sync": "incremental"}, "needs bitmap"),
        ({"bitmap": "b"}, "bitmap is for"),
        ({"sync": "top", "bitmap": "b"}, "bitmap is for"),
        ({"sync": "incremental", "bitmap": "b", "bitmap_mode": "never"}, "bitmap_mode"),
        ({"sync": "none"}, "wait=false"),
        ({"bandwidth": 0}, "bandwidth"),
        ({"timeout": 0}, "timeout"),
        ({"freeze_timeout": -1}, "freeze_timeout"),
        ({"job_timeout": -1}, "job_timeout"),
        ({"ownership": Ownership(file_mode=0o600)}, "file_mode"),
    ],
)
def test_contradictions(options: dict[str, t.Any], says: str) -> None:
    with pytest.raises(InputInvalid, match=says):
        BackupOptions("/srv/backup", **options).checked()


@pytest.mark.parametrize(
    "options",
    [
        {}, {"sync": "none", "wait": False}, {"sync": "none", "state": "cancelled"}, {"sync": "full", "level": "copy"},
        {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "never"}, {"job_timeout": 0},
    ],
)  # fmt: skip
def test_what_is_allowed(options: dict[str, t.Any]) -> None:
    made = BackupOptions("/srv/backup", **options)
    assert made.checked() is made


def test_the_vm_goes_before_the_task() -> None:
    assert merged(["a"], ["b"]) == ("a",)
    assert merged([], ["b"]) == ("b",)
