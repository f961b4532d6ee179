# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Argument specs of qmp_block_commit and qmp_block_stream, and from their parameters to the options."""

from __future__ import annotations

import typing as t

from .._ops.chain_options import ChainOptions
from .._repository.names import parse_age
from .specs import vms_spec

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

_COPIED = ("top", "base", "on_error", "delete", "bandwidth", "timeout", "job_timeout")
_LISTS = ("drives", "exclude_drives", "definition")


def _shared() -> dict[str, t.Any]:
    spec = vms_spec()
    spec["vms"]["required"] = True
    spec.update(
        drives={"type": "list", "elements": "str"},
        exclude_drives={"type": "list", "elements": "str"},
        top={"type": "str"},
        base={"type": "str"},
        delete={"type": "bool", "default": False},
        on_error={"type": "str", "choices": ["report", "stop", "ignore", "enospc"], "default": "report"},
        bandwidth={"type": "int"},
        definition={"type": "list", "elements": "path"},
        job_timeout={"type": "float"},
    )
    return spec


def commit_spec() -> dict[str, t.Any]:
    spec = _shared()
    spec.update(
        max_depth={"type": "int"},
        keep={"type": "list", "elements": "str"},
        older_than={"type": "str"},
        merge={"type": "str", "choices": ["auto", "commit", "stream"]},
    )
    return spec


def stream_spec() -> dict[str, t.Any]:
    spec = _shared()
    spec.update(bottom={"type": "str"})
    return spec


def commit_options(module: AnsibleModule) -> ChainOptions:
    """A range is committed, as the module's name says; how a state is reached is for the planner to choose.

    :raise InputInvalid: for what the spec cannot check.
    """
    params = module.params
    desired = any(params[name] is not None for name in ("max_depth", "keep", "older_than"))
    keep, age = params["keep"], params["older_than"]
    return ChainOptions(
        how=params["merge"] or ("auto" if desired else "commit"),
        max_depth=params["max_depth"],
        keep=None if keep is None else tuple(keep),
        older_than=None if age is None else parse_age(age),
        **_copied(module),
    )


def stream_options(module: AnsibleModule) -> ChainOptions:
    return ChainOptions(how="stream", bottom=module.params["bottom"], streams=True, **_copied(module))


def _copied(module: AnsibleModule) -> dict[str, t.Any]:
    copied: dict[str, t.Any] = {key: module.params[key] for key in _COPIED}
    copied.update({key: tuple(module.params[key] or ()) for key in _LISTS})
    copied["check_mode"] = module.check_mode
    return copied
