# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What pruning does with chains, trees and holes: tables, and random ones against a slow second opinion."""

from __future__ import annotations

import random
import time
import typing as t
from datetime import datetime, timedelta, timezone

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._ops.prune_plan import find_defects, plan
from ansible_collections.blockops.qemu.plugins.module_utils._ops.prune_types import Found, Plan
from ansible_collections.blockops.qemu.plugins.module_utils._repository.manifest import DriveRecord, Manifest
from ansible_collections.blockops.qemu.plugins.module_utils._repository.retention import RULES, Policy

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
NOW = START + timedelta(days=20_000)

Parents = t.Mapping[str, t.Union[int, None]]


def name(number: int) -> str:
    """Ids that sort the other way round."""
    return f"20260101T{(99999 - number) // 3600 % 24:02}0000Z-{number:08x}"


def backup(number: int, parents: Parents, **more: t.Any) -> Manifest:
    drives = tuple(
        DriveRecord(
            drive, f"{drive}.qcow2", "full" if parent is None else "incremental", 1, 1, 1,
            parent=None if parent is None else name(parent),
        )
        for drive, parent in parents.items()
    )  # fmt: skip
    moment = START + timedelta(days=number)
    level = "full" if all(parent is None for parent in parents.values()) else "incremental"
    options: dict[str, t.Any] = {"level": level, "tags": (), **more}
    return Manifest(
        name(number), "5e11ab1e", number + 1, "vm", None, sync="full", consistency="crash", point=moment,
        started=moment, finished=moment, drives=drives, **options,
    )  # fmt: skip


def chain(*lengths: int) -> tuple[Manifest, ...]:
    """Fulls, each with increments on it."""
    made: list[Manifest] = []
    for length in lengths:
        first = len(made)
        made += [backup(n, {"a": None if n == first else n - 1}) for n in range(first, first + length)]
    return tuple(made)


def keep(**rules: int) -> Policy:
    return Policy({rule: rules.get(rule, 0) for rule in RULES})


def planned(
    manifests: t.Sequence[Manifest], policy: Policy, *, merge: bool = False, busy: t.Container[int] = (),
    keep_newest: bool = True, **found: t.Any,
) -> Plan:  # fmt: skip
    names = {name(number) for number in range(len(manifests)) if number in busy}
    held = Found(tuple(manifests), **found)
    return plan(held, policy, NOW, lambda m: "in use" if m.id in names else None, merge=merge, keep_newest=keep_newest)


def actions(made: Plan) -> str:
    """One letter for each backup, the oldest first."""
    return "".join(verdict.action[0] for verdict in reversed(made.verdicts))


def reason(made: Plan, number: int) -> str:
    return "; ".join(next(verdict.reasons for verdict in made.verdicts if verdict.id == name(number)))


TABLE = [
    # a full and its increments go together, once nothing needs them
    ("whole chain", chain(3, 2), keep(last=2), False, (), "rrrkk"),
    ("needed", chain(3, 3), keep(last=2), False, (), "rrrkkk"),
    ("tail goes", chain(4, 1), keep(last=1), False, (), "rrrrk"),
    ("merge", chain(5), keep(last=2), True, (), "mmmkk"),
    ("merge into the newest", chain(5), keep(last=1), True, (), "mmmmk"),
    ("no merge", chain(5), keep(last=1), False, (), "kkkkk"),
    ("merge in the middle", chain(12), keep(weekly=3), True, (), "mmmkmmmmmmkk"),
    # what is open stays, and so does what it stands on
    ("removal in use", chain(3, 2), keep(last=2), False, (1,), "kkrkk"),
    ("absorbed in use", chain(5), keep(last=2), True, (1,), "kkmkk"),
    ("taker in use", chain(5), keep(last=2), True, (0, 1, 2, 3), "kkkkk"),
]


@pytest.mark.parametrize(
    ("manifests", "policy", "merge", "busy", "expected"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_chains(manifests: t.Any, policy: Policy, merge: bool, busy: t.Any, expected: str) -> None:
    assert actions(planned(manifests, policy, merge=merge, busy=busy)) == expected


def test_merge_steps() -> None:
    made = planned(chain(12), keep(weekly=3), merge=True)
    (first, (step,)), (second, (other,)) = made.merges
    assert (first, step.absorbed, step.base) == (name(3), tuple(map(name, (2, 1, 0))), None)
    assert (second, other.absorbed, other.base) == (name(10), tuple(map(name, range(9, 3, -1))), name(3))
    assert made.owners[name(9)] == {name(10)}
    assert made.removals == ()


def test_removals_are_newest_first() -> None:
    assert planned(chain(4, 1), keep(last=1)).removals == tuple(map(name, (3, 2, 1, 0)))


def test_a_full_with_two_differentials_is_not_stored_twice() -> None:
    tree = [backup(0, {"a": None}), backup(1, {"a": 0}), backup(2, {"a": 0})]
    made = planned(tree, keep(last=2), merge=True)
    assert actions(made) == "kkk"
    assert "once for each of" in reason(made, 0)
    assert actions(planned(tree, keep(last=1), merge=True)) == "mrk"


def test_drives_have_chains_of_their_own() -> None:
    """b got a full in the middle: a's chain still needs the older ones, b's does not."""
    tree = [
        backup(0, {"a": None, "b": None}),
        backup(1, {"a": 0, "b": 0}),
        backup(2, {"a": 1, "b": None}),
        backup(3, {"a": 2, "b": 2}),
    ]
    assert actions(planned(tree, keep(last=2))) == "kkkk"
    made = planned(tree, keep(last=2), merge=True)
    assert actions(made) == "mmkk"
    ((taker, steps),) = made.merges
    assert (taker, [(step.drive, step.base) for step in steps]) == (name(2), [("a", None)])
    made = planned(tree, keep(last=1), merge=True)
    ((taker, steps),) = made.merges
    assert (taker, [(step.drive, step.absorbed) for step in steps]) == (
        name(3),
        [("a", (name(2), name(1), name(0))), ("b", (name(2),))],
    )


def test_drives_that_go_to_different_backups() -> None:
    """a goes on in 1, b in 2: the full waits for both."""
    tree = [backup(0, {"a": None, "b": None}), backup(1, {"a": 0}), backup(2, {"a": 1, "b": 0})]
    made = planned(tree, keep(last=2), merge=True)
    assert actions(made) == "mkk"
    assert made.owners[name(0)] == {name(1), name(2)}
    assert [taker for taker, _steps in made.merges] == [name(1), name(2)]


def test_what_no_rule_overrules() -> None:
    tree = [*chain(2), backup(2, {"a": None}, level="copy"), *(backup(n, {"a": None}) for n in (3, 4, 5))]
    made = planned(tree, keep(last=1), protected=frozenset([name(3)]), defects={name(4): "drive a: it is missing"})
    assert actions(made) == "rrkkkk"
    assert "protected" in reason(made, 3)
    assert "copy" in reason(made, 2)
    assert "it is missing" in reason(made, 4)


def test_the_damaged_and_the_protected_take_no_place_in_the_counts() -> None:
    tree = [backup(n, {"a": None}) for n in range(5)]
    held: dict[str, t.Any] = {"protected": frozenset([name(4)]), "defects": {name(3): "it is damaged"}}
    assert actions(planned(tree, keep(last=2), **held)) == "rkkkk"


def test_unreadable_manifests_hold_what_they_may_need() -> None:
    made = planned(
        chain(3, 2), keep(last=1), merge=True, broken={"20260303T000000Z-0000aaaa": "no JSON"},
        foreign={name(1): ("it may be needed by X",)},
    )  # fmt: skip
    assert actions(made) == "mkrmk" + "k"  # the last one is the unreadable one
    assert reason(made, 1) == "it may be needed by X"


def test_the_newest_is_kept_unless_told_otherwise() -> None:
    tree = [backup(n, {"a": None}, tags=("gold",) if n == 1 else ()) for n in range(4)]
    policy = Policy({}, tags=(frozenset(["gold"]),))
    assert actions(planned(tree, policy)) == "rkrk"
    assert actions(planned(tree, policy, keep_newest=False)) == "rkrr"


def test_newest_is_by_sequence_also_when_the_clock_was_wrong() -> None:
    tree = [backup(n, {"a": None}) for n in range(3)]
    wrong = Manifest(**{**vars(tree[2]), "point": START - timedelta(days=400)})
    made = planned([*tree[:2], wrong], keep(last=1))
    assert actions(made) == "rkk"
    assert reason(made, 2) == "it is the newest"


def test_without_a_rule_nothing_goes() -> None:
    assert actions(planned(chain(3, 2), Policy({}))) == "kkkkk"
    assert planned((), keep(last=1)) == Plan((), (), (), {})


def test_defects_go_up_the_chain() -> None:
    tree = chain(4, 2)
    found = find_defects(tree, {}, lambda manifest, _drive: "it is cut off" if manifest.id == name(1) else None)
    assert set(found) == {name(1), name(2), name(3)}
    assert "it is cut off" in found[name(3)]
    assert set(find_defects(tree[1:], {}, lambda *_link: None)) == {name(1), name(2), name(3)}
    assert "unusable" in find_defects(tree[1:2], {name(0): "x"}, lambda *_link: None)[name(1)]


@pytest.mark.parametrize("seed", range(40))
def test_random_trees_stay_whole(seed: int) -> None:
    """After any plan, each kept backup has its whole chain: kept images, or a merge step that names all it lost."""
    dice = random.Random(seed)
    manifests: list[Manifest] = []
    for number in range(60):
        parents: dict[str, int | None] = {}
        for drive in ("a", "b", "c"):
            known = [int(m.id[-8:], 16) for m in manifests[-6:] if m.drive(drive) is not None]
            if dice.random() < 0.9:
                parents[drive] = (
                    None if not known or dice.random() < 0.1 else dice.choice([known[-1], dice.choice(known)])
                )
        manifests.append(backup(number, parents or {"a": None}))
    busy = {number for number in range(60) if dice.random() < 0.05}
    made = planned(manifests, keep(last=4, weekly=dice.randrange(5)), merge=bool(seed % 2), busy=busy)
    by_id = {manifest.id: manifest for manifest in manifests}
    action = {verdict.id: verdict.action for verdict in made.verdicts}
    steps = {(step.backup, step.drive): step for _taker, found in made.merges for step in found}
    for manifest in manifests:
        if action[manifest.id] != "keep":
            assert int(manifest.id[-8:], 16) not in busy
            continue
        for record in manifest.drives:
            step = steps.get((manifest.id, record.name))
            lost, parent = [], record.parent
            while parent is not None and action[parent] != "keep":
                lost.append(parent)
                below = by_id[parent].drive(record.name)
                assert below is not None
                parent = below.parent
            assert (list(step.absorbed), step.base) == (lost, parent) if step else not lost
            assert not step or int(manifest.id[-8:], 16) not in busy
            assert all(action[each] == "merge" and manifest.id in made.owners[each] for each in lost)
    children: dict[tuple[str, str], int] = {}
    for (_taker, drive), step in steps.items():
        for absorbed in step.absorbed:
            children[absorbed, drive] = children.get((absorbed, drive), 0) + 1
    assert set(children.values()) <= {1}, "data stored twice"
    assert list(made.removals) == sorted(made.removals, key=lambda each: -by_id[each].sequence)


@pytest.mark.parametrize("merge", [False, True])
def test_ten_thousand(merge: bool) -> None:
    manifests = chain(*[100] * 100)
    asked: list[str] = []

    def damage(manifest: Manifest, _record: DriveRecord) -> None:
        asked.append(manifest.id)

    def busy(manifest: Manifest) -> None:
        asked.append(manifest.id)

    began = time.monotonic()
    defects = find_defects(manifests, {}, damage)
    found = Found(manifests, defects=defects)
    policy = keep(last=10, daily=30, weekly=52, monthly=36, yearly=20)
    made = plan(found, policy, NOW, busy, merge=merge, keep_newest=True)
    assert time.monotonic() - began < 5
    assert len(made.verdicts) == 10_000
    assert len(asked) <= 2 * 10_000  # one look at each image, and one at who has it open
