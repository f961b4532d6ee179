# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The record ``verified.json`` beside a manifest: which checks the backup has passed or failed, when, and as what.

It is bound by checksum to the manifests of all backups that the point needs, so it says nothing about a backup that was
replaced since. That is also why it is written without the VM's lock: whatever happens to the directory meanwhile, the
record never vouches for another content. It is information; no restore depends on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import typing as t
from dataclasses import dataclass
from datetime import datetime

from .._errors import FormatUnsupported, ManifestInvalid
from ._fields import Fields, clean
from ._files import own, read_small, remove_temporaries, write_atomic
from .manifest import FORMAT, MAX_BYTES
from .names import MANIFEST, is_backup_id, parse_timestamp, timestamp

VERIFIED = "verified.json"
CHAIN, CHECKSUMS, IMAGES, DRILL = CHECKS = ("chain", "checksums", "images", "drill")
PASSED, FAILED = OUTCOMES = ("passed", "failed")


@dataclass(frozen=True)
class CheckRecord:
    """How one check ended. ``bytes`` were read by it; ``kind`` and ``message`` are the error's; times are aware."""

    name: str
    outcome: str
    started: datetime
    finished: datetime
    seconds: float
    bytes: int = 0
    kind: str | None = None
    message: str | None = None
    conditions: tuple[str, ...] = ()
    host: str = ""
    collection: str = ""

    def to_result(self) -> dict[str, t.Any]:
        """As modules answer it, which is also how it stands in the file."""
        return {
            **vars(self),
            "started": timestamp(self.started),
            "finished": timestamp(self.finished),
            "message": None if self.message is None else clean(self.message),
            "conditions": [clean(text) for text in self.conditions],
        }


@dataclass(frozen=True)
class Verification:
    """The content of a record. ``manifests``: the SHA-256 of each manifest that the point needs, by backup id."""

    backup: str
    manifests: tuple[tuple[str, str], ...]
    checks: tuple[CheckRecord, ...]

    def check(self, name: str) -> CheckRecord | None:
        return next((check for check in self.checks if check.name == name), None)

    @property
    def outcome(self) -> str:
        """``passed`` when every check did, whenever it was."""
        return PASSED if all(check.outcome == PASSED for check in self.checks) else FAILED

    @property
    def finished(self) -> datetime:
        """When the newest check ended."""
        return max(check.finished for check in self.checks)

    def with_checks(self, newer: t.Iterable[CheckRecord]) -> Verification:
        """The same with newer results; those of other checks stay."""
        merged = {check.name: check for check in (*self.checks, *newer)}
        return Verification(self.backup, self.manifests, tuple(merged[name] for name in CHECKS if name in merged))

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": FORMAT,
                "backup": self.backup,
                "manifests": [{"backup": backup, "sha256": digest} for backup, digest in self.manifests],
                "outcome": self.outcome,
                "checks": [check.to_result() for check in self.checks],
            },
            indent=1,
        )


def manifest_digest(backup_directory: str) -> str | None:
    """SHA-256 of the manifest as it lies there now; ``None`` when there is none that can be read."""
    try:
        return hashlib.sha256(read_small(os.path.join(backup_directory, MANIFEST), MAX_BYTES)).hexdigest()
    except OSError:
        return None


def read_record(backup_directory: str) -> Verification | None:
    """The record of a backup; ``None`` when there is none, or none that can be understood: it is not verified then."""
    path = os.path.join(backup_directory, VERIFIED)
    try:
        fields = Fields(json.loads(read_small(path, MAX_BYTES)[:MAX_BYTES].decode()), path, "")
        record = _verification(fields)
    except (OSError, ValueError, RecursionError, ManifestInvalid, FormatUnsupported):
        return None
    return record if record.backup == os.path.basename(backup_directory) and record.checks else None


def write_record(backup_directory: str, record: Verification) -> None:
    """Put the record beside the manifest, readable for whoever may read that. :raise OSError: it cannot be done."""
    info = os.stat(os.path.join(backup_directory, MANIFEST))
    remove_temporaries(backup_directory, VERIFIED)
    mode = stat.S_IMODE(info.st_mode) & 0o444
    write_atomic(backup_directory, VERIFIED, record.to_json().encode(), mode)
    with contextlib.suppress(OSError):  # only root may, and not on every file system
        own(os.path.join(backup_directory, VERIFIED), info.st_uid, info.st_gid, mode)


def _verification(fields: Fields) -> Verification:
    if fields.integer("format", 1, 1 << 30) > FORMAT:
        raise fields.wrong("format", "it is newer than this release")
    return Verification(
        backup=fields.matching("backup", is_backup_id, "a backup id"),
        manifests=tuple(
            (item.matching("backup", is_backup_id, "a backup id"), item.sha256("sha256"))
            for item in fields.objects("manifests")
        ),
        checks=tuple(_check(item) for item in fields.objects("checks")),
    )


def _check(item: Fields) -> CheckRecord:
    return CheckRecord(
        name=item.choice("name", CHECKS),
        outcome=item.choice("outcome", OUTCOMES),
        started=parse_timestamp(item.text("started")),
        finished=parse_timestamp(item.text("finished")),
        seconds=item.optional_number("seconds") or 0.0,
        bytes=item.size("bytes"),
        kind=item.optional_text("kind"),
        message=item.optional_text("message"),
        conditions=item.texts("conditions"),
        host=item.text("host", empty=True),
        collection=item.text("collection", empty=True),
    )
