# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Verification of repositories that qemu-img and qemu-io made: damage is found, records are bound to what they saw."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import typing as t
from pathlib import Path

import pytest

from support.fabricate import MIB, Fabricated, fabricate, identical, tool
from support.forked import run_forked
from support.killer import Trap
from support.module import Result, run_module

NOBODY = 65534


@pytest.fixture
def made(workdir: Path) -> Fabricated:
    """A chain of 3 with two drives."""
    return fabricate(workdir / "repository", sizes={"disk0": 8 * MIB, "data": 4 * MIB})


def verify(made: Fabricated, *, check: bool = False, user: int | None = None, **more: t.Any) -> Result:
    params = {"repository": str(made.path), "_ansible_diff": True, **more}
    return run_forked("backup_verify", params, None, check=check, user=user)


def listed(made: Fabricated) -> list[dict[str, t.Any]]:
    """What backup_info says of the backups, newest first."""
    return list(run_forked("backup_info", {"repository": str(made.path)}, None).ok().data["vms"][0]["backups"])


def record_of(made: Fabricated, number: int) -> dict[str, t.Any] | None:
    path = made.manifest_path(number).with_name("verified.json")
    return dict(json.loads(path.read_text())) if path.exists() else None


def backups(result: Result) -> list[dict[str, t.Any]]:
    return list(result.data["backups"])


def kinds(result: Result) -> list[str | None]:
    return [entry.get("error", {}).get("kind") for entry in backups(result)]


def flip(path: Path, *, back: int = 1000) -> None:
    path.chmod(0o600)
    with path.open("r+b") as stream:
        stream.seek(-back, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))


def test_newest_is_verified_and_signed_off(made: Fabricated) -> None:
    before = made.state()
    result = verify(made).ok()
    assert result.changed
    (entry,) = backups(result)
    assert (entry["backup"], entry["outcome"], entry["images"]) == (made.ids[2], "passed", 6)
    assert [check["name"] for check in entry["checks"]] == ["chain", "checksums", "images"]
    assert entry["checks"][1]["bytes"] == sum(made.image(n, d).stat().st_size for n in range(3) for d in made.sizes)
    record = record_of(made, 2)
    assert record is not None
    assert {item["backup"]: item["sha256"] for item in record["manifests"]} == {
        made.ids[n]: hashlib.sha256(made.manifest_path(n).read_bytes()).hexdigest() for n in range(3)
    }
    after = made.state()
    new = {path for path in after if path not in before}
    assert new == {made.manifest_path(2).with_name("verified.json")}
    touched = {path for path in before if after[path] != before[path]}
    assert touched == {made.manifest_path(2).parent}, "nothing but the record, in its directory"
    assert (min(new).stat().st_mode & 0o222) == 0


def test_check_mode_predicts(made: Fabricated) -> None:
    before = made.state()
    predicted = verify(made, check=True, point="all").ok()
    assert made.state() == before
    real = verify(made, point="all").ok()
    assert predicted.data["diff"] == real.data["diff"]
    assert [e["changed"] for e in backups(predicted)] == [e["changed"] for e in backups(real)] == [True] * 3
    assert [e["backup"] for e in backups(real)] == made.ids
    again = verify(made, check=True, point="all", max_age="1h").ok()
    assert not again.changed
    assert again.data["diff"]["before"] == again.data["diff"]["after"]


def test_verified_ones_are_left_alone(made: Fabricated) -> None:
    verify(made, point=made.ids[0], vm=["web1"]).ok()
    result = verify(made, point="unverified").ok()
    assert [entry["backup"] for entry in backups(result)] == made.ids[1:]
    state = made.state()
    assert not verify(made, point="unverified").ok().changed
    for point in ("latest", "all"):
        assert not verify(made, point=point, max_age="1d").ok().changed
    assert made.state() == state
    assert verify(made, max_age="0s").ok().changed
    more_checks = verify(made, point="unverified", checks=["checksums", "images", "drill"], check=True).ok()
    assert len(backups(more_checks)) == 3


def test_a_flipped_byte_is_found_and_the_others_go_on(made: Fabricated) -> None:
    verify(made, point="all").ok()
    flip(made.image(1))
    result = verify(made, point="all")
    assert result.failed
    assert kinds(result) == [None, "ChecksumMismatch", "ChecksumMismatch"]
    assert "2 of 3" in result.msg
    assert str(made.image(1)) in result.msg
    record = record_of(made, 2)
    assert record is not None
    assert record["outcome"] == "failed"
    info = listed(made)
    assert [entry["verified"]["outcome"] for entry in info] == ["failed", "failed", "passed"]
    flip(made.image(1))
    repaired = verify(made, point="unverified").ok()
    assert [entry["backup"] for entry in backups(repaired)] == made.ids[1:]


def test_damage_with_a_right_checksum_is_found_by_the_check(made: Fabricated) -> None:
    image = made.image(0)
    image.chmod(0o600)
    with image.open("r+b") as stream:  # the pointer to the refcount table
        stream.seek(48)
        table = int.from_bytes(stream.read(8), "big")
        stream.seek(table)
        stream.write(bytes(8))
    made.reseal(0)
    verify(made, vm=["web1"], point=made.ids[0], checks=["checksums"]).ok()
    assert kinds(verify(made, vm=["web1"], point=made.ids[0])) == ["ImageToolFailed"]


def drop_parent(made: Fabricated) -> None:
    shutil.rmtree(made.manifest_path(1).parent)


def foreign_backing(made: Fabricated) -> None:
    made.image(1).chmod(0o600)
    tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd", made.image(1))
    made.reseal(1)


def truncated(made: Fabricated) -> None:
    made.image(1).chmod(0o600)
    os.truncate(made.image(1), made.image(1).stat().st_size - 65536)


@pytest.mark.parametrize(
    ("damage", "kind"), [(drop_parent, "ChainBroken"), (foreign_backing, "ImageInvalid"), (truncated, "ChainBroken")]
)
def test_broken_chains(made: Fabricated, damage: t.Callable[[Fabricated], None], kind: str) -> None:
    damage(made)
    predicted = verify(made, check=True)
    result = verify(made)
    assert kinds(predicted) == kinds(result) == [kind]
    assert result.changed
    assert predicted.data["diff"] == result.data["diff"]
    record = record_of(made, 2)
    assert record is not None
    assert [(check["name"], check["outcome"], check["kind"]) for check in record["checks"]] == [
        ("chain", "failed", kind)
    ]


def test_a_refused_manifest_is_reported(made: Fabricated) -> None:
    made.edit(1, lambda manifest: manifest.update(id=made.ids[0]))
    result = verify(made, point="all")
    assert kinds(result) == ["ManifestInvalid", None, "ChainBroken"]
    assert kinds(verify(made, vm=["web1"], point=made.ids[1])) == ["ManifestInvalid"]


def test_a_replaced_parent_makes_the_record_worthless(made: Fabricated) -> None:
    verify(made).ok()
    made.edit(0, lambda manifest: manifest.update(tags=["changed"]))
    info = listed(made)[0]
    assert info["verified"]["current"] is False
    assert verify(made, max_age="1d").ok().changed
    info = listed(made)[0]
    assert info["verified"]["current"] is True


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1, "backup": "../x"}', "[" * 100000])
def test_a_damaged_record_counts_for_nothing(made: Fabricated, text: str) -> None:
    made.manifest_path(2).with_name("verified.json").write_text(text)
    info = listed(made)[0]
    assert info["verified"] is None
    assert verify(made, max_age="1d").ok().changed
    assert not verify(made, max_age="1d").ok().changed


def test_restore_is_as_before(made: Fabricated, workdir: Path) -> None:
    verify(made, point="all").ok()
    out = workdir / "out"
    out.mkdir()
    run_module("backup_restore", {"repository": str(made.path), "vm": "web1", "dest": str(out)}).ok()
    assert identical(out / "disk0.qcow2", "qcow2", made.witness(2), "raw")


def test_read_only_repository(made: Fabricated) -> None:
    for path in made.path.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o444)
    made.path.chmod(0o755)
    for check in (True, False):
        assert kinds(verify(made, user=NOBODY, check=check)) == ["TargetUnwritable"]
    state = made.state()
    result = verify(made, user=NOBODY, record=False).ok()
    assert not result.changed
    assert backups(result)[0]["outcome"] == "passed"
    assert made.state() == state


def test_files_without_checksum_are_named(made: Fabricated) -> None:
    made.edit(0, lambda manifest: manifest["drives"][0].update(sha256=None))
    result = verify(made).ok()
    assert backups(result)[0]["without_checksum"] == [str(made.image(0))]
    assert any("no checksum" in warning for warning in result.warnings)


def test_a_damaged_saved_file(made: Fabricated) -> None:
    saved = made.save_file(2, Path("/etc/vm.conf"), b"memory 1G")
    verify(made).ok()
    saved.write_bytes(b"memory 2G")
    assert kinds(verify(made)) == ["ChecksumMismatch"]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"repository": "/nowhere/at/all"}, "RepositoryMissing"),
        ({"point": "20261123T235900Z-00000000"}, "InputInvalid"),
        ({"point": "yesterday"}, "InputInvalid"),
        ({"vm": ["nobody"]}, "BackupMissing"),
        ({"max_age": "soon"}, "InputInvalid"),
        ({"max_parallel": 0}, "InputInvalid"),
        ({"checks": ["drill"], "work_directory": "/nowhere/at/all"}, "TargetUnwritable"),
        ({"checks": ["drill"], "work_directory": "/" + "x" * 90}, "InputInvalid"),
        ({"checks": ["drill"], "drill": {"qemu": "no-such-qemu"}}, "ProgramMissing"),
        ({"checks": ["drill"], "drill": {"console": "("}}, "InputInvalid"),
        ({"checks": ["drill"], "drill": {"agent": False}}, "InputInvalid"),
        ({"checks": ["drill"], "drill": {"arguments": ["-nic", "user"]}}, "InputInvalid"),
    ],
)
def test_bad_input(made: Fabricated, options: dict[str, t.Any], kind: str) -> None:
    state = made.state()
    for check in (True, False):
        result = verify(made, check=check, **options)
        assert result.failed
        assert result.data["error"]["kind"] == kind, result.msg
    assert made.state() == state


def test_temporaries_of_a_killed_run_go(made: Fabricated) -> None:
    left = made.manifest_path(2).with_name(".verified.json.01234567.tmp")
    left.write_text("{")
    verify(made).ok()
    assert not left.exists()


def test_killed_at_every_step(made: Fabricated, workdir: Path) -> None:
    """The record is the old one, the new one, or not there; the next run is as if nothing had happened."""
    verify(made, checks=["images"]).ok()
    old = record_of(made, 2)
    log = workdir / "log"
    params = {"repository": str(made.path), "checks": []}
    run_forked("backup_verify", params, Trap(log=str(log))).ok()
    steps = len(log.read_text().splitlines())
    assert steps > 5
    for number in range(steps):
        assert run_forked("backup_verify", params, Trap(number=number)).rc == -signal.SIGKILL
        record = record_of(made, 2)
        assert record is not None
        assert old is not None
        assert [check["name"] for check in record["checks"]] == [check["name"] for check in old["checks"]]
    verify(made, checks=[]).ok()
    assert sorted(os.listdir(made.manifest_path(2).parent)) == [
        "data.qcow2",
        "disk0.qcow2",
        "manifest.json",
        "verified.json",
    ]
