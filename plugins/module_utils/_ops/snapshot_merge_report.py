# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What dropping an external snapshot answers: predicted, done, or nothing to do."""

from __future__ import annotations

import typing as t

from .._errors import BlockOpsError
from .._image.snapshot_record import MERGING, PRESENT, STREAMING
from ._outcome import Outcome
from .chain_job import Done, command
from .chain_merges import Merge, actives
from .snapshot_boot import BootFiles, Rewriting
from .snapshot_merge_plan import Drop, chain_options
from .snapshot_options import Scene
from .snapshot_report import Chains, chains, drive_result, vm_result
from .snapshot_view import View


def nothing(scene: Scene, view: View, boot: BootFiles, recovered: list[str]) -> Outcome:
    rewriting = boot.plan(boot.moves({}))
    if not scene.check_mode:
        rewriting.write()
    result = vm_result(scene, None, "absent", recovered=recovered)
    result.update(definition=rewriting.result(scene.check_mode), boot_drift=boot.drift({}))
    result["kept"] = [record.overlay for record in view.loose if record.name == scene.options.name]
    warnings = (*orphans(scene, view), *boot.warnings({}, rewriting))
    changed = bool(recovered) or rewriting.needed
    return Outcome(changed, result, *rewriting.diff({}, {}), warnings=warnings)


def orphans(scene: Scene, view: View) -> t.Iterator[str]:
    """Overlays of this snapshot that are in no chain, though nothing says that they were merged."""
    for record in view.loose:
        if record.name == scene.options.name and record.state in (PRESENT, MERGING, STREAMING):
            yield (
                f"The overlay {record.overlay} of drive {record.drive} is not in use, and nothing says that it was "
                "merged: was the VM started from an old definition? It may hold what the guest wrote; it stays."
            )


def predicted(
    scene: Scene, drops: t.Sequence[Drop], boot: BootFiles, rewriting: Rewriting, before: Chains, recovered: list[str]
) -> Outcome:
    merges = [drop.merge for drop in drops]
    new = [merge for merge in merges if merge.job not in scene.vm.jobs]
    result = vm_result(scene, "external", "removed", [_drive(drop) for drop in drops], recovered=recovered)
    result.update(
        deleted=[file for merge in merges for file in merge.deleted],
        kept=[file for merge in merges for file in merge.kept],
        commands=[command(merge, chain_options(scene.options), merge.drive.root).to_result() for merge in new],
        definition=rewriting.result(True),
        boot_drift=boot.drift(actives(merges)),
    )
    after = {merge.drive.name: _files_after(merge) for merge in merges}
    return Outcome(True, result, *rewriting.diff(before, after), warnings=rewriting.warnings)


def _files_after(merge: Merge) -> list[str]:
    return [layer.file for layer in merge.drive.layers if layer not in merge.dropped]


def failed(scene: Scene, drops: t.Iterable[Drop], done: Done, recovered: list[str], error: BlockOpsError) -> Outcome:
    """The drives that were merged before it are."""
    drives = [_drive(drop) for drop in drops if drop.merge in done.merges]
    result = vm_result(scene, "external", "present", drives, recovered=recovered)
    result.update(deleted=done.deleted, kept=done.kept, definition=done.definition)
    return Outcome(bool(drives or recovered), result, warnings=tuple(done.warnings), error=error)


def report(
    scene: Scene,
    drops: t.Iterable[Drop],
    before: Chains,
    done: Done,
    recovered: list[str],
    boot: BootFiles,
    rewriting: Rewriting,
) -> Outcome:
    result = vm_result(scene, "external", "removed", [_drive(drop) for drop in drops], recovered=recovered)
    result.update(deleted=done.deleted, kept=done.kept, definition=done.definition, boot_drift=boot.drift({}))
    after = chains(drive for drive in scene.vm.drives if drive.name in before)
    warnings = (*done.warnings, *rewriting.warnings, *boot.warnings({}, rewriting))
    return Outcome(True, result, *rewriting.diff(before, after), warnings=warnings)


def _drive(drop: Drop) -> dict[str, t.Any]:
    placed, merge = drop.placed, drop.merge
    node = merge.target.node if merge.active_commit else placed.drive.active.node
    files = {"image": placed.image.file, "overlay": placed.overlay.file}
    return drive_result(placed.drive, node=node, merge=merge.how, bytes_=merge.data, **files)
