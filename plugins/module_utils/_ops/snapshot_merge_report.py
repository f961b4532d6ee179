# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What dropping an external snapshot answers: predicted, done, or nothing to do."""

from __future__ import annotations

import dataclasses
import typing as t

from .._image.snapshot_record import MERGING, PRESENT, STREAMING
from ._outcome import Outcome
from .snapshot_boot import BootFiles, Rewriting
from .snapshot_merge_plan import Merge
from .snapshot_options import Scene
from .snapshot_report import Chains, chains, drive_result, vm_result
from .snapshot_view import View


@dataclasses.dataclass
class Done:
    """What has happened so far, also when something fails after it."""

    drives: list[dict[str, t.Any]] = dataclasses.field(default_factory=list)
    deleted: list[str] = dataclasses.field(default_factory=list)
    kept: list[str] = dataclasses.field(default_factory=list)
    definition: list[dict[str, t.Any]] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def sentence(self) -> str:
        names = ", ".join(drive["name"] for drive in self.drives)
        return f" Drives already merged: {names}." if names else ""


def actives(merges: t.Iterable[Merge]) -> dict[str, tuple[str, str]]:
    """Drives whose active image changes, and the file and format it will be."""
    return {
        merge.placed.drive.name: (merge.placed.image.file, merge.placed.image.driver)
        for merge in merges
        if merge.active_commit
    }


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
    scene: Scene, merges: list[Merge], boot: BootFiles, rewriting: Rewriting, before: Chains, recovered: list[str]
) -> Outcome:
    result = vm_result(scene, "external", "removed", [merged_drive(merge) for merge in merges], recovered=recovered)
    result.update(
        deleted=[merge.doomed for merge in merges if merge.doomed is not None],
        kept=[merge.left for merge in merges if merge.left is not None],
        commands=[merge.command.to_result() for merge in merges],
        definition=rewriting.result(True),
        boot_drift=boot.drift(actives(merges)),
    )
    after = {merge.placed.drive.name: _files_after(merge) for merge in merges}
    return Outcome(True, result, *rewriting.diff(before, after), warnings=rewriting.warnings)


def _files_after(merge: Merge) -> list[str]:
    gone = merge.placed.overlay if merge.how == "commit" else merge.placed.image
    return [layer.file for layer in merge.placed.drive.layers if layer is not gone]


def report(
    scene: Scene, before: Chains, done: Done, recovered: list[str], boot: BootFiles, rewriting: Rewriting
) -> Outcome:
    result = vm_result(scene, "external", "removed", done.drives, recovered=recovered)
    result.update(deleted=done.deleted, kept=done.kept, definition=done.definition, boot_drift=boot.drift({}))
    after = chains(drive for drive in scene.vm.drives if drive.name in before)
    warnings = (*done.warnings, *rewriting.warnings, *boot.warnings({}, rewriting))
    return Outcome(True, result, *rewriting.diff(before, after), warnings=warnings)


def merged_drive(merge: Merge) -> dict[str, t.Any]:
    placed = merge.placed
    node = placed.image.node if merge.active_commit else placed.drive.active.node
    return drive_result(
        placed.drive,
        placed.image.file,
        overlay=placed.overlay.file,
        node=node,
        merge=merge.how,
        bytes_=merge.bytes_bound,
    )
