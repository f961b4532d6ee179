# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""How an external snapshot is dropped: as a merge of its overlay with the image below, in a direction of its choice."""

from __future__ import annotations

import dataclasses
import typing as t
from dataclasses import dataclass

from .._block.chain_plan import COMMIT, STREAM
from .._image.snapshot_record import MERGING, STREAMING
from .chain_merges import Merge, Needs, adopted, open_jobs, plan_merges, record_of, require_space
from .chain_options import ChainImageNeeded, ChainOptions
from .snapshot_options import Scene, SnapshotOptions
from .snapshot_view import Placed, View


@dataclass(frozen=True)
class Drop:
    """Dropping the snapshot of one drive. (Were there overlays of one name by somebody's hand: the lowest.)"""

    placed: Placed
    merge: Merge


def chain_options(options: SnapshotOptions) -> ChainOptions:
    """What the parts that merge images need to know. An overlay that nothing needs any more always goes."""
    return ChainOptions(
        how=options.merge,
        delete=True,
        bandwidth=options.bandwidth,
        definition=options.definition,
        timeout=options.timeout,
        job_timeout=options.job_timeout,
        check_mode=options.check_mode,
    )


def plan_drops(scene: Scene, view: View, targets: t.Sequence[Placed]) -> list[Drop]:
    """One merge for each drive; a job that a killed run has started is gone on with. Reads files.

    :raise ChainImageNeeded: something else is based on what would change or go. :raise NoSpace: before it is tried.
    """
    lowest = {placed.drive.name: placed for placed in targets}
    needs = Needs(scene, view, [placed.drive for placed in lowest.values()])
    drops = []
    for name, placed in lowest.items():
        boundaries = {each.index + 1 for each in targets if each.drive.name == name}
        drops += [Drop(placed, merge) for merge in _merges(scene, placed, boundaries, needs)]
    require_space((drop.merge for drop in drops if drop.merge.job not in scene.vm.jobs), scene.vm.name)
    return drops


def _merges(scene: Scene, placed: Placed, boundaries: set[int], needs: Needs) -> list[Merge]:
    options = chain_options(scene.options)
    begun = adopted(options, placed.drive, open_jobs(scene), needs, placed.index + 1)
    if begun is not None:
        return [begun]
    options = dataclasses.replace(options, how=_how(scene, placed))
    merges = plan_merges(options, scene.vm.name, placed.drive, boundaries, needs)
    for merge in merges:
        _refuse_to_leave(scene, merge, needs)
    return merges


def _how(scene: Scene, placed: Placed) -> str:
    """A commit that was begun has changed the snapshot, so it is finished; a stream only if nothing else is wanted."""
    if placed.record.state == MERGING:
        return COMMIT
    if placed.record.state == STREAMING and scene.options.merge == "auto":
        return STREAM
    return scene.options.merge


def _refuse_to_leave(scene: Scene, merge: Merge, needs: Needs) -> None:
    """An image of ours that is streamed upwards is deleted, so nobody else may need it, nor what is inside it."""
    for layer in merge.dropped:
        if layer.file in merge.doomed or record_of(layer) is None:
            continue
        inside = ", ".join(snapshot.name for snapshot in layer.snapshots)
        reasons = needs.reason(layer) or f"{layer.file} holds internal snapshots ({inside})"
        about = {"vm": scene.vm.name, "drive": merge.drive.name, "images": merge.images, "how": merge.how}
        raise ChainImageNeeded(reasons=reasons, **about)
