# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The argument spec of ``backup_prune``, and its translation into what the operation takes."""

from __future__ import annotations

import typing as t
import zoneinfo
from datetime import timezone, tzinfo

from .._errors import InputInvalid
from .._ops.prune_types import Request
from .._repository import retention
from .._repository.names import is_backup_id
from .._repository.retention import Policy
from .specs_repository import Params, Spec, repository_options

_KEEP = tuple(f"keep_{rule}" for rule in retention.RULES)


def prune_spec() -> Spec:
    """Keyword arguments of AnsibleModule for ``backup_prune``."""
    names: dict[str, t.Any] = {"type": "list", "elements": "str", "default": []}
    return {
        "argument_spec": {
            **repository_options(),
            "vms": dict(names),
            **{option: {"type": "int", "default": 0} for option in _KEEP},
            "keep_within": {"type": "str"},
            "keep_tags": dict(names),
            "policy": {"type": "str", "choices": [retention.RESTIC, retention.PROXMOX], "default": retention.RESTIC},
            "timezone": {"type": "str", "default": "UTC"},
            "keep_newest": {"type": "bool", "default": True},
            "protect": dict(names),
            "unprotect": dict(names),
            "merge": {"type": "bool", "default": False},
            "verify": {"type": "bool", "default": True},
            "max_parallel": {"type": "int", "default": 2},
            "lock_timeout": {"type": "float", "default": 30.0},
        },
        "supports_check_mode": True,
    }


def prune_request(params: Params) -> Request:
    """:raise InputInvalid: no rule at all, or values that cannot be meant."""
    policy = _policy(params)
    marks = (*params["protect"], *params["unprotect"])
    if policy.empty and not marks:
        raise InputInvalid(
            message="No rule says what to keep: give one of keep_last, keep_hourly, keep_daily, keep_weekly, "
            "keep_monthly, keep_yearly, keep_within or keep_tags. Without one, nothing is ever removed."
        )
    wrong = [name for name in marks if not is_backup_id(name)]
    if wrong or len(set(marks)) != len(marks):
        raise InputInvalid(message=f"protect and unprotect take ids of backups, each once: {', '.join(wrong or marks)}")
    if params["max_parallel"] < 1 or params["lock_timeout"] < 0:
        raise InputInvalid(message="max_parallel must be at least 1, and lock_timeout at least 0.")
    if len(set(params["vms"])) != len(params["vms"]):
        raise InputInvalid(message="vms names a VM twice.")
    return Request(
        repository=params["repository"],
        policy=policy,
        vms=tuple(params["vms"]),
        merge=params["merge"],
        keep_newest=params["keep_newest"],
        verify=params["verify"],
        protect=tuple(params["protect"]),
        unprotect=tuple(params["unprotect"]),
        max_parallel=params["max_parallel"],
        lock_timeout=params["lock_timeout"],
    )


def _policy(params: Params) -> Policy:
    counts = {rule: params[f"keep_{rule}"] for rule in retention.RULES}
    if any(count < retention.UNLIMITED for count in counts.values()):
        raise InputInvalid(message="keep_* are numbers from 0; -1 keeps all.")
    within = None if params["keep_within"] is None else retention.parse_duration(params["keep_within"])
    if within is not None and params["policy"] == retention.PROXMOX:
        raise InputInvalid(message="keep_within is a rule of policy=restic; Proxmox has none like it.")
    tags = tuple(frozenset(tag for tag in entry.split(",") if tag) for entry in params["keep_tags"])
    if not all(tags):
        raise InputInvalid(message="keep_tags has an entry without a tag, which would keep everything.")
    return Policy(counts, within, tags, params["policy"], _zone(params["timezone"]))


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return timezone.utc
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as exc:
        raise InputInvalid(
            message=f"This host does not know the time zone {name!r}: write UTC, or a name such as Europe/Berlin "
            "(package tzdata)."
        ) from exc
