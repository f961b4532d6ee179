# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What pruning does with each backup of a VM. Pure; every backup is looked at a fixed number of times.

The policy speaks first. Then the backups are gone through from the newest to the oldest, so that everything that builds
on a backup has been decided when its turn comes: it is kept when a kept one needs it, or merged into that one.
"""

from __future__ import annotations

import typing as t
from datetime import datetime

from .._repository import retention
from .._repository.chain import Damage
from .._repository.manifest import Manifest
from .._repository.retention import Point, Policy
from .prune_types import KEEP, MERGE, REMOVE, Found, MergeStep, Plan, Verdict

# Whether (and by whom) an image of the backup is open. Asked only for what would be removed or replaced.
Busy = t.Callable[[Manifest], t.Optional[str]]


def find_defects(manifests: t.Iterable[Manifest], broken: t.Mapping[str, str], damage: Damage) -> dict[str, str]:
    """Why backups cannot be restored by themselves. One look at each image, parents before children."""
    state: dict[tuple[str, str], tuple[int, str | None]] = {}
    found: dict[str, str] = {}
    for manifest in manifests:
        for record in manifest.drives:
            reason = damage(manifest, record)
            if reason is None and record.parent is not None:
                number, reason = state.get((record.parent, record.name), (0, _missing(record.parent, broken)))
                if reason is None and number >= manifest.sequence:
                    reason = f"its parent {record.parent} is not older than it"
            if reason is None and not record.standalone:
                state[manifest.id, record.name] = manifest.sequence, f"{manifest.id} does not stand alone"
            else:
                state[manifest.id, record.name] = manifest.sequence, reason
            if reason is not None:
                found.setdefault(manifest.id, f"drive {record.name}: {reason}")
    return found


def _missing(parent: str, broken: t.Mapping[str, str]) -> str:
    return f"its parent {parent} is unusable" if parent in broken else f"its parent {parent} is missing"


def plan(found: Found, policy: Policy, now: datetime, busy: Busy, *, merge: bool, keep_newest: bool) -> Plan:
    """The verdicts on all backups, newest first, and the steps they need, in their order."""
    return _Planner(found, busy, merge).plan(_kept_for_itself(found, policy, now, keep_newest))


def _kept_for_itself(found: Found, policy: Policy, now: datetime, keep_newest: bool) -> dict[str, list[str]]:
    """Reasons that do not come from other backups."""
    kept: dict[str, list[str]] = {}
    points = []
    for manifest in found.manifests:
        reasons = []
        if manifest.id in found.protected:
            reasons.append("it is protected")
        if manifest.level == "copy":
            reasons.append("it is a copy, which is its owner's to remove")
        if manifest.id in found.defects:
            reasons.append(f"it cannot be restored by itself ({found.defects[manifest.id]}), so it is not judged")
        if reasons or policy.empty:
            kept[manifest.id] = reasons or ["no rule was given"]
        else:
            points.append(Point(manifest.id, manifest.point, manifest.sequence, frozenset(manifest.tags)))
    kept.update(retention.kept(points, policy, now))
    if keep_newest and points:
        newest = max(points, key=lambda point: (point.sequence, point.id))
        kept.setdefault(newest.id, []).append("it is the newest")
    return kept


class _Planner:
    """One walk from the newest backup to the oldest; ``users`` are the live images that build on a backup, by drive."""

    def __init__(self, found: Found, busy: Busy, merge: bool) -> None:
        self.found = found
        self.busy = busy
        self.merge = merge
        self.by_id = {manifest.id: manifest for manifest in found.manifests}
        self.users: dict[str, dict[str, list[str]]] = {}
        self.owner: dict[tuple[str, str], str] = {}  # (absorbed backup, drive): the kept one that takes its data
        self.absorbed: set[str] = set()
        self.asked: dict[str, str | None] = {}

    def plan(self, kept: dict[str, list[str]]) -> Plan:
        verdicts = [
            Verdict(name, KEEP, (f"its manifest cannot be read: {said}",))
            for name, said in sorted(self.found.broken.items(), reverse=True)
        ]
        removals = []
        for manifest in reversed(self.found.manifests):
            verdict = self._judge(manifest, kept.get(manifest.id, []))
            verdicts.append(verdict)
            if verdict.action == REMOVE:
                removals.append(manifest.id)
                continue
            for record in manifest.drives:
                if record.parent is not None and (verdict.action == KEEP or (manifest.id, record.name) in self.owner):
                    self.users.setdefault(record.parent, {}).setdefault(record.name, []).append(manifest.id)
        owners: dict[str, set[str]] = {}
        for (name, _drive), owner in self.owner.items():
            owners.setdefault(name, set()).add(owner)
        merges = self._merges()
        frozen = {name: frozenset(found) for name, found in owners.items()}
        return Plan(tuple(verdicts), tuple(removals), merges, frozen)

    def _judge(self, manifest: Manifest, reasons: list[str]) -> Verdict:
        users = self.users.get(manifest.id, {})
        foreign = self.found.foreign.get(manifest.id, ())
        if reasons:
            return Verdict(manifest.id, KEEP, (*reasons, *foreign))
        if not users and not foreign:
            open_in = self._open(manifest.id)
            if open_in is None:
                return Verdict(manifest.id, REMOVE, ("no rule keeps it, and nothing builds on it",))
            return Verdict(manifest.id, KEEP, (open_in,))
        if foreign or not self.merge:
            return Verdict(manifest.id, KEEP, (*self._needed(users), *foreign))
        obstacle = self._obstacle(manifest, users)
        if obstacle is not None:
            return Verdict(manifest.id, KEEP, (*self._needed(users), obstacle))
        self.absorbed.add(manifest.id)
        for drive, (user,) in users.items():
            self.owner[manifest.id, drive] = self._taker(user, drive)
        takers = sorted({self.owner[manifest.id, drive] for drive in users})
        return Verdict(manifest.id, MERGE, (f"no rule keeps it; its data goes into {', '.join(takers)}",))

    def _taker(self, user: str, drive: str) -> str:
        return self.owner.get((user, drive), user)

    def _needed(self, users: dict[str, list[str]]) -> tuple[str, ...]:
        names = sorted({name for found in users.values() for name in found})
        return (f"it is needed by {', '.join(names)}",) if names else ()

    def _obstacle(self, manifest: Manifest, users: dict[str, list[str]]) -> str | None:
        """Why the backup cannot be merged into what builds on it."""
        for drive, found in users.items():
            if len(found) > 1:
                return f"merging would store drive {drive} once for each of {', '.join(sorted(found))}"
        for name in (manifest.id, *sorted({self._taker(found[0], drive) for drive, found in users.items()})):
            if name in self.found.defects:
                return f"{name} cannot be restored by itself, so it cannot be merged"
            open_in = self._open(name)
            if open_in is not None:
                return open_in if name == manifest.id else f"{name} cannot take its data: {open_in}"
        return None

    def _open(self, name: str) -> str | None:
        if name not in self.asked:
            self.asked[name] = self.busy(self.by_id[name])
        return self.asked[name]

    def _merges(self) -> tuple[tuple[str, tuple[MergeStep, ...]], ...]:
        found = []
        for manifest in self.found.manifests:
            if manifest.id in self.absorbed:
                continue
            steps = []
            for record in manifest.drives:
                if record.parent is not None and self.owner.get((record.parent, record.name)) == manifest.id:
                    steps.append(self._step(manifest.id, record.name, record.parent))
            if steps:
                found.append((manifest.id, tuple(steps)))
        return tuple(found)

    def _step(self, backup: str, drive: str, parent: str | None) -> MergeStep:
        absorbed = []
        while parent is not None and self.owner.get((parent, drive)) == backup:
            absorbed.append(parent)
            record = self.by_id[parent].drive(drive)
            parent = None if record is None else record.parent
        return MergeStep(backup, drive, tuple(absorbed), parent)
