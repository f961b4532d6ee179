# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What a change of active images means for the next cold start: the drift, and the definition files that mend it."""

from __future__ import annotations

import asyncio
import dataclasses
import typing as t
from dataclasses import dataclass, field

from .._block.graph import Drive
from .cold_boot import (
    DefinitionChange,
    Move,
    Startup,
    drifts,
    origin,
    plan_definitions,
    read_startup,
    undo_definition,
    write_definition,
)
from .snapshot_options import Scene

# A drive's name, and the file and format of the image that is (or is to be) its active one.
Actives = t.Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class BootFiles:
    """How the QEMU of a scene was started; ``startup`` is ``None`` when that cannot be told, for ``reason``."""

    scene: Scene
    startup: Startup | None
    reason: str | None

    def moves(self, actives: Actives) -> tuple[Move, ...]:
        """For each drive, from every file its definition may still name to the one it is to name.

        ``actives``: the drives that change; the others are to name what they run on.
        """
        return tuple(
            move for drive in self.scene.vm.drives if not drive.empty for move in self._moves_of(drive, actives)
        )

    def _moves_of(self, drive: Drive, actives: Actives) -> t.Iterator[Move]:
        new, new_format = actives.get(drive.name, (drive.active.file, drive.active.driver))
        started = origin(self.startup, drive) if self.startup is not None else None
        files = [layer.file for layer in drive.layers]
        # What lies below the image it was started with is the definition's own business.
        depth = files.index(started.file) + 1 if started is not None and started.file in files else 1
        olds = {layer.file: Move(drive.name, (layer.file,), new, layer.driver, new_format) for layer in drive.layers}
        known = dict(list(olds.items())[:depth])
        known.update(
            {
                path: Move(drive.name, (path,), new, "qcow2", new_format)
                for name, path in self.scene.stale
                if name == drive.name
            }
        )
        if started is not None and not started.temporary:
            fmt = started.format or (known[started.file].old_format if started.file in known else drive.active.driver)
            spellings = (started.file, started.spelled)
            known[started.file] = Move(drive.name, spellings, new, fmt, new_format, started.explicit_backing)
        yield from (move for file, move in known.items() if file != new)

    def drift(self, actives: Actives) -> list[dict[str, str]] | None:
        """Drives that a cold start as of this QEMU's command line would give another image than they (will) run on."""
        if self.startup is None:
            return None
        drives = (_running_on(drive, actives.get(drive.name)) for drive in self.scene.vm.drives)
        return [drift.to_result() for drift in drifts(self.startup, drives)]

    def plan(self, moves: t.Sequence[Move]) -> Rewriting:
        """:raise DefinitionUnsafe: a file names an image in a way that cannot be changed for sure."""
        changes = plan_definitions(self.scene.definition, moves)
        untouched = (change.path for change in changes if change.untouched and moves)
        warnings = tuple(f"{path} in definition names no image of the VM." for path in untouched)
        return Rewriting(changes, warnings, mended=self.scene.mended)

    def warnings(self, actives: Actives, rewriting: Rewriting) -> t.Iterator[str]:
        """Unless every drifting drive's new image is named by a definition file, a cold start is dangerous."""
        if self.startup is None:
            yield f"Whether a cold start would find the right images is not known: {self.reason}."
        for gap in self.startup.gaps if self.startup is not None else ():
            yield f"How a cold start would find its images is known in part only: {gap}."
        stale = [drift for drift in self.drift(actives) or () if not rewriting.speaks_of(drift["drive"])]
        if stale:
            drives = "; ".join(f"{drift['drive']} with {drift['old']}, and runs on {drift['new']}" for drift in stale)
            yield (
                f"COLD START: QEMU was started with other images than the VM runs on: {drives}. Started from the old "
                "ones, the guest would lose what it wrote since, and the images would no longer fit together. Change "
                "how the VM is started (option definition does it)."
            )


@dataclass
class Rewriting:
    """The definition files to rewrite, and those already rewritten with the copy of what they were.

    ``mended``: those that cleaning up after a killed run has rewritten already, as ``result`` tells of them.
    """

    changes: t.Sequence[DefinitionChange]
    warnings: tuple[str, ...] = ()
    written: list[tuple[DefinitionChange, str | None]] = field(default_factory=list)
    mended: t.Sequence[dict[str, t.Any]] = ()

    @property
    def needed(self) -> bool:
        return any(change.changed for change in self.changes)

    def write(self) -> None:
        for change in self.changes:
            if change.changed:
                self.written.append((change, write_definition(change)))

    def undo(self) -> None:
        while self.written:
            undo_definition(*self.written.pop())

    def speaks_of(self, drive: str) -> bool:
        """Whether one of the files names the drive's image, and so the right one once it is rewritten."""
        return any(drive in change.drives for change in self.changes)

    def result(self, check_mode: bool) -> list[dict[str, t.Any]]:
        if check_mode:
            done = [{"path": change.path, "backup": None} for change in self.changes if change.changed]
        else:
            done = [{"path": change.path, "backup": backup} for change, backup in self.written]
        known = {entry["path"] for entry in self.mended}
        return [*self.mended, *(entry for entry in done if entry["path"] not in known)]

    def diff(self, before: t.Any, after: t.Any) -> tuple[dict[str, t.Any], dict[str, t.Any]]:
        """The chains, and the definition files, before and after."""
        texts = {change.path: change.texts() for change in self.changes if change.changed}
        old = {"definition": {path: text[0] for path, text in texts.items()}} if texts else {}
        new = {"definition": {path: text[1] for path, text in texts.items()}} if texts else {}
        return {"chains": before, **old}, {"chains": after, **new}


def _running_on(drive: Drive, active: tuple[str, str] | None) -> Drive:
    """The drive as it will be, with another active image."""
    if active is None or drive.empty or drive.active.file == active[0]:
        return drive
    top = dataclasses.replace(drive.active, file=active[0], driver=active[1])
    return dataclasses.replace(drive, layers=(top, *drive.layers))


async def look(scene: Scene) -> BootFiles:
    startup, reason = await asyncio.to_thread(read_startup, scene.session.process)
    return BootFiles(scene, startup, reason)
