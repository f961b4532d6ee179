# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Argument spec of qmp_block_rebase, and from its parameters to the options."""

from __future__ import annotations

import typing as t

from .._ops.block_rebase_types import TrimOptions
from .specs import vms_spec

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


def block_rebase_spec() -> dict[str, t.Any]:
    spec = vms_spec()
    spec["vms"]["required"] = True
    spec.update(
        image={"type": "str"},
        min_gain={"type": "int", "default": 1048576},
        delete={"type": "bool", "default": True},
        drives={"type": "list", "elements": "str"},
        exclude_drives={"type": "list", "elements": "str"},
    )
    return spec


def block_rebase_options(module: AnsibleModule) -> TrimOptions:
    params = module.params
    return TrimOptions(
        drives=tuple(params["drives"] or ()),
        exclude_drives=tuple(params["exclude_drives"] or ()),
        image=params["image"],
        min_gain=params["min_gain"],
        delete=params["delete"],
        timeout=params["timeout"],
        check_mode=module.check_mode,
    )
