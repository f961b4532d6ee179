# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What qmp_block_commit and qmp_block_stream answer about one VM, and the picture of its chains before and after."""

from __future__ import annotations

import dataclasses
import typing as t

from .._block.graph import Drive
from .._image.snapshot_record import PRESENT, SnapshotRecord
from .chain_merges import Merge
from .snapshot_options import Scene
from .snapshot_view import Placed, View

Chains = dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """The chains of the chosen drives, and the records in them, at one moment."""

    drives: tuple[Drive, ...]
    records: dict[str, SnapshotRecord]

    @classmethod
    def of(cls, drives: t.Iterable[Drive], view: View) -> Picture:
        return cls(tuple(drives), {placed.overlay.file: placed.record for placed in view.placed})

    def files(self) -> Chains:
        return {drive.name: [layer.file for layer in drive.layers] for drive in self.drives}

    def text(self) -> Chains:
        """One line for each image, the active one first, with the snapshot that it is."""
        return {drive.name: list(self._lines(drive)) for drive in self.drives}

    def _lines(self, drive: Drive) -> t.Iterator[str]:
        above: SnapshotRecord | None = None
        for number, layer in enumerate(drive.layers):
            notes = ["active"] if number == 0 else []
            notes += [f"snapshot {above.name}"] if above is not None else []
            yield layer.file + (f" ({', '.join(notes)})" if notes else "")
            above = self.records.get(layer.file)

    def view(self, directories: tuple[str, ...]) -> View:
        placed = (
            Placed(drive, index, self.records[layer.file])
            for drive in self.drives
            for index, layer in enumerate(drive.layers[:-1])
            if layer.file in self.records
        )
        return View(tuple(placed), (), directories)

    def after(self, merge: Merge) -> Picture:
        """The same when the merge has been done."""
        gone = {layer.node for layer in merge.dropped}
        drives = tuple(
            dataclasses.replace(drive, layers=tuple(layer for layer in drive.layers if layer.node not in gone))
            if drive.name == merge.drive.name
            else drive
            for drive in self.drives
        )
        dropped = {layer.file for layer in merge.dropped}
        records = {file: record for file, record in self.records.items() if file not in dropped}
        if merge.how == "stream" and records.pop(merge.target.file, None) is not None:
            lowest = self.records.get(merge.dropped[-1].file)
            if lowest is not None:
                record = dataclasses.replace(lowest, overlay=merge.target.file, state=PRESENT)
                records[merge.target.file] = record
        return Picture(drives, records)


def drive_results(before: Picture, after: Picture, merges: t.Iterable[Merge]) -> list[dict[str, t.Any]]:
    """One element for each drive, also for those where nothing was to be done."""
    done = list(merges)
    old, new = before.files(), after.files()
    return [
        {
            "name": name,
            "before": old[name],
            "after": new.get(name, []),
            "bytes": sum(merge.data for merge in done if merge.drive.name == name),
            "steps": [merge.to_result() for merge in done if merge.drive.name == name],
        }
        for name in old
    ]


def vm_result(scene: Scene, drives: list[dict[str, t.Any]], **known: t.Any) -> dict[str, t.Any]:
    """The result of one VM; ``known`` replaces the values that stand for "nothing of the kind happened"."""
    result: dict[str, t.Any] = {
        "name": scene.vm.name,
        "status": "merged" if any(drive["steps"] for drive in drives) else "unchanged",
        "drives": drives,
        "skipped": [],
        "recovered": [],
        "deleted": [],
        "kept": [],
        "boot_drift": [],
        "definition": [],
        "commands": [command.to_result() for command in scene.session.sent],
    }
    return {**result, **known}
