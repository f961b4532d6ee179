# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What the doctor of chains says: findings, and how grave each kind is."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

DANGER, WASTE, NOTE = "danger", "waste", "note"

# danger: data can be lost, or a cold start fails or differs. waste: it costs space, time or a full backup.
SEVERITY: dict[str, str] = {
    "BackingFormatMissing": DANGER,
    "BackupLeftover": WASTE,
    "BitmapOfNoBackup": WASTE,
    "BootDrift": DANGER,
    "DeepChain": WASTE,
    "DiscardedBranch": WASTE,
    "EmptiedOverlay": WASTE,
    "FilesNotVisible": NOTE,
    "ForeignBitmap": NOTE,
    "ForeignOverlay": NOTE,
    "InconsistentBitmap": WASTE,
    "InterruptedRun": WASTE,
    "LowSpace": DANGER,
    "MissingImage": DANGER,
    "OpenElsewhere": NOTE,
    "OrphanedOverlay": DANGER,
    "OverlayOfActive": DANGER,
    "ReplacedImage": DANGER,
    "RepositoryUnreadable": NOTE,
    "RevertInterrupted": DANGER,
    "StalledJob": DANGER,
    "TaskRunning": NOTE,
    "UndismissedJob": WASTE,
    "WrongBacking": DANGER,
}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be. ``object``: the file, node, bitmap or job; ``bytes`` it occupies.

    ``what`` and ``fix`` are sentences; ``fix`` says what to do about it, as exactly as that is known.
    """

    kind: str
    object: str
    what: str
    fix: str
    drive: str | None = None
    bytes: int | None = None

    def to_result(self) -> dict[str, t.Any]:
        return {
            "kind": self.kind,
            "severity": SEVERITY[self.kind],
            "drive": self.drive,
            "object": self.object,
            "bytes": self.bytes,
            "what": self.what,
            "fix": self.fix,
        }


def sorted_findings(findings: t.Iterable[Finding]) -> list[Finding]:
    """The gravest first; what is said twice, once."""
    order = (DANGER, WASTE, NOTE)
    return sorted(dict.fromkeys(findings), key=lambda one: (order.index(SEVERITY[one.kind]), one.kind, one.object))
