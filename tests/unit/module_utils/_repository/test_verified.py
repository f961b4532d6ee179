# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The record of a verification, to and from disk."""

from __future__ import annotations

import json
import typing as t
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._repository.verified import (
    CheckRecord,
    Verification,
    manifest_digest,
    read_record,
    write_record,
)

NOW = datetime(2026, 11, 23, 5, 45, tzinfo=timezone.utc)
ID = "20261123T054500Z-1f3c9a2e"


def check(name: str, outcome: str = "passed", days: int = 0) -> CheckRecord:
    moment = NOW + timedelta(days=days)
    failed = {"kind": "X", "message": "it\x1b[31m broke"} if outcome == "failed" else {}
    return CheckRecord(name, outcome, moment, moment, 1.5, 7, conditions=("agent",), host="hv1", **failed)


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    directory = tmp_path / ID
    directory.mkdir()
    (directory / "manifest.json").write_text("{}")
    (directory / "manifest.json").chmod(0o440)
    return directory


def record(*checks: CheckRecord) -> Verification:
    return Verification(ID, ((ID, "0" * 64),), checks)


def test_there_and_back(backup: Path) -> None:
    written = record(check("chain"), check("drill"))
    write_record(str(backup), written)
    assert read_record(str(backup)) == written
    assert (backup / "verified.json").stat().st_mode & 0o777 == 0o440
    assert sorted(path.name for path in backup.iterdir()) == ["manifest.json", "verified.json"]


def test_sentences_are_cleaned(backup: Path) -> None:
    write_record(str(backup), record(check("chain", "failed")))
    found = read_record(str(backup))
    assert found is not None
    assert found.checks[0].message == "it [31m broke"


def test_newer_results_replace_their_own_check_only() -> None:
    old = record(check("chain"), check("checksums"), check("drill", days=-7))
    new = old.with_checks([check("chain", days=1), check("checksums", "failed", 1)])
    assert [(each.name, each.outcome) for each in new.checks] == [
        ("chain", "passed"),
        ("checksums", "failed"),
        ("drill", "passed"),
    ]
    assert (old.outcome, new.outcome) == ("passed", "failed")
    assert new.finished == NOW + timedelta(days=1)


CHANGES: dict[str, t.Callable[[dict[str, t.Any]], t.Any]] = {
    "newer format": lambda r: r.update(format=2),
    "of another backup": lambda r: r.update(backup="20261123T054500Z-00000000"),
    "no checks": lambda r: r.update(checks=[]),
    "unknown check": lambda r: r["checks"][0].update(name="luck"),
    "unknown outcome": lambda r: r["checks"][0].update(outcome="maybe"),
    "no time": lambda r: r["checks"][0].update(finished="yesterday"),
    "negative": lambda r: r["checks"][0].update(bytes=-1),
    "digest": lambda r: r["manifests"][0].update(sha256="abc"),
    "control characters": lambda r: r["checks"][0].update(host="a\nb"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_cannot_be_understood_is_no_record(backup: Path, change: t.Callable[[dict[str, t.Any]], t.Any]) -> None:
    text = json.loads(record(check("chain")).to_json())
    change(text)
    (backup / "verified.json").write_text(json.dumps(text))
    assert read_record(str(backup)) is None


def test_links_and_absence(backup: Path, tmp_path: Path) -> None:
    assert read_record(str(backup)) is None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(record(check("chain")).to_json())
    (backup / "verified.json").symlink_to(elsewhere)
    assert read_record(str(backup)) is None
    assert manifest_digest(str(tmp_path / "none")) is None
