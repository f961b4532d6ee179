# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Argument spec of qmp_snapshot, and from its parameters to the options of the operation."""

from __future__ import annotations

import typing as t

from .._ops.snapshot_options import SnapshotOptions
from .specs import vms_spec

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

_LISTS = ("drives", "exclude_drives", "definition")
_COPIED = (
    "name", "state", "type", "overlay_directory", "overlay_name", "quiesce", "freeze_timeout", "group", "merge",
    "bandwidth", "allow_reset", "discarded", "timeout", "job_timeout",
)  # fmt: skip


def snapshot_spec() -> dict[str, t.Any]:
    spec = vms_spec()
    spec["vms"]["required"] = True
    spec.update(
        name={"type": "str"},
        state={"type": "str", "choices": ["present", "absent", "reverted", "recovered"], "default": "present"},
        type={"type": "str", "choices": ["external", "internal", "memory"]},
        drives={"type": "list", "elements": "str"},
        exclude_drives={"type": "list", "elements": "str"},
        overlay_directory={"type": "path"},
        overlay_name={"type": "str", "default": "{vm}-{drive}.{name}.qcow2"},
        quiesce={"type": "str", "choices": ["required", "try", "off"], "default": "try"},
        freeze_timeout={"type": "float", "default": 10.0},
        group={"type": "bool", "default": False},
        merge={"type": "str", "choices": ["auto", "commit", "stream"], "default": "auto"},
        bandwidth={"type": "int"},
        allow_reset={"type": "bool", "default": False},
        discarded={"type": "str", "choices": ["keep", "delete"], "default": "keep"},
        definition={"type": "list", "elements": "path"},
        job_timeout={"type": "float"},
    )
    return spec


def snapshot_options(module: AnsibleModule) -> SnapshotOptions:
    params = module.params
    options: dict[str, t.Any] = {key: params[key] for key in _COPIED}
    options.update({key: tuple(params[key] or ()) for key in _LISTS})
    options["name"] = params["name"] or ""
    return SnapshotOptions(check_mode=module.check_mode, **options)
