# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The manifest of a backup, to and from JSON. Pure.

A manifest is read as hostile input: it names files that are opened, so whatever is not exactly of the documented shape
is refused before anything acts on it. Keys it does not know are ignored.
"""

from __future__ import annotations

import json
import typing as t
from dataclasses import dataclass
from datetime import datetime

from .._errors import FormatUnsupported, ManifestInvalid
from ._fields import Fields, clean
from .names import DEFINITION, encode_name, is_backup_id, is_image_file, is_repository_id, parse_timestamp, timestamp

FORMAT = 1
MAX_BYTES = 16 << 20
LEVELS = ("full", "incremental", "differential", "copy")
CHAINED = ("incremental", "differential")
SYNCS = ("full", "bitmap", "top", "none", "incremental")
CONSISTENCIES = ("filesystem", "crash")


@dataclass(frozen=True)
class SourceRecord:
    """The active image at that time. Information only: nothing is ever opened by it."""

    file: str | None
    format: str | None
    serial: str | None = None


@dataclass(frozen=True)
class DriveRecord:
    """One image of a backup; sizes in bytes. See docs/repository_format.md for every key."""

    name: str
    file: str
    level: str
    virtual_size: int
    size: int
    copied: int
    parent: str | None = None
    reason: str | None = None
    standalone: bool = True
    node: str | None = None
    sha256: str | None = None
    source: SourceRecord = SourceRecord(None, None)


@dataclass(frozen=True)
class SkippedDrive:
    name: str
    reason: str


@dataclass(frozen=True)
class DefinitionRecord:
    """A file saved with the backup: where it came from, where it lies (``definition/N``), what it was."""

    path: str
    file: str
    mode: int
    uid: int
    gid: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A published backup. Times are aware datetimes, ``freeze_ms`` milliseconds."""

    id: str
    repository: str
    sequence: int
    vm_name: str
    vm_uuid: str | None
    level: str
    sync: str
    consistency: str
    point: datetime
    started: datetime
    finished: datetime
    drives: tuple[DriveRecord, ...]
    freeze_ms: float | None = None
    tags: tuple[str, ...] = ()
    skipped: tuple[SkippedDrive, ...] = ()
    definition: tuple[DefinitionRecord, ...] = ()
    qemu_version: str | None = None
    collection: str = ""
    warnings: tuple[str, ...] = ()

    def drive(self, name: str) -> DriveRecord | None:
        """The record of the drive, or ``None`` when this backup does not have it."""
        return next((drive for drive in self.drives if drive.name == name), None)

    def to_json(self) -> str:
        """The text of ``manifest.json``. Sentences that came from elsewhere lose their control characters."""
        return json.dumps(
            {
                "format": FORMAT,
                "id": self.id,
                "repository": self.repository,
                "sequence": self.sequence,
                "vm": {"name": self.vm_name, "uuid": self.vm_uuid},
                "level": self.level,
                "sync": self.sync,
                "consistency": self.consistency,
                "point": timestamp(self.point),
                "started": timestamp(self.started),
                "finished": timestamp(self.finished),
                "freeze_ms": self.freeze_ms,
                "tags": list(self.tags),
                "drives": [_drive_json(drive) for drive in self.drives],
                "skipped": [{"name": clean(skip.name), "reason": clean(skip.reason)} for skip in self.skipped],
                "definition": [{**vars(record), "mode": f"{record.mode:04o}"} for record in self.definition],
                "qemu": {"version": self.qemu_version},
                "collection": self.collection,
                "warnings": [clean(text) for text in self.warnings],
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, data: bytes, path: str, *, backup_id: str, vm_directory: str) -> Manifest:
        """The manifest at ``path`` (for messages) of backup ``backup_id`` below the directory ``vm_directory``.

        :raise FormatUnsupported: a newer version of the format.
        :raise ManifestInvalid: anything that is not as documented, or that belongs to another backup or VM.
        """
        fields = Fields(_parse(data, path), path, "")
        found = fields.integer("format", 1, 1 << 30)
        if found > FORMAT:
            raise FormatUnsupported(path=path, found=found, known=FORMAT)
        manifest = _manifest(fields)
        if manifest.id != backup_id:
            raise ManifestInvalid(path=path, reason=f"it is the manifest of {manifest.id}, not of {backup_id}")
        if encode_name(manifest.vm_name) != vm_directory:
            raise ManifestInvalid(
                path=path, reason=f"it belongs to VM {manifest.vm_name!r}, whose directory is another one"
            )
        return manifest


def _parse(data: bytes, path: str) -> t.Any:
    if len(data) > MAX_BYTES:
        raise ManifestInvalid(path=path, reason=f"it is larger than {MAX_BYTES} bytes")
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as exc:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ManifestInvalid(path=path, reason=f"it is not JSON ({exc})") from exc


def _drive_json(drive: DriveRecord) -> dict[str, t.Any]:
    source = {key: None if value is None else clean(value) for key, value in vars(drive.source).items()}
    reason = None if drive.reason is None else clean(drive.reason)
    return {**vars(drive), "reason": reason, "source": source}


def _manifest(fields: Fields) -> Manifest:
    vm = fields.object("vm")
    drives = tuple(_drive(item) for item in fields.objects("drives"))
    _check_drives(fields, drives)
    return Manifest(
        id=fields.matching("id", is_backup_id, "a backup id"),
        repository=fields.matching("repository", is_repository_id, "a repository id"),
        sequence=fields.integer("sequence", 1, 1 << 53),
        vm_name=vm.text("name"),
        vm_uuid=vm.optional_text("uuid"),
        level=fields.choice("level", LEVELS),
        sync=fields.choice("sync", SYNCS),
        consistency=fields.choice("consistency", CONSISTENCIES),
        point=_time(fields, "point"),
        started=_time(fields, "started"),
        finished=_time(fields, "finished"),
        drives=drives,
        freeze_ms=fields.optional_number("freeze_ms"),
        tags=fields.texts("tags"),
        skipped=tuple(SkippedDrive(item.text("name"), item.text("reason")) for item in fields.objects("skipped")),
        definition=tuple(_definition(item, n) for n, item in enumerate(fields.objects("definition"))),
        qemu_version=fields.object("qemu").optional_text("version"),
        collection=fields.text("collection", empty=True),
        warnings=fields.texts("warnings"),
    )


def _check_drives(fields: Fields, drives: tuple[DriveRecord, ...]) -> None:
    if not drives:
        raise fields.wrong("drives", "there is none")
    for key in ("name", "file"):
        values = [getattr(drive, key) for drive in drives]
        if len(set(values)) != len(values):
            raise fields.wrong("drives", f"two have the same {key}")


def _drive(item: Fields) -> DriveRecord:
    name = item.text("name")
    level = item.choice("level", LEVELS)
    parent = item.optional_matching("parent", is_backup_id, "a backup id")
    standalone = item.boolean("standalone")
    if (parent is not None) != (level in CHAINED):
        raise item.wrong("parent", f"{parent} does not go with level {level}")
    if parent is not None and not standalone:
        raise item.wrong("standalone", "false does not go with a parent")
    source = item.object("source")
    return DriveRecord(
        name=name,
        file=item.matching("file", is_image_file, "a plain file name ending in .qcow2"),
        level=level,
        reason=item.optional_text("reason"),
        parent=parent,
        standalone=standalone,
        node=item.optional_text("node"),
        virtual_size=item.size("virtual_size"),
        size=item.size("size"),
        copied=item.size("copied"),
        sha256=item.optional_sha256("sha256"),
        source=SourceRecord(*(source.optional_text(key) for key in ("file", "format", "serial"))),
    )


def _definition(item: Fields, number: int) -> DefinitionRecord:
    path = item.text("path")
    if not path.startswith("/") or ".." in path.split("/"):
        raise item.wrong("path", f"{path!r} is not an absolute path without ..")
    file = item.text("file")
    if file != f"{DEFINITION}/{number}":
        raise item.wrong("file", f"{file!r} is not {DEFINITION}/{number}")
    return DefinitionRecord(
        path=path,
        file=file,
        mode=item.mode("mode"),
        uid=item.integer("uid", 0, (1 << 32) - 1),
        gid=item.integer("gid", 0, (1 << 32) - 1),
        size=item.size("size"),
        sha256=item.sha256("sha256"),
    )


def _time(fields: Fields, key: str) -> datetime:
    try:
        return parse_timestamp(fields.text(key))
    except ValueError as exc:
        raise fields.wrong(key, str(exc)) from exc
