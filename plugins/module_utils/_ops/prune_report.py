# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What pruning answers about one VM: the plan as data, and how much of it was done."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from .._errors import BlockOpsError
from .._repository.manifest import Manifest
from .._repository.names import timestamp
from .._repository.store import VmStore
from .prune_types import MERGE, REMOVE, Found, MergeStep, Plan, Verdict


@dataclass
class Done:
    """Filled while a run goes on; in check mode it stays empty."""

    recovered: list[str] = field(default_factory=list)
    marks: list[tuple[str, bool]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    written: int = 0
    freed: int = 0

    def __bool__(self) -> bool:
        return bool(self.recovered or self.marks or self.orphans or self.removed or self.merged)


class Run(t.Protocol):
    """What is reported about: the run of one VM, wherever it has come to."""

    store: VmStore
    check_mode: bool
    done: Done
    found: Found
    plan: Plan | None
    marks: list[tuple[str, bool]]
    sizes: dict[str, int]
    needed: list[int]


@dataclass(frozen=True)
class Report:
    name: str
    changed: bool
    result: dict[str, t.Any]
    before: t.Any
    after: t.Any
    warnings: tuple[str, ...] = ()
    error: BlockOpsError | None = None


def report(run: Run, error: BlockOpsError | None) -> Report:
    """The result of one VM. Without an error it is the plan's, so check mode and the run answer the same."""
    plan = run.plan or Plan((), (), (), {})
    known = {manifest.id: manifest for manifest in run.found.manifests}
    planned = Done(
        recovered=[leftover.path for leftover in run.found.leftovers] if run.check_mode else run.done.recovered,
        marks=run.marks,
        orphans=[orphan.path for orphan in run.found.orphans if orphan.removed],
        removed=[verdict.id for verdict in plan.verdicts if verdict.action in (REMOVE, MERGE)],
        merged=[backup for backup, _steps in plan.merges],
        freed=sum(run.sizes.values()),
    )
    shown = run.done if error is not None and not run.check_mode else planned
    changed = bool(shown) and not (run.check_mode and error is not None)
    result = {
        "name": run.store.name,
        "changed": changed,
        "backups": [_backup(verdict, known.get(verdict.id), run.sizes) for verdict in plan.verdicts],
        "removed": shown.removed,
        "merged": [_merged(backup, steps) for backup, steps in plan.merges if backup in shown.merged],
        "protected": sorted(run.found.protected),
        "recovered": shown.recovered,
        "orphans": [dict(vars(orphan)) for orphan in run.found.orphans],
        "freed": shown.freed,
        "needed": sum(run.needed),
        "written": None if run.check_mode else run.done.written,
        **({} if error is None else {"error": error.to_result()}),
    }
    before, after = _views(run, plan, shown)
    return Report(run.store.name, changed, result, before, after, tuple(_warnings(run)), error)


def _backup(verdict: Verdict, manifest: Manifest | None, sizes: t.Mapping[str, int]) -> dict[str, t.Any]:
    return {
        "id": verdict.id,
        "action": verdict.action,
        "reasons": list(verdict.reasons),
        "point": None if manifest is None else timestamp(manifest.point),
        "level": None if manifest is None else manifest.level,
        "freed": sizes.get(verdict.id, 0),
    }


def _merged(backup: str, steps: t.Sequence[MergeStep]) -> dict[str, t.Any]:
    drives = [{"name": step.drive, "absorbed": list(step.absorbed), "parent": step.base} for step in steps]
    return {"backup": backup, "drives": drives}


def _views(run: Run, plan: Plan, shown: Done) -> tuple[t.Any, t.Any]:
    """What each backup's drives stand on, before and after."""
    before = {
        manifest.id: {record.name: record.parent or record.level for record in manifest.drives}
        for manifest in run.found.manifests
    }
    after = {name: dict(drives) for name, drives in before.items() if name not in shown.removed}
    for backup, steps in plan.merges:
        if backup in shown.merged:
            after[backup].update({step.drive: step.base or "full" for step in steps})
    changed_marks = dict(shown.marks)
    marked = run.found.protected
    was = {name for name in marked if not changed_marks.get(name)} | {n for n, on in changed_marks.items() if not on}
    view = {"backups": before, "protected": sorted(was)}
    return view, {"backups": after, "protected": sorted(marked)}


def _warnings(run: Run) -> t.Iterator[str]:
    for backup, reason in run.found.defects.items():
        yield f"Backup {backup} cannot be restored: {reason}."
    for backup in run.found.broken:
        yield f"The manifest of backup {backup} cannot be read."
    for leftover in run.found.leftovers if run.check_mode else ():
        if leftover.restores:
            yield (
                f"An earlier run was interrupted while it replaced backup {leftover.backup}. A real run puts it back "
                "first, so it may plan something else than this one."
            )
    for orphan in run.found.orphans:
        if not orphan.removed:
            yield f"{orphan.path} belongs to no backup: {orphan.reason}."
