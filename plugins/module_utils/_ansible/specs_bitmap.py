# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Argument spec of qmp_dirty_bitmap, and from its parameters to the options of the operation."""

from __future__ import annotations

import typing as t

from .._ops.dirty_bitmap_plan import BitmapOptions, Source
from .specs import vms_spec

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

_COPIED = ("name", "state", "granularity", "persistent", "ours", "timeout")
_STATES = ["present", "absent", "enabled", "disabled", "cleared", "merged"]


def bitmap_spec() -> dict[str, t.Any]:
    spec = vms_spec()
    spec["vms"]["required"] = True
    source = {"name": {"type": "str", "required": True}, "drive": {"type": "str"}, "node": {"type": "str"}}
    spec.update(
        name={"type": "str", "required": True},
        state={"type": "str", "choices": _STATES, "default": "present"},
        sources={"type": "list", "elements": "dict", "options": source},
        granularity={"type": "int"},
        persistent={"type": "bool"},
        ours={"type": "bool", "default": False},
        drives={"type": "list", "elements": "str"},
        exclude_drives={"type": "list", "elements": "str"},
    )
    return spec


def bitmap_options(module: AnsibleModule) -> BitmapOptions:
    params = module.params
    return BitmapOptions(
        sources=tuple(Source(**source) for source in params["sources"] or ()),
        drives=tuple(params["drives"] or ()),
        exclude_drives=tuple(params["exclude_drives"] or ()),
        check_mode=module.check_mode,
        **{key: params[key] for key in _COPIED},
    )
