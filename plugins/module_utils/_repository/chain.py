# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Chains of backups: which images a point needs, and which point is meant. Pure.

Order comes from ``sequence`` and parents alone, never from times of files or from names.
"""

from __future__ import annotations

import typing as t
from datetime import datetime, timedelta

from .._errors import BackupMissing, BlockOpsError, ChainBroken, InputInvalid
from .manifest import DriveRecord, Manifest
from .names import is_backup_id, parse_moment

Link = tuple[Manifest, DriveRecord]
# What is wrong with an image as it lies there (one sentence), or None. Given by whoever may look at the disk.
Damage = t.Callable[[Manifest, DriveRecord], t.Optional[str]]
Broken = t.Mapping[str, BlockOpsError]

LATEST = "latest"
BEFORE = "before:"
_KNOWN_SHOWN = 10
_CLOCKS_DIFFER = timedelta(minutes=5)


def ordered(manifests: t.Iterable[Manifest]) -> tuple[Manifest, ...]:
    """Oldest first. (Equal sequences cannot be published under the lock; should they exist, the order is stable.)"""
    return tuple(sorted(manifests, key=lambda manifest: (manifest.sequence, manifest.id)))


def chain(
    manifests: t.Iterable[Manifest],
    backup_id: str,
    drive: str,
    *,
    broken: Broken | None = None,
    damage: Damage | None = None,
) -> list[Link]:
    """What restoring ``drive`` as of ``backup_id`` needs: that image first, the full it ends on last.

    ``broken`` are the backups whose manifest was refused, ``damage`` looks at the images; both only sharpen the check.

    :raise ChainBroken: a parent is missing, lacks the drive, is not older (loops included), or an image is damaged.
    """
    by_id = {manifest.id: manifest for manifest in manifests}
    links: list[Link] = []
    wanted: str | None = backup_id
    vm = by_id[backup_id].vm_name if backup_id in by_id else "?"

    def refuse(reason: str) -> ChainBroken:
        return ChainBroken(backup=backup_id, vm=vm, drive=drive, reason=reason)

    while wanted is not None:
        child = links[-1][0] if links else None
        manifest = by_id.get(wanted)
        if manifest is None:
            said = (broken or {}).get(wanted)
            raise refuse(f"its parent {wanted} is missing" if said is None else f"backup {wanted} is unusable: {said}")
        record = manifest.drive(drive)
        if record is None:
            raise refuse(f"backup {wanted} has no drive {drive!r}")
        if child is not None and manifest.sequence >= child.sequence:
            raise refuse(f"parent {wanted} of backup {child.id} is not older than it")
        if child is not None and not record.standalone:
            raise refuse(f"parent {wanted} of backup {child.id} does not stand alone")
        wrong = damage(manifest, record) if damage is not None else None
        if wrong is not None:
            raise refuse(wrong)
        links.append((manifest, record))
        wanted = record.parent
    return links


def incomplete(
    manifests: t.Iterable[Manifest],
    manifest: Manifest,
    drives: t.Iterable[str] = (),
    *,
    broken: Broken | None = None,
    damage: Damage | None = None,
) -> str | None:
    """Why ``manifest`` (or only these drives of it) cannot be restored; ``None`` when it can."""
    known = tuple(manifests)
    for name in tuple(drives) or tuple(drive.name for drive in manifest.drives):
        try:
            chain(known, manifest.id, name, broken=broken, damage=damage)
        except ChainBroken as exc:
            return str(exc.data["reason"])
    return None


def select(
    manifests: t.Iterable[Manifest],
    point: str,
    *,
    vm: str,
    repository: str,
    drives: t.Sequence[str] = (),
    broken: Broken | None = None,
    damage: Damage | None = None,
) -> Manifest:
    """The backup ``point`` means: an id, ``latest``, or ``before:TIME`` (the newest strictly before it).

    ``latest`` and ``before:`` pass over backups that cannot be restored by themselves: a broken chain, a drive of
    ``drives`` that is not in it, an image without the data below it. An id is taken at its word.

    :raise InputInvalid: no such way to name a point.
    :raise BackupMissing: nothing matches.
    :raise BlockOpsError: the error of the manifest, when an id names a backup whose manifest was refused.
    """
    known = ordered(manifests)
    if is_backup_id(point):
        if point in (broken or {}):
            raise (broken or {})[point]
        found = next((manifest for manifest in known if manifest.id == point), None)
    else:
        limit = _limit(point)
        found = next(
            (
                manifest
                for manifest in reversed(known)
                if (limit is None or manifest.point < limit)
                and _stands_alone(manifest, drives)
                and incomplete(known, manifest, drives, broken=broken, damage=damage) is None
            ),
            None,
        )
    if found is None:
        names = ", ".join(manifest.id for manifest in known[-_KNOWN_SHOWN:]) or "none"
        raise BackupMissing(vm=vm, repository=repository, point=point, known=names)
    return found


def _limit(point: str) -> datetime | None:
    """The time of ``before:TIME``, ``None`` for ``latest``. A bare date means its first moment."""
    if point == LATEST:
        return None
    if not point.startswith(BEFORE):
        raise InputInvalid(message=f"point must be latest, before:TIME or the id of a backup, not {point!r}.")
    return parse_moment(point[len(BEFORE) :])


def _stands_alone(manifest: Manifest, drives: t.Sequence[str]) -> bool:
    records = [manifest.drive(name) for name in drives] if drives else list(manifest.drives)
    return all(record is not None and record.standalone for record in records)


def newest_with_drive(manifests: t.Iterable[Manifest], drive: str) -> Manifest | None:
    """The backup an incremental of ``drive`` would follow: the newest that has it and is no copy."""
    return _newest(manifests, drive, ("full", "incremental", "differential"))


def newest_full_of_drive(manifests: t.Iterable[Manifest], drive: str) -> Manifest | None:
    """The backup a differential of ``drive`` would build on: the newest in which the drive itself is a full."""
    return _newest(manifests, drive, ("full",))


def _newest(manifests: t.Iterable[Manifest], drive: str, levels: tuple[str, ...]) -> Manifest | None:
    for manifest in reversed(ordered(manifests)):
        record = manifest.drive(drive)
        if manifest.level != "copy" and record is not None and record.standalone and record.level in levels:
            return manifest
    return None


def next_sequence(manifests: t.Iterable[Manifest]) -> int:
    """The sequence of a backup that begins now (under the VM's lock)."""
    return 1 + max((manifest.sequence for manifest in manifests), default=0)


def is_younger(manifest: Manifest, now: datetime, age: float) -> bool:
    """True when the point in time of ``manifest`` is less than ``age`` seconds before ``now`` (an aware datetime).

    A point in the future was made when the clock was wrong, and says nothing of its age; clocks of two hosts may differ
    by a little.
    """
    return -_CLOCKS_DIFFER < now - manifest.point < timedelta(seconds=age)
