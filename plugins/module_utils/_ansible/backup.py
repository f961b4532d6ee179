# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""From the parameters of qmp_drive_backup to the options of the operation."""

from __future__ import annotations

import grp
import pwd
import typing as t

from .._errors import InputInvalid
from .._ops.backup_options import BackupOptions, Ownership
from .._repository.names import parse_age
from .specs import ownership_spec, vms_spec

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

VERSION = "0.1.0"

_COPIED = (
    "repository", "state", "level", "sync", "bitmap", "bitmap_mode", "compress", "bandwidth", "quiesce",
    "freeze_timeout", "on_lost_bitmap", "verify", "wait", "timeout", "job_timeout",
)  # fmt: skip
_LISTS = ("drives", "exclude_drives", "definition", "tags")


def backup_spec() -> dict[str, t.Any]:
    spec = {**vms_spec(), **ownership_spec()}
    spec["vms"]["required"] = True
    spec.update(
        repository={"type": "path", "required": True},
        state={"type": "str", "choices": ["present", "cancelled", "recovered"], "default": "present"},
        level={"type": "str", "choices": ["auto", "full", "incremental", "differential", "copy"], "default": "auto"},
        max_age={"type": "str"},
        drives={"type": "list", "elements": "str"},
        exclude_drives={"type": "list", "elements": "str"},
        definition={"type": "list", "elements": "path"},
        compress={"type": "bool", "default": False},
        bandwidth={"type": "int"},
        quiesce={"type": "str", "choices": ["required", "try", "off"], "default": "try"},
        freeze_timeout={"type": "float", "default": 10.0},
        on_lost_bitmap={"type": "str", "choices": ["full", "fail"], "default": "full"},
        sync={"type": "str", "choices": ["full", "top", "none", "incremental", "bitmap"]},
        bitmap={"type": "str"},
        bitmap_mode={"type": "str", "choices": ["on-success", "never", "always"]},
        verify={"type": "bool", "default": True},
        wait={"type": "bool", "default": True},
        job_timeout={"type": "float"},
        tags={"type": "list", "elements": "str", "default": []},
    )
    return spec


def backup_options(module: AnsibleModule) -> BackupOptions:
    """Raises InputInvalid for what the spec cannot check."""
    params = module.params
    age = params["max_age"]
    same: dict[str, t.Any] = {key: params[key] for key in _COPIED}
    same.update({key: tuple(params[key] or ()) for key in _LISTS})
    return BackupOptions(
        max_age=None if age is None else parse_age(age),
        ownership=ownership(params),
        check_mode=module.check_mode,
        collection=VERSION,
        **same,
    )


def ownership(params: dict[str, t.Any]) -> Ownership:
    return Ownership(
        uid=None if params["owner"] is None else _id("owner", params["owner"], lambda name: pwd.getpwnam(name).pw_uid),
        gid=None if params["group"] is None else _id("group", params["group"], lambda name: grp.getgrnam(name).gr_gid),
        directory_mode=_mode("directory_mode", params["directory_mode"]),
        file_mode=_mode("file_mode", params["file_mode"]),
    )


def _id(option: str, name: str, look_up: t.Callable[[str], int]) -> int:
    if name.isdigit():
        return int(name)
    try:
        return look_up(name)
    except KeyError as exc:
        raise InputInvalid(message=f"{option}: there is no {name!r} on this host.") from exc


def _mode(option: str, text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise InputInvalid(message=f"{option}: {text!r} is not an octal mode such as '0640'.")
    return mode
