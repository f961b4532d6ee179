# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._ops.img_commit_bitmaps import Merge, plan_bitmaps

NAME = "bo-12345678-20261123T054500Z-0000abcd"
OTHER = "bo-12345678-20261124T054500Z-0000abce"


def bitmap(name: str, *, recording: bool = True, inconsistent: bool = False, granularity: int = 65536) -> t.Any:
    return {"name": name, "granularity": granularity, "recording": recording, "inconsistent": inconsistent}


def layers(*numbers: int, name: str = NAME) -> list[t.Any]:
    return [bitmap(f"{name}.{number}" if number else name) for number in numbers]


CASES: list[tuple[str, list[list[t.Any]], list[t.Any] | None, bool, list[str], list[str]]] = [
    # what, bitmaps of the images that go (the topmost first), of the base, into the base, names merged, names lost
    ("into the base's own", [layers(1)], layers(0), True, [NAME], []),
    ("the backup was of the overlay", [layers(0)], [], True, [NAME], []),
    ("an overlay goes on above", [layers(1)], layers(0), False, [f"{NAME}.1"], []),
    ("the overlay's own goes on", [layers(0)], [], False, [NAME], []),
    ("several images", [layers(2), layers(1)], layers(0), True, [NAME], []),
    ("several images, base with none", [layers(1), layers(0)], [], True, [NAME], []),
    ("the backup was of the upper one", [layers(0), []], [], True, [NAME], []),
    ("again after a kill", [layers(1), layers(0)], layers(0), True, [NAME], []),
    ("a hole", [layers(2), []], layers(0), True, [], [f"{NAME}.2"]),
    ("a number is missing", [layers(3), layers(1)], layers(0), True, [], [f"{NAME}.3", f"{NAME}.1"]),
    ("not in the topmost", [[], layers(1)], layers(0), True, [], [f"{NAME}.1"]),
    ("the base lost its own", [layers(1)], [], True, [], [f"{NAME}.1"]),
    ("a raw base", [layers(0)], None, True, [], [NAME]),
    ("an overlay on a raw base", [layers(0)], None, False, [NAME], []),
    ("inconsistent", [[bitmap(NAME, inconsistent=True)]], [], True, [], [NAME]),
    ("inconsistent below", [layers(1)], [bitmap(NAME, inconsistent=True)], True, [], [f"{NAME}.1"]),
    ("not recording", [[bitmap(NAME, recording=False)]], [], True, [], [NAME]),
    ("two backups", [[*layers(1), *layers(0, name=OTHER)]], layers(0), True, [NAME, OTHER], []),
    ("somebody else's, in an image that goes", [[bitmap("x")]], [], True, [], ["x"]),
    ("somebody else's, carried over", [[bitmap("x")], [bitmap("y")]], [], False, ["x"], ["y"]),
]


@pytest.mark.parametrize(("going", "base", "into_base", "merged", "lost"), [each[1:] for each in CASES],
                         ids=[each[0] for each in CASES])  # fmt: skip
def test_plan(
    going: list[list[t.Any]], base: list[t.Any] | None, into_base: bool, merged: list[str], lost: list[str]
) -> None:
    merges, gone = plan_bitmaps([(f"image{n}", entries) for n, entries in enumerate(going)], base, into_base=into_base)
    assert ([merge.name for merge in merges], gone) == (merged, lost)


def test_what_is_merged() -> None:
    going = [("top", [bitmap(f"{NAME}.2", granularity=32768)]), ("middle", layers(1))]
    (merge,), _lost = plan_bitmaps(going, layers(0), into_base=True)
    assert merge == Merge(NAME, 32768, (("top", f"{NAME}.2"), ("middle", f"{NAME}.1")), make=False)
    (merge,), _lost = plan_bitmaps(going, layers(0), into_base=False)
    assert (merge.name, merge.make) == (f"{NAME}.1", True)


def test_a_stopped_one_stays_stopped() -> None:
    (merge,), _lost = plan_bitmaps([("top", [bitmap("x", recording=False)])], [], into_base=False)
    assert (merge.make, merge.recording) == (True, False)
