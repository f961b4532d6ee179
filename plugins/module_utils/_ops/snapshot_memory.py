# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Not written yet."""

from __future__ import annotations


async def names(scene):  # type: ignore
    return set()


present = absent = reverted = names
