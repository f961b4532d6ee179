# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Argument specs of the modules that work on a repository, and their translation into what the operations take."""

from __future__ import annotations

import grp
import pwd
import re
import typing as t

from .._errors import InputInvalid
from .._image.qemu_img import Image
from .._ops.catalogue import Query
from .._ops.restore_types import DriveRequest, Request
from .._repository.place import Owner

Spec = dict[str, t.Any]
Params = t.Mapping[str, t.Any]

_MODE = re.compile(r"0?[0-7]{3}")


def repository_options() -> Spec:
    """The options of the doc fragment ``_repository``."""
    return {"repository": {"type": "path", "required": True}}


def info_spec() -> Spec:
    """Keyword arguments of AnsibleModule for ``backup_info``."""
    return {
        "argument_spec": {
            **repository_options(),
            "vm": {"type": "list", "elements": "str", "default": []},
            "point": {"type": "str"},
            "drives": {"type": "list", "elements": "str", "default": []},
        },
        "supports_check_mode": True,
    }


def info_query(params: Params) -> Query:
    return Query(params["repository"], tuple(params["vm"]), params["point"], tuple(params["drives"]))


def restore_spec() -> Spec:
    """Keyword arguments of AnsibleModule for ``backup_restore``."""
    drive = {
        "name": {"type": "str", "required": True},
        "dest": {"type": "path", "required": True},
        "format": {"type": "str", "choices": ["qcow2", "raw"]},
        "base": {"type": "path"},
        "base_format": {"type": "str", "choices": ["qcow2", "raw"], "default": "qcow2"},
    }
    return {
        "argument_spec": {
            **repository_options(),
            "vm": {"type": "str", "required": True},
            "point": {"type": "str", "default": "latest"},
            "dest": {"type": "path"},
            "drives": {"type": "list", "elements": "dict", "options": drive, "default": []},
            "format": {"type": "str", "choices": ["qcow2", "raw"], "default": "qcow2"},
            "mode": {"type": "str", "choices": ["full", "instant"], "default": "full"},
            "verify": {"type": "bool", "default": True},
            "preallocation": {"type": "str", "choices": ["off", "metadata", "falloc", "full"], "default": "off"},
            "owner": {"type": "str"},
            "group": {"type": "str"},
            "file_mode": {"type": "str", "default": "0600"},
            "definition": {"type": "str", "choices": ["none", "directory", "original"], "default": "none"},
            "definition_dest": {"type": "path"},
            "overwrite_definition": {"type": "bool", "default": False},
        },
        "mutually_exclusive": [("dest", "drives")],
        "required_if": [("definition", "directory", ("definition_dest",))],
        "supports_check_mode": True,
    }


def restore_request(params: Params) -> Request:
    """:raise InputInvalid: options that cannot be meant together, an unknown user or group, no mode."""
    instant = params["mode"] == "instant"
    drives = tuple(_drive(entry, params["format"]) for entry in params["drives"])
    formats = {drive.format for drive in drives} or {params["format"]}
    if len({drive.name for drive in drives}) != len(drives):
        raise InputInvalid(message="drives names the same drive twice.")
    if instant and formats != {"qcow2"}:
        raise InputInvalid(message="mode=instant makes overlays, which are always qcow2.")
    if instant and params["preallocation"] != "off":
        raise InputInvalid(message="preallocation makes no sense with mode=instant.")
    if params["preallocation"] == "metadata" and "raw" in formats:
        raise InputInvalid(message="preallocation=metadata is for qcow2; raw files have no metadata.")
    return Request(
        repository=params["repository"],
        vm=params["vm"],
        point=params["point"],
        drives=drives,
        dest=params["dest"],
        format=params["format"],
        instant=instant,
        verify=params["verify"],
        preallocation=params["preallocation"],
        owner=owner_of(params["owner"], params["group"], params["file_mode"]),
        definition=params["definition"],
        definition_dest=params["definition_dest"],
        overwrite_definition=params["overwrite_definition"],
    )


def _drive(entry: Params, default_format: str) -> DriveRequest:
    base = Image(entry["base"], entry["base_format"]) if entry["base"] else None
    return DriveRequest(entry["name"], entry["dest"], entry["format"] or default_format, base)


def owner_of(owner: str | None, group: str | None, mode: str) -> Owner:
    """Names or numbers, and an octal mode, as numbers.

    :raise InputInvalid: this host does not know them.
    """
    if _MODE.fullmatch(mode) is None:
        raise InputInvalid(message=f"{mode!r} is not an octal mode; write it quoted, as '0640'.")
    try:
        uid = None if owner is None else int(owner) if owner.isdigit() else pwd.getpwnam(owner).pw_uid
        gid = None if group is None else int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError as exc:
        raise InputInvalid(message=f"No such user or group on this host: {exc.args[0]}.") from exc
    return Owner(uid, gid, int(mode, 8))
