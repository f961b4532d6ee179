# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Argument specs of the modules that rebase and commit images, and their translation into what the operations take."""

from __future__ import annotations

import os
import typing as t

from .._errors import InputInvalid
from .._ops.img_commit_types import CommitRequest
from .._ops.img_rebase_types import RebaseRequest
from .specs_image import directories_of

Spec = dict[str, t.Any]
Params = t.Mapping[str, t.Any]

_FORMATS = ["qcow2", "raw"]


def image_rebase_spec() -> Spec:
    """Keyword arguments of AnsibleModule for ``qemu_img_rebase``."""
    return {
        "argument_spec": {
            "path": {"type": "path", "required": True},
            "backing": {"type": "path"},
            "backing_format": {"type": "str", "choices": _FORMATS},
            "relative": {"type": "bool"},
            "unsafe": {"type": "bool", "default": False},
            "proof": {"type": "str", "choices": ["compare"]},
            "acknowledge": {"type": "str", "choices": ["contents_equal"]},
            "trim": {"type": "bool", "default": False},
            "in_place": {"type": "bool", "default": False},
            "backup": {"type": "bool", "default": False},
            "allowed_directories": {"type": "list", "elements": "path", "default": []},
        },
        "supports_check_mode": True,
    }


def image_rebase_request(params: Params, *, check_mode: bool) -> RebaseRequest:
    """:raise InputInvalid: options that cannot be meant together."""
    _refuse_contradictions(params)
    return RebaseRequest(
        path=os.path.abspath(params["path"]),
        backing=params["backing"],
        backing_format=params["backing_format"],
        relative=params["relative"],
        unsafe=params["unsafe"],
        proof=params["proof"],
        acknowledge=params["acknowledge"],
        trim=params["trim"],
        in_place=params["in_place"],
        backup=params["backup"],
        directories=directories_of(params),
        check_mode=check_mode,
    )


def _refuse_contradictions(params: Params) -> None:
    message = None
    if params["backing"] is None and not params["trim"] and params["relative"] is None:
        message = "Give backing (empty for none), trim or relative: otherwise there is nothing to do."
    elif params["unsafe"] and (params["proof"] is None) == (params["acknowledge"] is None):
        message = "unsafe=true needs either proof=compare or acknowledge=contents_equal."
    elif not params["unsafe"] and (params["proof"] or params["acknowledge"]):
        message = "proof and acknowledge are for unsafe=true; without it the content is kept anyway."
    elif params["unsafe"] and params["backing"] is None:
        message = "unsafe=true is for another backing file; give its path as backing."
    elif params["trim"] and (params["unsafe"] or params["in_place"]):
        message = "trim=true builds a new image from what it compares, so neither unsafe nor in_place goes with it."
    elif params["in_place"] and params["backup"]:
        message = "in_place=true leaves no old image that backup=true could keep."
    elif params["backing_format"] and not params["backing"]:
        message = "backing_format is the format of backing, which is not given."
    if message is not None:
        raise InputInvalid(message=message)


def image_commit_spec() -> Spec:
    """Keyword arguments of AnsibleModule for ``qemu_img_commit``."""
    return {
        "argument_spec": {
            "path": {"type": "path", "required": True},
            "base": {"type": "path"},
            "delete": {"type": "bool", "default": False},
            "missing_ok": {"type": "bool", "default": False},
            "allowed_directories": {"type": "list", "elements": "path", "default": []},
        },
        "supports_check_mode": True,
    }


def image_commit_request(params: Params, *, check_mode: bool) -> CommitRequest:
    """:raise InputInvalid: options that cannot be meant together."""
    if params["missing_ok"] and not params["delete"]:
        raise InputInvalid(message="missing_ok=true is for delete=true: without it the image is never missing.")
    return CommitRequest(
        path=os.path.abspath(params["path"]),
        base=params["base"],
        delete=params["delete"],
        missing_ok=params["missing_ok"],
        directories=directories_of(params),
        check_mode=check_mode,
    )
