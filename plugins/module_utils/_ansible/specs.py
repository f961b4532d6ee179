# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Argument specs shared by modules: one function per doc fragment, kept equal to it by tests/architecture."""

from __future__ import annotations

import typing as t

_IGNORED = (
    "uuid", "status", "running", "qemu_version", "process", "agent", "jobs", "bitmaps", "leftovers", "warnings",
    "boot_drift", "findings", "changed", "error",
)  # fmt: skip


def vms_spec() -> dict[str, t.Any]:
    """Of the fragment ``_vms``. What qmp_vm_info adds to a VM is taken and ignored; anything else is a typing error."""
    options: dict[str, t.Any] = {
        "name": {"type": "str"},
        "socket": {"type": "path"},
        "agent_socket": {"type": "path"},
        "drives": {"type": "list", "elements": "raw"},
        "exclude_drives": {"type": "list", "elements": "str"},
        "definition": {"type": "list", "elements": "path"},
    }
    options.update({key: {"type": "raw"} for key in _IGNORED})
    return {
        "vms": {"type": "list", "elements": "dict", "options": options},
        "max_parallel": {"type": "int", "default": 8},
        "timeout": {"type": "float", "default": 30.0},
    }


def ownership_spec() -> dict[str, t.Any]:
    """Of the fragment ``_ownership``."""
    return {
        "owner": {"type": "str"},
        "group": {"type": "str"},
        "file_mode": {"type": "str", "default": "0400"},
        "directory_mode": {"type": "str", "default": "0700"},
    }


def vm_info_spec() -> dict[str, t.Any]:
    """Of qmp_vm_info."""
    spec = vms_spec()
    spec["vms"]["default"] = []
    spec.update(
        sockets={"type": "list", "elements": "str", "default": []},
        probe_agent={"type": "bool", "default": True},
        doctor={"type": "bool", "default": False},
        repository={"type": "path"},
    )
    return spec
