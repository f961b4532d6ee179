# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Retention against what restic itself answered, and against the rules that Proxmox documents."""

from __future__ import annotations

import json
import random
import time
import typing as t
import zoneinfo
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import InputInvalid
from ansible_collections.blockops.qemu.plugins.module_utils._repository.retention import (
    PROXMOX,
    RULES,
    Duration,
    Point,
    Policy,
    before,
    kept,
    parse_duration,
)

NOW = datetime(2026, 11, 23, 12, tzinfo=timezone.utc)
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
RECORDED = json.loads((Path(__file__).parent / "recorded" / "restic.json").read_text())
ANSWERS = [(name, policy, indexes) for name, entry in RECORDED["lists"].items() for policy, indexes in entry["kept"]]


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


def points(*times: str) -> list[Point]:
    """Named by their number, the oldest first."""
    return [Point(str(number), at(text), number) for number, text in enumerate(times)]


def policy(style: str = "restic", **rules: t.Any) -> Policy:
    within = parse_duration(rules.pop("within")) if "within" in rules else None
    tags = tuple(frozenset(entry.split(",")) for entry in rules.pop("tags", ()))
    zone = rules.pop("zone", timezone.utc)
    return Policy({rule: rules.get(rule, 0) for rule in RULES}, within, tags, style, zone)


def ids(found: t.Iterable[str]) -> list[int]:
    return sorted(int(name) for name in found)


@pytest.mark.parametrize(("name", "rules", "expected"), ANSWERS, ids=lambda value: str(value)[:60])
def test_as_restic_answered(name: str, rules: dict[str, t.Any], expected: list[int]) -> None:
    entry = RECORDED["lists"][name]
    made = [
        Point(str(number), at(text), number, frozenset(entry["tags"][number]))
        for number, text in enumerate(entry["times"])
    ]
    given = dict(rules)
    tag = given.pop("tag", None)
    wanted = policy(**given, tags=[] if tag is None else [tag])
    assert ids(kept(made, wanted, NOW)) == expected


def test_the_answers_cover_every_rule() -> None:
    seen = {rule for _name, rules, _indexes in ANSWERS for rule in rules}
    assert seen == {*RULES, "within", "tag"}


def test_the_example_of_the_documentation_of_restic() -> None:
    """One backup every Sunday for 12 weeks, and four days to keep: the last four Sundays."""
    sundays = [Point(str(n), at("2019-09-01T11:00") + timedelta(weeks=n), n) for n in range(12)]
    assert ids(kept(sundays, policy(daily=4), NOW)) == [8, 9, 10, 11]


# The rules of Proxmox: in their order, each only beyond the periods that are covered already.
DAYS = [
    f"2020-{month:02}-{day:02}T12:00:00" for month, last in ((1, 31), (2, 29), (3, 10)) for day in range(1, last + 1)
]
PROXMOX_TABLE: list[tuple[dict[str, int], list[str], list[int]]] = [
    ({"last": 3}, DAYS[:10], [7, 8, 9]),
    ({"last": 2, "daily": 3}, DAYS[:10], [5, 6, 7, 8, 9]),
    # the week of the newest two is covered by them, so the weekly one is of the week before (until Sunday the 5th)
    ({"daily": 2, "weekly": 1}, DAYS[:10], [4, 8, 9]),
    # two days, then two months beside March, which is covered
    ({"daily": 2, "monthly": 2}, DAYS, [30, 59, 68, 69]),
    ({"monthly": 2}, DAYS, [59, 69]),
    # the 30th of December is passed over by the weekly rule, for the 5th of January, so the monthly one keeps November
    ({"daily": 1, "weekly": 1, "monthly": 1},
     ["2019-11-25T12:00", "2019-12-30T12:00", "2020-01-05T12:00", "2020-01-07T12:00"], [0, 2, 3]),
    ({"daily": 1, "weekly": 1, "monthly": 1}, ["2019-12-25T12:00", "2019-12-31T12:00", "2020-01-01T12:00"], [0, 2]),
    # two of one hour: the newer one
    ({"hourly": 4}, ["2019-12-31T11:18:21", "2019-12-31T11:19:21", "2020-01-01T11:18", "2020-01-01T12:18"], [1, 2, 3]),
    # the last ones cover their hours, so hourly goes on below them
    ({"last": 2, "hourly": 2},
     ["2018-05-26T11:18", "2019-12-31T11:18", "2019-12-31T11:19", "2020-01-01T11:18", "2020-01-01T12:18"],
     [0, 2, 3, 4]),
    ({"yearly": 2}, ["2018-05-26T11:18", "2019-12-31T11:18", "2020-01-01T11:18"], [1, 2]),
    ({"weekly": 1, "yearly": 1}, ["2018-05-26T11:18", "2019-12-31T11:18", "2020-01-01T11:18"], [0, 2]),
    ({"daily": 1, "weekly": 1}, ["2020-12-03T12:18", "2020-12-04T12:18", "2020-12-07T12:18"], [1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "times", "expected"), PROXMOX_TABLE)
def test_as_proxmox_documents(rules: dict[str, t.Any], times: list[str], expected: list[int]) -> None:
    assert ids(kept(points(*times), policy(PROXMOX, **rules), NOW)) == expected


def test_the_example_of_the_documentation_of_proxmox() -> None:
    """Daily backups: last 3, daily 13, weekly 8, monthly 11, yearly 9 keep a year of months and ten of years."""
    made = [Point(str(n), at("2010-01-01T02:00") + timedelta(days=n), n) for n in range(4400)]
    rules: dict[str, t.Any] = {"last": 3, "daily": 13, "weekly": 8, "monthly": 11, "yearly": 9}
    found = kept(made, policy(PROXMOX, **rules), NOW)
    assert len(found) == sum(rules.values())
    each = {rule: sum(reasons == [rule] for reasons in found.values()) for rule in rules}
    assert each == rules
    assert {made[int(name)].moment.year for name in found} == set(range(2011, 2023))
    shared = kept(made, policy(**rules), NOW)  # restic's rules overlap, so the same numbers keep less
    assert len(shared) < len(found)


def test_weeks_are_those_of_the_calendar() -> None:
    """2020-12-31 and 2021-01-01 are of one week, 2021-01-04 of the next."""
    made = points("2020-12-31T12:00", "2021-01-01T12:00", "2021-01-04T12:00")
    for style in ("restic", PROXMOX):
        assert ids(kept(made, policy(style, weekly=2), NOW)) == [1, 2]
        assert ids(kept([*points("2019-01-01T00:00"), *made[1:]], policy(style, weekly=3), NOW)) == [0, 1, 2]


@pytest.mark.parametrize("style", ["restic", PROXMOX])
def test_periods_are_local(style: str) -> None:
    made = points("2026-06-01T00:00", "2026-06-01T21:59", "2026-06-01T22:01", "2026-06-02T02:00")
    assert ids(kept(made, policy(style, daily=2), NOW)) == [2, 3]
    assert ids(kept(made, policy(style, daily=2, zone=BERLIN), NOW)) == [1, 3]
    assert ids(kept(made[:3], policy(style, daily=2, zone=BERLIN), NOW)) == [1, 2]


@pytest.mark.parametrize("style", ["restic", PROXMOX])
def test_clocks_that_go_back_make_one_hour_of_two(style: str) -> None:
    """2025-10-26 in Berlin: 02:30 comes at 00:30 and again at 01:30 UTC."""
    made = points("2025-10-25T22:30", "2025-10-26T00:30", "2025-10-26T01:30", "2025-10-26T02:30")
    assert ids(kept(made, policy(style, hourly=2, zone=BERLIN), NOW)) == [2, 3]
    assert ids(kept(made, policy(style, hourly=2), NOW)) == [2, 3]
    assert ids(kept(made, policy(style, hourly=3, zone=BERLIN), NOW)) == [0, 2, 3]
    assert ids(kept(made, policy(style, hourly=3), NOW)) == [1, 2, 3]


def test_the_hour_that_is_left_out_in_spring() -> None:
    made = points("2025-03-30T00:30", "2025-03-30T01:30")  # 01:30 and 03:30
    assert ids(kept(made, policy(hourly=2, zone=BERLIN), NOW)) == [0, 1]


@pytest.mark.parametrize("style", ["restic", PROXMOX])
def test_backups_of_one_moment(style: str) -> None:
    made = points(*["2026-11-01T00:00:00"] * 4)
    assert ids(kept(made, policy(style, last=2), NOW)) == [2, 3]
    assert ids(kept(made, policy(style, last=4), NOW)) == [0, 1, 2, 3]
    assert 3 in ids(kept(made, policy(style, daily=1), NOW))


def test_a_clock_that_was_in_the_future_takes_nothing_from_within() -> None:
    made = points("2026-11-20T00:00", "2026-11-22T00:00", "2099-01-01T00:00")
    assert ids(kept(made, policy(within="3d"), NOW)) == [0, 1, 2]
    assert ids(kept(made, policy(within="1d"), NOW)) == [1, 2]
    assert ids(kept(made[2:], policy(within="1d"), NOW)) == [2]


@pytest.mark.parametrize(
    ("moment", "duration", "expected"),
    [
        ("2026-03-31T12:00", "1m", "2026-03-03T12:00"),  # the 31st of February is the 3rd of March
        ("2024-02-29T12:00", "1y", "2023-03-01T12:00"),
        ("2026-01-15T12:00", "2m", "2025-11-15T12:00"),
        ("2026-01-15T12:00", "1y1m1d1h", "2024-12-14T11:00"),
        ("2026-01-15T12:00", "9999y", "0001-01-01T00:00"),
        ("2026-01-15T12:00", "999999d", "0001-01-01T00:00"),
    ],
)
def test_counting_back(moment: str, duration: str, expected: str) -> None:
    assert before(at(moment), parse_duration(duration), timezone.utc) == at(expected)


def test_counting_back_over_a_change_of_clocks() -> None:
    """A day ago it was the same time on the wall."""
    assert before(at("2025-10-26T12:00"), parse_duration("1d"), BERLIN) == at("2025-10-25T11:00")


def test_durations() -> None:
    assert parse_duration("2y5m7d3h") == Duration("2y5m7d3h", 2, 5, 7, 3)
    assert parse_duration("3h7d").days == 7
    for text in ("", "1w", "1", "d", "1d1d", "0d", "-1d", "1.5d", "1D", "1d ", "²d"):
        with pytest.raises(InputInvalid):
            parse_duration(text)


def test_the_order_of_the_input_does_not_matter() -> None:
    dice = random.Random(1)
    made = [Point(str(n), NOW - timedelta(minutes=dice.randrange(10**6)), n) for n in range(300)]
    for style in ("restic", PROXMOX):
        wanted = policy(style, last=3, hourly=5, daily=5, weekly=5, monthly=5, yearly=5)
        found = kept(made, wanted, NOW)
        dice.shuffle(made)
        assert kept(made, wanted, NOW) == found


@pytest.mark.parametrize("style", ["restic", PROXMOX])
def test_more_is_kept_by_larger_numbers_and_never_less(style: str) -> None:
    dice = random.Random(2)
    for _round in range(50):
        made = [Point(str(n), NOW - timedelta(minutes=dice.randrange(10**6)), n) for n in range(60)]
        rule = dice.choice(RULES)
        few, many = (kept(made, policy(style, **{rule: n}), NOW) for n in (2, 5))
        oldest = min(made, key=lambda point: point.moment).id
        assert set(few) - {oldest} <= set(many)
        assert len(many) <= 6


def test_nothing_of_nothing() -> None:
    assert kept([], policy(last=1, within="1d"), NOW) == {}
    assert policy().empty
    assert not policy(yearly=-1).empty


@pytest.mark.parametrize("style", ["restic", PROXMOX])
def test_ten_thousand(style: str) -> None:
    made = [Point(str(n), NOW - timedelta(minutes=37 * n), -n) for n in range(10_000)]
    began = time.monotonic()
    kept(made, policy(style, last=10, hourly=48, daily=30, weekly=20, monthly=24, yearly=5, zone=BERLIN), NOW)
    assert time.monotonic() - began < 5
