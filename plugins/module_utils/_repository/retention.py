# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Which points a policy keeps, by their times alone. Pure: no clock, no file system.

``restic`` counts the last N periods that have a point, for each rule by itself, and keeps what any rule keeps; a rule
with counts left keeps the oldest point too. ``proxmox`` goes through the rules in order, and a period that an earlier
rule has covered is not counted again. Periods are those of the calendar in the policy's time zone: an hour that the
clocks repeat in autumn is one period.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone, tzinfo

from .._errors import InputInvalid

UNLIMITED = -1
RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
RESTIC, PROXMOX = "restic", "proxmox"

_DURATION = re.compile(r"(?:[0-9]{1,6}[ymdh])+")
_PART = re.compile(r"([0-9]+)([ymdh])")
_BEGINNING = datetime.min.replace(tzinfo=timezone.utc)


@dataclass(frozen=True)
class Duration:
    """A length of time as restic writes it. ``m`` are months."""

    text: str
    years: int = 0
    months: int = 0
    days: int = 0
    hours: int = 0


@dataclass(frozen=True)
class Policy:
    """``counts``: how many periods of each rule; ``tags``: sets of which a point has to have all of one."""

    counts: t.Mapping[str, int]
    within: Duration | None = None
    tags: tuple[frozenset[str], ...] = ()
    style: str = RESTIC
    zone: tzinfo = timezone.utc

    @property
    def empty(self) -> bool:
        return not any(self.counts.values()) and self.within is None and not self.tags


@dataclass(frozen=True)
class Point:
    """A point in time that may be kept. ``sequence`` orders points of one moment."""

    id: str
    moment: datetime
    sequence: int = 0
    tags: frozenset[str] = frozenset()


def parse_duration(text: str) -> Duration:
    """``2y5m7d3h``: years, months, days, hours; each at most once.

    :raise InputInvalid: anything else.
    """
    parts = _PART.findall(text) if _DURATION.fullmatch(text) else []
    found = {unit: int(number) for number, unit in parts}
    if not any(found.values()) or len(found) != len(parts):
        raise InputInvalid(
            message=f"{text!r} is not a duration: write years, months, days and hours as in 1y6m7d12h (m are months)."
        )
    return Duration(text, found.get("y", 0), found.get("m", 0), found.get("d", 0), found.get("h", 0))


def kept(points: t.Iterable[Point], policy: Policy, now: datetime) -> dict[str, list[str]]:
    """The ids of the points that the policy keeps, each with the reasons."""
    newest_first = sorted(points, key=lambda point: (point.moment, point.sequence, point.id), reverse=True)
    reasons: dict[str, list[str]] = {point.id: [] for point in newest_first}
    _by_tags(newest_first, policy, reasons)
    _by_age(newest_first, policy, now, reasons)
    if policy.style == PROXMOX:
        _in_order([point for point in newest_first if not reasons[point.id]], policy, reasons)
    else:
        _each_by_itself(newest_first, policy, reasons)
    return {name: found for name, found in reasons.items() if found}


def _by_tags(points: t.Iterable[Point], policy: Policy, reasons: dict[str, list[str]]) -> None:
    for point in points:
        for wanted in policy.tags:
            if wanted <= point.tags:
                reasons[point.id].append(f"it has the tag {','.join(sorted(wanted))}")


def _by_age(points: t.Sequence[Point], policy: Policy, now: datetime, reasons: dict[str, list[str]]) -> None:
    """Counted back from the newest point that is not in the future: a clock that was wrong keeps more, never less."""
    if policy.within is None:
        return
    newest = next((point.moment for point in points if point.moment < now), None)
    limit = _BEGINNING if newest is None else before(newest, policy.within, policy.zone)
    for point in points:
        if point.moment > limit:
            reasons[point.id].append(f"within {policy.within.text} of the newest")


def before(moment: datetime, duration: Duration, zone: tzinfo) -> datetime:
    """``moment`` less ``duration``, by the calendar: a 31st in a month of 30 days is the 1st of the next."""
    wall = moment.astimezone(zone).replace(tzinfo=None)
    months = wall.year * 12 + wall.month - 1 - duration.years * 12 - duration.months
    try:
        first = wall.replace(year=months // 12, month=months % 12 + 1, day=1)
        day = first + timedelta(days=wall.day - 1 - duration.days)
        return day.replace(tzinfo=zone).astimezone(timezone.utc) - timedelta(hours=duration.hours)
    except (ValueError, OverflowError):  # before the year 1
        return _BEGINNING


def _period(rule: str, local: datetime, point: Point) -> tuple[t.Any, ...]:
    if rule == "last":
        return (point.id,)
    if rule == "weekly":
        return tuple(local.isocalendar())[:2]
    depth = {"yearly": 1, "monthly": 2, "daily": 3, "hourly": 4}[rule]
    return (local.year, local.month, local.day, local.hour)[:depth]


def _each_by_itself(points: t.Sequence[Point], policy: Policy, reasons: dict[str, list[str]]) -> None:
    left = dict(policy.counts)
    seen: dict[str, tuple[t.Any, ...]] = {}
    for number, point in enumerate(points):
        local = point.moment.astimezone(policy.zone)
        for rule in RULES:
            if not left.get(rule):
                continue
            period, oldest = _period(rule, local, point), number == len(points) - 1
            if seen.get(rule) == period and not oldest:
                continue
            word = "oldest" if seen.get(rule) == period else rule
            reasons[point.id].append(f"{word} ({rule})" if word == "oldest" else rule)
            seen[rule] = period
            left[rule] -= left[rule] > 0


def _in_order(points: t.Sequence[Point], policy: Policy, reasons: dict[str, list[str]]) -> None:
    """Points that are kept by other means (``points`` lacks them) are not counted, as protected ones are not there."""
    local = {point.id: point.moment.astimezone(policy.zone) for point in points}
    marked: set[str] = set()  # decided: kept, or passed over for a newer one of its period
    for rule in RULES:
        count = policy.counts.get(rule, 0)
        if not count:
            continue
        covered = {_period(rule, local[point.id], point) for point in points if reasons[point.id]}
        chosen: set[tuple[t.Any, ...]] = set()
        for point in points:
            period = _period(rule, local[point.id], point)
            if point.id in marked or period in covered:
                continue
            if period not in chosen:
                if len(chosen) == count:
                    break
                chosen.add(period)
                reasons[point.id].append(rule)
            marked.add(point.id)
