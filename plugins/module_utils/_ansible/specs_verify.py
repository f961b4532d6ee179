# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Argument spec of backup_verify, and from its parameters to what the operation takes."""

from __future__ import annotations

import os
import re
import typing as t

from .._errors import InputInvalid
from .._ops.verify_command import INTERFACES, Machine, check_machine
from .._ops.verify_types import Drill, VerifyRequest
from .._repository.names import parse_age
from .backup import VERSION
from .specs_repository import repository_options

_CHECKS = ["checksums", "images", "drill"]
_LONGEST = 107 - len("/.blockops-drill-00000000/agent")  # of a UNIX socket's path, in bytes


def verify_spec() -> dict[str, t.Any]:
    """Keyword arguments of AnsibleModule for ``backup_verify``."""
    drill = {
        "qemu": {"type": "str", "default": "qemu-system-x86_64"},
        "machine": {"type": "str", "default": "q35"},
        "accel": {"type": "str", "default": "kvm:tcg"},
        "cpu": {"type": "str"},
        "cpus": {"type": "int", "default": 1},
        "memory": {"type": "bytes", "default": "1G"},
        "interface": {"type": "str", "choices": list(INTERFACES), "default": "virtio-blk"},
        "arguments": {"type": "list", "elements": "str", "default": []},
        "command": {"type": "list", "elements": "str", "default": []},
        "agent": {"type": "bool"},
        "console": {"type": "str"},
        "check": {"type": "list", "elements": "str", "default": []},
        "timeout": {"type": "float", "default": 300.0},
    }
    return {
        "argument_spec": {
            **repository_options(),
            "vm": {"type": "list", "elements": "str", "default": []},
            "point": {"type": "str", "default": "latest"},
            "checks": {
                "type": "list", "elements": "str", "choices": _CHECKS, "default": ["checksums", "images"],
            },
            "drill": {"type": "dict", "options": drill},
            "work_directory": {"type": "path", "default": "/var/tmp"},
            "max_age": {"type": "str"},
            "record": {"type": "bool", "default": True},
            "max_parallel": {"type": "int", "default": 2},
        },
        "supports_check_mode": True,
    }  # fmt: skip


def verify_request(params: t.Mapping[str, t.Any]) -> VerifyRequest:
    """:raise InputInvalid: options that cannot be meant."""
    if params["max_parallel"] < 1:
        raise InputInvalid(message=f"max_parallel must be at least 1, not {params['max_parallel']}.")
    if "drill" in params["checks"]:
        _check_directory(params["work_directory"])
    age = params["max_age"]
    return VerifyRequest(
        repository=params["repository"],
        vms=tuple(params["vm"]),
        point=params["point"],
        checks=tuple(name for name in _CHECKS if name in params["checks"]),
        drill=_drill(params["drill"] or {}, params["work_directory"]),
        max_age=None if age is None else parse_age(age),
        record=params["record"],
        max_parallel=params["max_parallel"],
        collection=VERSION,
    )


def _check_directory(path: str) -> None:
    if not os.path.isabs(path) or "," in path or "\n" in path:
        raise InputInvalid(message=f"work_directory must be an absolute path without commas, not {path!r}.")
    if len(os.fsencode(path)) > _LONGEST:
        raise InputInvalid(message=f"work_directory may have {_LONGEST} bytes, because of the sockets in it: {path!r}.")


def _drill(given: t.Mapping[str, t.Any], directory: str) -> Drill:
    """Options that were left out have the defaults of the spec, of which ``drill`` itself left out knows nothing."""
    if not given:
        return Drill(work_directory=directory)
    machine = Machine(
        **{key: given[key] for key in ("qemu", "machine", "accel", "cpu", "cpus", "memory", "interface")},
        arguments=tuple(given["arguments"]),
        command=tuple(given["command"]),
    )
    check_machine(machine)
    agent = given["agent"]
    if agent is None:
        agent = not (given["console"] or given["check"])
    if not (agent or given["console"] or given["check"]):
        raise InputInvalid(message="drill.agent=false needs console or check: nothing would be proved otherwise.")
    if given["timeout"] <= 0 or given["cpus"] < 1 or given["memory"] < 1 << 20:
        raise InputInvalid(message="drill: timeout and cpus must be greater than 0, memory at least 1M.")
    check = tuple(given["check"])
    return Drill(machine, agent, _pattern(given["console"]), check, given["timeout"], directory)


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(text, re.MULTILINE) if text else None
    except re.error as exc:
        raise InputInvalid(message=f"drill.console is not a regular expression: {exc}.") from exc
