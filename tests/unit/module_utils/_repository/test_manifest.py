# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import typing as t
from datetime import datetime, timezone

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import FormatUnsupported, ManifestInvalid
from ansible_collections.blockops.qemu.plugins.module_utils._repository.manifest import (
    MAX_BYTES,
    DefinitionRecord,
    DriveRecord,
    Manifest,
    SkippedDrive,
    SourceRecord,
)

ID, PARENT = "20261123T054500Z-1f3c9a2e", "20261122T054500Z-00000001"
NOON = datetime(2026, 11, 23, 12, 0, 0, 5, tzinfo=timezone.utc)
DRIVE = DriveRecord(
    name="disk 0",
    file="disk%200.qcow2",
    level="incremental",
    virtual_size=1 << 30,
    size=196608,
    copied=65536,
    parent=PARENT,
    sha256="a" * 64,
    source=SourceRecord("/vms/ä.qcow2", "qcow2", None),
)
MANIFEST = Manifest(
    id=ID,
    repository="5e11ab1e",
    sequence=7,
    vm_name="web/1",
    vm_uuid=None,
    level="incremental",
    sync="bitmap",
    consistency="filesystem",
    point=NOON,
    started=NOON,
    finished=NOON,
    drives=(DRIVE,),
    freeze_ms=12.5,
    tags=("nightly",),
    skipped=(SkippedDrive("cd0", "it is read-only"),),
    definition=(DefinitionRecord("/etc/vms/web1", "definition/0", 0o640, 0, 0, 12, "b" * 64),),
    qemu_version="7.2.22",
    collection="0.1.0",
    warnings=("careful",),
)


def read(data: bytes | t.Any, backup_id: str = ID, vm_directory: str = "web%2F1") -> Manifest:
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return Manifest.from_json(text, "/r/manifest.json", backup_id=backup_id, vm_directory=vm_directory)


def plain() -> dict[str, t.Any]:
    return t.cast("dict[str, t.Any]", json.loads(MANIFEST.to_json()))


def test_round_trip() -> None:
    assert read(MANIFEST.to_json().encode()) == MANIFEST
    assert MANIFEST.drive("disk 0") == DRIVE
    assert MANIFEST.drive("disk1") is None


def test_unknown_keys_are_ignored() -> None:
    assert read({**plain(), "later": {"x": 1}}) == MANIFEST


def test_what_we_write_can_be_read_whatever_qemu_said() -> None:
    noisy = DriveRecord(**{**vars(DRIVE), "reason": "a\nb\x1b" + "x" * 100000})
    manifest = Manifest(**{**vars(MANIFEST), "drives": (noisy,), "warnings": ("one\ntwo",)})
    again = read(manifest.to_json().encode())
    assert again.warnings == ("one two",)
    assert str(again.drives[0].reason).startswith("a b x")


def test_newer_format_says_so_before_anything_else() -> None:
    with pytest.raises(FormatUnsupported) as caught:
        read({"format": 2})
    assert caught.value.data == {"path": "/r/manifest.json", "found": 2, "known": 1}


def test_belongs_elsewhere() -> None:
    with pytest.raises(ManifestInvalid):
        read(plain(), backup_id=PARENT)
    with pytest.raises(ManifestInvalid):
        read(plain(), vm_directory="web2")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff",
        b'{"format": true}',
        b'{"format": 0}',
        b'{"format": 1}',
        b'{"format": "1"}',
        b"[" * 100000,
        b'{"format": ' + b"1" * 5000 + b"}",
        b" " * (MAX_BYTES + 1),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_not_a_manifest(data: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        read(data)


def put(path: str, value: t.Any) -> dict[str, t.Any]:
    """The manifest with the value at ``a.b.0.c`` replaced (``...`` removes it)."""
    manifest = plain()
    place: t.Any = manifest
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in steps:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return manifest


BAD: list[tuple[str, t.Any]] = [
    ("id", "x"),
    ("id", None),
    ("repository", "../../.."),
    ("sequence", 0),
    ("sequence", 1.0),
    ("sequence", True),
    ("sequence", 1 << 60),
    ("vm", []),
    ("vm.name", ""),
    ("vm.name", "a\nb"),
    ("vm.uuid", 5),
    ("level", "none"),
    ("sync", "weird"),
    ("consistency", "hopeful"),
    ("point", "yesterday"),
    ("started", ...),
    ("finished", 0),
    ("freeze_ms", -1),
    ("freeze_ms", float("nan")),
    ("freeze_ms", float("inf")),
    ("tags", "nightly"),
    ("tags", [1]),
    ("drives", {}),
    ("drives", []),
    ("drives", [1]),
    ("drives.0.name", "x" * 70000),
    ("drives.0.name", "\u202e"[:0]),
    ("drives.0.file", "../x.qcow2"),
    ("drives.0.file", "/etc/passwd"),
    ("drives.0.file", ".."),
    ("drives.0.file", ".x.qcow2"),
    ("drives.0.file", "manifest.json"),
    ("drives.0.file", "x\x00.qcow2"),
    ("drives.0.parent", "../x"),
    ("drives.0.parent", None),
    ("drives.0.level", "full"),
    ("drives.0.level", "copy"),
    ("drives.0.standalone", False),
    ("drives.0.standalone", 1),
    ("drives.0.size", -1),
    ("drives.0.size", (1 << 60) + 1),
    ("drives.0.virtual_size", "1G"),
    ("drives.0.copied", None),
    ("drives.0.sha256", "A" * 64),
    ("drives.0.sha256", "a" * 63),
    ("drives.0.source", None),
    ("drives.0.source.file", ["x"]),
    ("drives.0.source.file", "a\x1b"),
    ("skipped.0.reason", ...),
    ("definition.0.path", "etc/x"),
    ("definition.0.path", "/etc/../x"),
    ("definition.0.file", "definition/1"),
    ("definition.0.file", "../x"),
    ("definition.0.mode", 416),
    ("definition.0.mode", "9999"),
    ("definition.0.uid", -1),
    ("definition.0.size", -1),
    ("definition.0.sha256", None),
    ("qemu", None),
    ("warnings", None),
]


@pytest.mark.parametrize(("path", "value"), BAD, ids=[f"{path}={str(value)[:20]!r}" for path, value in BAD])
def test_hostile_values(path: str, value: t.Any) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        read(put(path, value))
    assert "/r/manifest.json" in str(caught.value)


@pytest.mark.parametrize("key", ["name", "file"])
def test_drives_do_not_share(key: str) -> None:
    manifest = plain()
    other = {**manifest["drives"][0], "name": "disk1", "file": "disk1.qcow2"}
    assert len(read({**manifest, "drives": [manifest["drives"][0], other]}).drives) == 2
    other[key] = manifest["drives"][0][key]
    with pytest.raises(ManifestInvalid):
        read({**manifest, "drives": [manifest["drives"][0], other]})
