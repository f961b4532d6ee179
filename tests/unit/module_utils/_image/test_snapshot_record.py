# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The record beside an overlay: what is written is read again, and nothing else is taken for one."""

from __future__ import annotations

import fcntl
import json
import os
import typing as t
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import FileFailed
from ansible_collections.blockops.qemu.plugins.module_utils._image import snapshot_record as records


def record(overlay: Path, **changes: t.Any) -> records.SnapshotRecord:
    known: dict[str, t.Any] = {
        "name": "pre-patch",
        "drive": "vda",
        "overlay": str(overlay),
        "image": "/vms/base.qcow2",
        "image_format": "qcow2",
        "created": "2026-11-23T05:45:00Z",
        "state": records.PRESENT,
        "vm": "web",
        "uuid": "6b0b4b1c-0000-4000-8000-000000000001",
    }
    return records.SnapshotRecord(**{**known, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vm": None, "uuid": None},
        {"state": records.REVERTING, "running": True, "discards": ("/vms/a.qcow2", "/vms/b.qcow2")},
        {"consistency": "filesystem", "drive": "dräive \U0001f4be"},
    ],
)
def test_what_is_written_is_read_again(tmp_path: Path, changes: dict[str, t.Any]) -> None:
    written = record(tmp_path / "vda.s.qcow2", **changes)
    records.write_record(written)
    assert records.read_record(written.overlay) == written
    assert records.records_in(str(tmp_path)) == [written]
    assert os.listdir(tmp_path) == ["vda.s.qcow2.snapshot.json"]


def test_a_record_moves_with_its_overlay(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    records.write_record(record(tmp_path / "o.qcow2"))
    os.rename(tmp_path / "o.qcow2.snapshot.json", tmp_path / "elsewhere" / "o.qcow2.snapshot.json")
    found = records.read_record(str(tmp_path / "elsewhere" / "o.qcow2"))
    assert found is not None
    assert found.overlay == str(tmp_path / "elsewhere" / "o.qcow2")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        json.dumps({"format": 2, "name": "s"}).encode(),
        json.dumps({"format": 1, "state": "present", "overlay": "o.qcow2"}).encode(),
        b"[" * 100000,
    ],
)
def test_what_is_no_record_is_not_taken_for_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "o.qcow2.snapshot.json").write_bytes(content)
    assert records.read_record(str(tmp_path / "o.qcow2")) is None
    assert records.records_in(str(tmp_path)) == []


def test_a_record_of_another_overlay_is_not_this_ones(tmp_path: Path) -> None:
    records.write_record(record(tmp_path / "o.qcow2"))
    (tmp_path / "copy.qcow2.snapshot.json").write_bytes((tmp_path / "o.qcow2.snapshot.json").read_bytes())
    assert records.read_record(str(tmp_path / "copy.qcow2")) is None


@pytest.mark.parametrize("wrong", [{"state": "unheard-of"}, {"discards": "x"}, {"discards": [1]}, {"name": 1}])
def test_a_record_with_a_wrong_value_is_none(tmp_path: Path, wrong: dict[str, t.Any]) -> None:
    records.write_record(record(tmp_path / "o.qcow2"))
    path = tmp_path / "o.qcow2.snapshot.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    assert records.read_record(str(tmp_path / "o.qcow2")) is None


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.qcow2.snapshot.json")
    records.write_record(record(tmp_path / "o.qcow2"))
    os.symlink("o.qcow2.snapshot.json", tmp_path / "b.qcow2.snapshot.json")
    assert records.read_record(str(tmp_path / "a.qcow2")) is None
    assert records.read_record(str(tmp_path / "b.qcow2")) is None


def test_a_directory_that_is_not_there_has_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileFailed, match="writing the record of a snapshot failed"):
        records.write_record(record(tmp_path / "missing" / "o.qcow2"))
    assert records.records_in(str(tmp_path / "missing")) == []


def test_removing_what_is_not_there_is_done_already(tmp_path: Path) -> None:
    records.remove_record(str(tmp_path / "o.qcow2"))


def test_a_name_is_claimed_once(tmp_path: Path) -> None:
    mine, theirs = record(tmp_path / "o.qcow2"), record(tmp_path / "o.qcow2", vm="db", uuid=None)
    assert records.is_free(mine.overlay)
    assert records.claim_record(mine)
    assert not records.claim_record(theirs)
    assert records.read_record(mine.overlay) == mine
    assert not records.is_free(mine.overlay)


def test_a_claim_that_was_killed_before_it_was_written_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "o.qcow2.snapshot.json").touch()
    assert records.is_free(str(tmp_path / "o.qcow2"))
    assert records.claim_record(record(tmp_path / "o.qcow2"))


def test_a_claim_that_is_being_written_is_not(tmp_path: Path) -> None:
    with (tmp_path / "o.qcow2.snapshot.json").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert not records.claim_record(record(tmp_path / "o.qcow2"))


def test_somebody_elses_file_is_not_a_free_name(tmp_path: Path) -> None:
    (tmp_path / "o.qcow2.snapshot.json").write_text("theirs")
    assert not records.claim_record(record(tmp_path / "o.qcow2"))
    assert (tmp_path / "o.qcow2.snapshot.json").read_text() == "theirs"
