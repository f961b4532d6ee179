# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What pruning is asked for, what it finds, and what it will do: data only."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from .._errors import BlockOpsError
from .._repository.manifest import Manifest
from .._repository.merge import Leftover
from .._repository.retention import Policy

KEEP, REMOVE, MERGE = "keep", "remove", "merge"


class VmUnknown(BlockOpsError):
    template = "The repository {repository} has no backups of VM {vm}; it has those of: {known}."


class PruneFailed(BlockOpsError):
    """Some VMs could not be pruned; each has its own error."""

    template = "{failed} of {total} VMs could not be pruned: {what}"


class MergeDiffers(BlockOpsError):
    """The proof of a merge failed. The merged image was thrown away."""

    template = "The merged image of drive {drive} of backup {backup} does not read as its chain does ({reason})."
    advice = "Nothing was replaced or removed for it. Run backup_restore to test the chain, and report this."


class BecameBusy(BlockOpsError):
    template = "Backup {backup} of VM {vm} was opened while it was about to be removed or replaced: {reason}."
    advice = "It is there as it was. Run again when it is no longer in use."


@dataclass(frozen=True)
class Request:
    """``vms`` empty: all. ``protect`` and ``unprotect`` are ids of backups."""

    repository: str
    policy: Policy
    vms: tuple[str, ...] = ()
    merge: bool = False
    keep_newest: bool = True
    verify: bool = True
    protect: tuple[str, ...] = ()
    unprotect: tuple[str, ...] = ()
    max_parallel: int = 2
    lock_timeout: float = 30.0


@dataclass(frozen=True)
class Orphan:
    """Something that belongs to no backup: its path, what it is, and whether it goes."""

    path: str
    reason: str
    removed: bool
    size: int = 0


@dataclass(frozen=True)
class Found:
    """One VM as it is. ``held``: reasons to keep that no policy overrules; ``foreign``: who needs a backup, beside the
    manifests (unreadable ones, unfinished ones), as ``id -> sentences``.
    """

    manifests: tuple[Manifest, ...]
    broken: t.Mapping[str, str] = field(default_factory=dict)
    defects: t.Mapping[str, str] = field(default_factory=dict)
    protected: frozenset[str] = frozenset()
    foreign: t.Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    leftovers: tuple[Leftover, ...] = ()
    orphans: tuple[Orphan, ...] = ()


@dataclass(frozen=True)
class MergeStep:
    """Make drive ``drive`` of ``backup`` independent of ``absorbed`` (nearest first); ``base`` is what it stands on."""

    backup: str
    drive: str
    absorbed: tuple[str, ...]
    base: str | None


@dataclass(frozen=True)
class Verdict:
    """What happens to one backup, and why."""

    id: str
    action: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """``removals`` newest first; ``merges`` by backup, oldest first; ``owners``: whom an absorbed one goes into."""

    verdicts: tuple[Verdict, ...]
    removals: tuple[str, ...]
    merges: tuple[tuple[str, tuple[MergeStep, ...]], ...]
    owners: t.Mapping[str, frozenset[str]]

    @property
    def changes(self) -> bool:
        return bool(self.removals or self.merges)
