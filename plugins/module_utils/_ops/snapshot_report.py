# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What qmp_snapshot answers about one VM: one shape for all kinds and states, as documented in its RETURN."""

from __future__ import annotations

import typing as t

from .._block.graph import Drive
from .snapshot_options import Scene

Chains = dict[str, list[str]]


def drive_result(
    drive: Drive,
    image: str,
    *,
    overlay: str | None = None,
    node: str | None = None,
    merge: str | None = None,
    bytes_: int | None = None,
    bitmaps: t.Sequence[str] = (),
) -> dict[str, t.Any]:
    """One element of ``drives``."""
    return {
        "name": drive.name,
        "image": image,
        "overlay": overlay,
        "node": node or drive.active.node,
        "merge": merge,
        "bytes": bytes_,
        "bitmaps": list(bitmaps),
    }


def vm_result(
    scene: Scene, kind: str | None, status: str, drives: t.Sequence[dict[str, t.Any]] = (), **known: t.Any
) -> dict[str, t.Any]:
    """The result of one VM; ``known`` replaces the values that stand for "nothing of the kind happened"."""
    result: dict[str, t.Any] = {
        "name": scene.vm.name,
        "snapshot": scene.options.name,
        "type": kind,
        "status": status,
        "drives": list(drives),
        "skipped": [],
        "consistency": None,
        "point": None,
        "freeze_ms": None,
        "transaction_ms": None,
        "group_spread_ms": None,
        "recovered": [],
        "deleted": [],
        "kept": [],
        "boot_drift": [],
        "definition": [],
        "commands": [command.to_result() for command in scene.session.sent],
    }
    return {**result, **known}


def chains(drives: t.Iterable[Drive]) -> Chains:
    """For diff mode: the files of each chain, active image first."""
    return {drive.name: [layer.file for layer in drive.layers] for drive in drives}
