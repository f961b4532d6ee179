# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the catalogue says of good, damaged, foreign and unfinished repositories."""

from __future__ import annotations

import os
import shutil
import typing as t
from pathlib import Path

import pytest

from architecture.documentation import COMMON_RETURN, documentation, undocumented
from support.fabricate import Fabricated, fabricate
from support.module import Result, run_module


@pytest.fixture
def repository(tmp_path: Path) -> Fabricated:
    return fabricate(tmp_path / "repository", points=4)


def info(made: Fabricated, **more: t.Any) -> Result:
    return run_module("backup_info", {"repository": str(made.path), **more}, check=bool(len(more) % 2))


def backups(result: Result) -> list[dict[str, t.Any]]:
    return t.cast("list[dict[str, t.Any]]", result.ok().data["vms"][0]["backups"])


def test_newest_first_with_chains(repository: Fabricated) -> None:
    before = repository.state()
    result = info(repository)
    assert [backup["id"] for backup in backups(result)] == repository.ids[::-1]
    newest = backups(result)[0]
    assert newest["complete"]
    assert newest["checksums"]
    assert newest["level"] == "incremental"
    assert newest["drives"][0]["chain"] == repository.ids[::-1]
    assert newest["drives"][0]["path"] == str(repository.image(3))
    assert newest["size"] == repository.image(3).stat().st_size
    assert not result.changed
    assert result.data["point"] is None
    assert repository.state() == before


def test_selecting_a_point(repository: Fabricated) -> None:
    assert info(repository, vm="web1", point="latest").ok().data["point"]["id"] == repository.ids[3]
    found = info(repository, vm=["web1"], point="before:2026-11-03").ok().data["point"]
    assert found["id"] == repository.ids[1]
    assert info(repository, vm="web1", point=repository.ids[0]).ok().data["point"]["level"] == "full"
    for more, kind in (
        ({"vm": "web1", "point": "before:2020-01-01"}, "BackupMissing"),
        ({"vm": "web1", "point": "oldest"}, "InputInvalid"),
        ({"point": "latest"}, "InputInvalid"),
        ({"vm": "web9", "point": "latest"}, "BackupMissing"),
        ({"vm": "web1", "point": "latest", "drives": ["disk9"]}, "BackupMissing"),
    ):
        assert info(repository, **more).data["error"]["kind"] == kind


def test_damage_is_told_for_every_backup_that_needs_it(repository: Fabricated) -> None:
    repository.image(1).unlink()
    states = {backup["id"]: backup["complete"] for backup in backups(info(repository))}
    assert list(states.values()) == [False, False, False, True]
    newest = backups(info(repository))[0]
    assert str(repository.image(1)) in newest["incomplete_reason"]
    assert newest["drives"][0]["chain"] == []
    assert info(repository, vm="web1", point="latest").ok().data["point"]["id"] == repository.ids[0]


def test_broken_and_newer_manifests(repository: Fabricated) -> None:
    repository.edit(1, lambda manifest: manifest.update(format=7))
    repository.edit(2, lambda manifest: manifest["drives"][0].update(file="/etc/passwd"))
    result = info(repository).ok()
    assert [entry["kind"] for entry in result.data["vms"][0]["broken"]] == ["ManifestInvalid", "FormatUnsupported"]
    assert "unusable" in backups(result)[0]["incomplete_reason"]
    wanted = info(repository, vm="web1", point=repository.ids[1])
    assert wanted.data["error"]["kind"] == "FormatUnsupported"


def test_unfinished_and_foreign(repository: Fabricated) -> None:
    unfinished = repository.directory / ".20261123T054500Z-0000aaaa.partial"
    shutil.copytree(repository.directory / repository.ids[0], unfinished)
    (repository.path / "lost+found").mkdir()
    (repository.directory / "README").write_text("hello")
    result = info(repository).ok()
    assert [vm["name"] for vm in result.data["vms"]] == ["web1"]
    assert result.data["vms"][0]["partials"] == [{"id": "20261123T054500Z-0000aaaa", "path": str(unfinished)}]
    assert len(backups(result)) == 4


@pytest.mark.parametrize("vm", ["web 1", "ä/ö", "\"x\" 'y'", "..", "-rf", "x" * 300])
def test_names_of_vms(tmp_path: Path, vm: str) -> None:
    made = fabricate(tmp_path / "repository", points=1)
    from ansible_collections.blockops.qemu.plugins.module_utils._repository.names import encode_name

    made.edit(0, lambda manifest: manifest.update(vm={"name": vm, "uuid": None}))
    os.rename(made.directory, made.path / encode_name(vm))
    result = info(made).ok()
    assert [entry["name"] for entry in result.data["vms"]] == [vm]
    out = tmp_path / "out"
    out.mkdir()
    params = {"repository": str(made.path), "vm": vm, "dest": str(out)}
    assert run_module("backup_restore", params).ok().changed


def test_many_backups_are_listed_quickly(tmp_path: Path) -> None:
    """A year of daily incrementals."""
    made = fabricate(tmp_path / "repository", points=2)
    for number in range(2, 365):
        backup_id = f"20250101T{number // 60:02}{number % 60:02}00Z-{number:08x}"
        shutil.copytree(made.directory / made.ids[1], made.directory / backup_id, copy_function=os.link)
        made.ids.append(backup_id)

        def change(manifest: dict[str, t.Any], number: int = number) -> None:
            manifest.update(id=made.ids[number], sequence=number + 1)
            manifest["drives"][0].update(parent=made.ids[number - 1])

        made.edit(number, change)
    result = run_module("backup_info", {"repository": str(made.path)}, timeout=20)
    assert len(backups(result)) == 365
    assert len(backups(result)[0]["drives"][0]["chain"]) == 365


def test_answers_are_documented(repository: Fabricated, tmp_path: Path) -> None:
    repository.save_file(3, tmp_path / "web1.conf", b"definition")
    answers = {
        "backup_info": info(repository, vm="web1", point="latest"),
        "backup_restore": run_module(
            "backup_restore",
            {"repository": str(repository.path), "vm": "web1", "dest": str(tmp_path), "definition": "original"},
        ),
    }
    for name, result in answers.items():
        answer = {key: value for key, value in result.ok().data.items() if key not in COMMON_RETURN}
        assert undocumented(answer, documentation()[name]["return"]) == []
