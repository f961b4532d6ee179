# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Dropping an external snapshot: its overlay and the image below become one, as in any chain; drive after drive."""

from __future__ import annotations

import asyncio

from .._errors import BlockOpsError
from . import snapshot_boot
from ._outcome import Outcome
from .chain_job import Done, run_merge
from .chain_merges import actives
from .snapshot_merge_plan import chain_options, plan_drops
from .snapshot_merge_report import failed, nothing, orphans, predicted, report
from .snapshot_options import Scene
from .snapshot_recovery import recover
from .snapshot_report import chains
from .snapshot_view import refuse_while_jobs_run


async def absent(scene: Scene) -> Outcome:
    """Merge the snapshot's overlays, wherever they are among the chosen drives."""
    began = scene.vm
    scene, view, recovered = await recover(scene)
    targets = view.of(scene.options.name, scene.entry.drives or scene.options.drives)
    excluded = scene.entry.exclude_drives or scene.options.exclude_drives
    targets = [placed for placed in targets if placed.drive.name not in excluded]
    boot = await snapshot_boot.look(scene)
    if not targets:
        return nothing(scene, view, boot, recovered)
    drops = await asyncio.to_thread(plan_drops, scene, view, targets)
    merges = [drop.merge for drop in drops]
    refuse_while_jobs_run(scene, "dropping a snapshot", {merge.job for merge in merges})
    rewriting = boot.plan(boot.moves(actives(merges)))
    before = chains(began.drive(merge.drive.name) or merge.drive for merge in merges)
    if scene.check_mode:
        return predicted(scene, drops, boot, rewriting, before, recovered)
    done = Done(warnings=list(orphans(scene, view)))
    try:
        for merge in merges:
            scene = await run_merge(scene, chain_options(scene.options), merge, done)
    except BlockOpsError as exc:
        return failed(scene, drops, done, recovered, exc)
    return report(scene, drops, before, done, recovered, await snapshot_boot.look(scene), rewriting)
