# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What a verification is asked for and what it will do (data only), and the ways in which it can end badly."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .._errors import BlockOpsError
from .._repository.chain import Link
from .._repository.manifest import Manifest
from .._repository.store import Catalogue, VmStore
from .._repository.verified import Verification
from .verify_command import Machine

ALL, UNVERIFIED = "all", "unverified"


class DrillTimeout(BlockOpsError):
    template = "The restored backup {backup} of VM {vm} did not prove itself within {timeout:g} s: {reason}."
    advice = "It was switched off. console holds the guest's last words; the backup was not changed."


class DrillEnded(BlockOpsError):
    template = "The QEMU that booted backup {backup} of VM {vm} ended (status {status}): {reason}."
    advice = "said holds its last words, console the guest's. The backup was not changed."


class DrillRefused(BlockOpsError):
    template = "The check of the restored backup {backup} of VM {vm} failed with status {status}."
    advice = "said holds what it printed, console the guest's last words. The backup was not changed."


class DrillImpossible(BlockOpsError):
    template = "Backup {backup} of VM {vm} cannot be booted: {reason}."


class BackupChanged(BlockOpsError):
    template = "Backup {backup} of VM {vm} was removed or replaced while it was verified."
    advice = "So nothing is known of what is there now. Run again."


class RecordUnwritable(BlockOpsError):
    template = "Backup {backup} of VM {vm} has {outcome}, but its record {path} could not be written: {reason}."
    advice = "record=false verifies without writing."


class VerificationFailed(BlockOpsError):
    template = "{failed} of {total} backups failed. {reasons}"


@dataclass(frozen=True)
class Drill:
    """How a point is booted, and what has to be seen within ``timeout`` seconds: all that is given, in this order."""

    machine: Machine = Machine()
    agent: bool = True
    console: re.Pattern[str] | None = None
    check: tuple[str, ...] = ()
    timeout: float = 300.0
    work_directory: str = "/var/tmp"


@dataclass(frozen=True)
class VerifyRequest:
    """``vms`` empty: all. ``max_age`` in seconds: what was verified less long ago is left alone."""

    repository: str
    vms: tuple[str, ...]
    point: str
    checks: tuple[str, ...]
    drill: Drill
    max_age: int | None = None
    record: bool = True
    max_parallel: int = 2
    collection: str = ""


@dataclass(frozen=True)
class Target:
    """A backup to look at. ``due`` is ``None`` when it is verified well enough, else why it is not."""

    store: VmStore
    found: Catalogue
    manifest: Manifest
    chains: tuple[tuple[Link, ...], ...]
    digests: tuple[tuple[str, str], ...]
    known: Verification | None
    due: str | None
    broken: BlockOpsError | None = None

    @property
    def directory(self) -> str:
        return self.store.backup_path(self.manifest)


@dataclass(frozen=True)
class Refused:
    """What was asked for and cannot even be looked at: an unreadable manifest, a VM without backups."""

    vm: str
    backup: str | None
    error: BlockOpsError
