# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""qmp_snapshot, state=recovered: clean up what killed runs have left, and nothing else."""

from __future__ import annotations

import asyncio
import typing as t

from .._qmp.session import Command
from . import snapshot_boot
from ._outcome import Outcome
from .snapshot_options import Scene
from .snapshot_recovery import recover
from .snapshot_recovery_plan import Recovery, plan
from .snapshot_report import vm_result
from .snapshot_view import look


async def recovered(scene: Scene) -> Outcome:
    """What every state does first.

    :raise RevertInterrupted: a snapshot was gone back to by half: only going back to it again finishes that.
    """
    recovery = plan(scene, await asyncio.to_thread(look, scene))
    scene, _view, sentences = await recover(scene)
    boot = await snapshot_boot.look(scene)
    known: dict[str, t.Any] = {
        "snapshot": None,
        "recovered": sentences,
        "deleted": [record.overlay for record in recovery.doomed],
        "boot_drift": boot.drift({}),
    }
    result = vm_result(scene, None, "recovered" if sentences else "unchanged", **known)
    if scene.check_mode:
        result["commands"] = [command.to_result() for command in _commands(recovery)]
    warnings = tuple(boot.warnings({}, boot.plan(())))
    return Outcome(bool(sentences), result, {"left": sentences}, {"left": []}, warnings=warnings)


def _commands(recovery: Recovery) -> list[Command]:
    return [
        *([Command("cont", {})] if recovery.resume else []),
        *(Command("job-dismiss", {"id": job}) for job in recovery.jobs),
        *(Command("blockdev-del", {"node-name": node}) for node in recovery.nodes),
    ]
