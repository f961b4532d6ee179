# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What one element of vms means, above all the drives of qmp_vm_info given back to a module."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import InputInvalid
from ansible_collections.blockops.qemu.plugins.module_utils._ops.vm import VmEntry

DISK = {"name": "vda", "backup": {"default": True}}
CDROM = {"name": "cd0", "backup": {"default": False}}


def entry(drives: t.Any) -> VmEntry:
    return VmEntry.from_params({"name": "web", "socket": "/run/web.qmp", "drives": drives})


@pytest.mark.parametrize(
    ("drives", "named", "described"),
    [
        (None, (), ()),
        ([], (), ()),
        (["vda", "cd0"], ("vda", "cd0"), ()),
        ([DISK, CDROM], (), ("vda",)),
        ([DISK, "vdb"], ("vdb",), ("vda",)),
    ],
)
def test_drives(drives: t.Any, named: tuple[str, ...], described: tuple[str, ...]) -> None:
    assert (entry(drives).drives, entry(drives).described) == (named, described)


@pytest.mark.parametrize("drive", [7, {}, {"name": 7}])
def test_what_is_no_drive_is_refused(drive: t.Any) -> None:
    with pytest.raises(InputInvalid, match="neither a name nor a drive"):
        entry([drive])


def test_an_entry_needs_a_socket() -> None:
    with pytest.raises(InputInvalid, match="has no socket"):
        VmEntry.from_params({"name": "web"})
