# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import (
    BackupMissing,
    ChainBroken,
    InputInvalid,
    ManifestInvalid,
)
from ansible_collections.blockops.qemu.plugins.module_utils._repository import chain
from ansible_collections.blockops.qemu.plugins.module_utils._repository.manifest import DriveRecord, Manifest

START = datetime(2026, 11, 1, tzinfo=timezone.utc)


def name(number: int) -> str:
    """Ids that sort the other way round."""
    return f"202611{30 - number:02}T000000Z-{number:08x}"


def drive(parent: int | None, label: str = "a", level: str | None = None) -> DriveRecord:
    return DriveRecord(
        name=label,
        file=f"{label}.qcow2",
        level=level or ("full" if parent is None else "incremental"),
        virtual_size=1,
        size=1,
        copied=1,
        parent=None if parent is None else name(parent),
    )


def backup(number: int, *drives: DriveRecord, level: str = "incremental") -> Manifest:
    moment = START + timedelta(days=number)
    return Manifest(
        name(number), "5e11ab1e", number, "web1", None, level, "bitmap", "crash", moment, moment, moment, drives
    )


CHAIN = [backup(1, drive(None)), backup(2, drive(1)), backup(3, drive(2)), backup(4, drive(3))]


def ids(links: list[chain.Link]) -> list[int]:
    return [manifest.sequence for manifest, _record in links]


def test_chain_from_the_point_to_its_full() -> None:
    assert ids(chain.chain(reversed(CHAIN), name(4), "a")) == [4, 3, 2, 1]
    assert ids(chain.chain(CHAIN, name(1), "a")) == [1]
    assert [manifest.sequence for manifest in chain.ordered(reversed(CHAIN))] == [1, 2, 3, 4]


BROKEN: dict[str, tuple[list[Manifest], str]] = {
    "missing": ([CHAIN[0], CHAIN[2], CHAIN[3]], "missing"),
    "no such drive": ([CHAIN[0], backup(2, drive(None, "b")), CHAIN[2], CHAIN[3]], "no drive"),
    "not older": ([backup(1, drive(None)), replace(backup(2, drive(1)), sequence=9), CHAIN[2], CHAIN[3]], "not older"),
    "loop": ([backup(1, drive(4)), *CHAIN[1:]], "not older"),
    "own parent": ([*CHAIN[:3], backup(4, drive(4))], "not older"),
    "not standalone": (
        [backup(1, replace(drive(None), standalone=False)), *CHAIN[1:]],
        "does not stand alone",
    ),
}


@pytest.mark.parametrize(("manifests", "word"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_chains(manifests: list[Manifest], word: str) -> None:
    with pytest.raises(ChainBroken) as caught:
        chain.chain(manifests, name(4), "a")
    assert word in caught.value.data["reason"]
    assert word in (chain.incomplete(manifests, manifests[-1]) or "")


def test_damage_and_broken_manifests_are_told() -> None:
    with pytest.raises(ChainBroken, match="too short"):
        chain.chain(CHAIN, name(4), "a", damage=lambda manifest, _r: "too short" if manifest.sequence == 2 else None)
    broken = {name(2): ManifestInvalid(path="/x", reason="it is rotten")}
    with pytest.raises(ChainBroken, match="rotten"):
        chain.chain([CHAIN[0], CHAIN[3], CHAIN[2]], name(4), "a", broken=broken)


def select(point: str, manifests: t.Sequence[Manifest] | None = None, **more: t.Any) -> int:
    return chain.select(CHAIN if manifests is None else manifests, point, vm="web1", repository="/r", **more).sequence


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ("latest", 4),
        (name(2), 2),
        ("before:2026-11-04", 2),
        ("before:2026-11-04T00:00:01Z", 3),
        ("before:2026-11-04T00:30:00+01:00", 2),
    ],
)
def test_select(point: str, expected: int) -> None:
    assert select(point) == expected


@pytest.mark.parametrize("point", ["before:2026-11-01", name(9)])
def test_select_nothing(point: str) -> None:
    with pytest.raises(BackupMissing) as caught:
        select(point)
    assert name(4) in caught.value.data["known"]


@pytest.mark.parametrize("point", ["newest", "before:", "before:x", "../x", ""])
def test_select_nonsense(point: str) -> None:
    with pytest.raises(InputInvalid):
        select(point)


def test_latest_passes_over_what_cannot_be_restored() -> None:
    copy = backup(5, replace(drive(None, level="copy"), standalone=False), level="copy")
    assert select("latest", [*CHAIN, copy]) == 4
    assert select("latest", [*CHAIN, replace(copy, drives=(drive(None, level="copy"),))]) == 5
    assert select(name(5), [*CHAIN, copy]) == 5
    assert select("latest", [CHAIN[0], CHAIN[2], CHAIN[3]]) == 1
    assert select("latest", [*CHAIN, backup(5, drive(None, "b"))], drives=["a"]) == 4
    broken = {name(5): ManifestInvalid(path="/x", reason="rotten")}
    with pytest.raises(ManifestInvalid):
        select(name(5), broken=broken)


def test_what_a_backup_builds_on() -> None:
    manifests = [
        backup(1, drive(None, "a"), drive(None, "b"), level="full"),
        backup(2, drive(1, "a")),
        backup(3, drive(None, "a", "copy"), drive(None, "b", "copy"), level="copy"),
        backup(4, drive(1, "a", "differential")),
    ]
    found = [chain.newest_with_drive(manifests, "a"), chain.newest_full_of_drive(manifests, "a")]
    found += [chain.newest_with_drive(manifests, "b"), chain.newest_with_drive(manifests, "c")]
    assert [manifest and manifest.sequence for manifest in found] == [4, 1, 1, None]
    assert chain.next_sequence(manifests) == 5
    assert chain.next_sequence([]) == 1
    assert chain.is_younger(manifests[0], manifests[0].point + timedelta(seconds=59), 60)
    assert not chain.is_younger(manifests[0], manifests[0].point + timedelta(seconds=60), 60)
