# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Argument specs of the modules for images that no VM has open, and their translation into what the operations take."""

from __future__ import annotations

import os
import typing as t

from .._errors import InputInvalid
from .._ops.img_info import ImageRequest, InfoRequest
from .._ops.img_snapshot_types import APPLIED, SnapshotRequest

Spec = dict[str, t.Any]
Params = t.Mapping[str, t.Any]

_FORMATS = ["qcow2", "raw"]


def image_info_spec() -> Spec:
    """Keyword arguments of AnsibleModule for ``qemu_img_info``."""
    image = {
        "path": {"type": "path", "required": True},
        "format": {"type": "str", "choices": _FORMATS},
    }
    return {
        "argument_spec": {
            "images": {"type": "list", "elements": "dict", "options": image, "required": True},
            "allowed_directories": {"type": "list", "elements": "path", "default": []},
            "max_depth": {"type": "int", "default": 200},
            "max_virtual_size": {"type": "bytes", "default": "64T"},
            "check": {"type": "bool", "default": False},
            "timeout": {"type": "float", "default": 60.0},
        },
        "supports_check_mode": True,
    }


def image_info_request(params: Params) -> InfoRequest:
    """:raise InputInvalid: limits that let nothing through, directories that are not absolute."""
    if params["timeout"] <= 0 or params["max_depth"] < 1 or params["max_virtual_size"] < 1:
        raise InputInvalid(message="timeout, max_depth and max_virtual_size must be greater than 0.")
    return InfoRequest(
        images=tuple(ImageRequest(entry["path"], entry["format"]) for entry in params["images"]),
        directories=directories_of(params),
        max_depth=params["max_depth"],
        max_virtual_size=params["max_virtual_size"],
        check=params["check"],
        timeout=params["timeout"],
    )


def image_snapshot_spec() -> Spec:
    """Keyword arguments of AnsibleModule for ``qemu_img_snapshot``."""
    return {
        "argument_spec": {
            "path": {"type": "path", "required": True},
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent", "applied"], "default": "present"},
            "type": {"type": "str", "choices": ["internal", "external"], "default": "internal"},
            "discarded": {"type": "str", "choices": ["keep", "delete"], "default": "keep"},
            "remove_bitmaps": {"type": "str", "choices": ["ours", "all"], "default": "ours"},
            "allowed_directories": {"type": "list", "elements": "path", "default": []},
        },
        "supports_check_mode": True,
    }


def image_snapshot_request(params: Params, *, check_mode: bool) -> SnapshotRequest:
    """:raise InputInvalid: options that cannot be meant together, a name that QEMU would not take as it is."""
    name = params["name"]
    if not 0 < len(name.encode()) <= 255 or not name.isprintable():
        raise InputInvalid(message="The name of a snapshot has 1 to 255 bytes, all of them printable.")
    if params["type"] == "external" and params["state"] != APPLIED:
        raise InputInvalid(
            message="External snapshots of an image that nobody has open can be applied only. "
            "qmp_snapshot makes and removes them while the VM runs."
        )
    return SnapshotRequest(
        path=os.path.abspath(params["path"]),
        name=name,
        state=params["state"],
        type=params["type"],
        discarded=params["discarded"],
        remove_bitmaps=params["remove_bitmaps"],
        directories=directories_of(params),
        check_mode=check_mode,
    )


def directories_of(params: Params) -> tuple[str, ...]:
    """:raise InputInvalid: not absolute, so it would depend on where Ansible happens to start the module."""
    relative = [path for path in params["allowed_directories"] if not path.startswith("/")]
    if relative:
        raise InputInvalid(message=f"allowed_directories must be absolute: {relative[0]} is not.")
    return tuple(params["allowed_directories"])
