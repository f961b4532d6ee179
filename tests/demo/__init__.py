# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""The demo of `make demo`: real VMs, the collection's real playbooks."""

from __future__ import annotations
