# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._block import names

BACKUP = "20261123T054500Z-1f3c9a2e"


def test_names_can_be_read_again() -> None:
    assert names.parse_bitmap(names.bitmap_name("0123abcd", BACKUP)) == names.BitmapName("0123abcd", BACKUP)
    assert names.parse_bitmap(names.bitmap_name("0123abcd", BACKUP, 2)) == names.BitmapName("0123abcd", BACKUP, 2)
    thing = names.object_name("0123abcd", BACKUP, 7, "target")
    assert names.parse_object(thing) == names.ObjectName("0123abcd", "1f3c9a2e", 7, "target")
    assert names.is_ours(thing) and names.run_of(BACKUP) == "1f3c9a2e"


@pytest.mark.parametrize("role", ["target", "file", "create", "job", "tmp"])
def test_node_names_fit_into_qemu(role: str) -> None:
    """QEMU: 'Node name too long' from 32 bytes on."""
    assert len(names.object_name("0123abcd", BACKUP, names.MAX_DRIVES - 1, role)) <= 31


@pytest.mark.parametrize(
    "foreign",
    [
        "", "bo-", "bo-vda", "bitmap0", f"bo-0123abcd-{BACKUP}x", f"xbo-0123abcd-{BACKUP}", f"bo-0123ABCD-{BACKUP}",
        f"bo-0123abcd-{BACKUP}.0", f"bo-0123abcd-{BACKUP}\n", "bo-0123abcd-1f3c9a2e-0-", "bo-0123abcd-1f3c9a2e-100-job",
        "qmpbackup-1f3c9a2e", "#block123", "libvirt-1-format",
    ],
)  # fmt: skip
def test_what_is_not_ours(foreign: str) -> None:
    assert not names.is_ours(foreign)
