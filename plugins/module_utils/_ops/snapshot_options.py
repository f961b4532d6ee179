# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Options of qmp_snapshot as frozen data, checked for what cannot be meant together, and what its kinds share."""

from __future__ import annotations

import os
import re
import typing as t
from dataclasses import dataclass

from .._errors import BlockOpsError, InputInvalid
from .limits import wrong_limits

if t.TYPE_CHECKING:
    from .._guest.guard import ThawGuard
    from .._qmp.session import Session
    from .rendezvous import Rendezvous
    from .vm import Vm, VmEntry

# It becomes a part of file names and of names inside qcow2 images.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_FIELDS = ("{drive}", "{name}", "{vm}")


class SnapshotFailed(BlockOpsError):
    """Taking a snapshot failed and everything prepared for it is gone again."""

    template = "Snapshot {snapshot} of VM {vm} was not taken: {reason}"
    advice = "Nothing has changed: the VM runs on the images it had, and what was prepared was removed."


class SnapshotIncomplete(BlockOpsError):
    template = "VM {vm} has snapshot {snapshot} on {has}, but not on {lacks}."
    advice = "Nothing was touched. Choose another name, choose the drives by the option drives, or remove it first."


class DriveUnsuited(BlockOpsError):
    """A drive that this operation cannot work on. ``reason`` says why, ``way_out`` what to do."""

    template = "Drive {drive} of VM {vm} cannot take part in {what}: {reason}."
    advice = "Nothing was touched. {way_out}"


class JobsRunning(BlockOpsError):
    template = "VM {vm} has block jobs that have not ended ({jobs}), and {what} changes the images they work on."
    advice = (
        "Nothing was touched. Wait for them, or cancel them (a backup: qmp_drive_backup, state=cancelled). One of ours "
        "that is ready or pending was left by a run that was killed: the same task again finishes it."
    )


class ResetNotAllowed(BlockOpsError):
    template = "Going back to snapshot {snapshot} of VM {vm} throws away {lost} bytes that were written since{resets}."
    advice = "Nothing was touched. Say allow_reset=true if that is what you want; check mode shows what would be lost."


@dataclass(frozen=True)
class SnapshotOptions:
    """One call of qmp_snapshot. Time-outs in seconds, ``bandwidth`` in bytes per second for each VM.

    ``type`` is ``None`` for whatever kind of that name exists (absent, reverted). ``recovered`` has no ``name``.
    """

    name: str
    state: str = "present"
    type: str | None = None
    drives: tuple[str, ...] = ()
    exclude_drives: tuple[str, ...] = ()
    overlay_directory: str | None = None
    overlay_name: str = "{vm}-{drive}.{name}.qcow2"
    quiesce: str = "try"
    freeze_timeout: float = 10.0
    group: bool = False
    merge: str = "auto"
    bandwidth: int | None = None
    allow_reset: bool = False
    discarded: str = "keep"
    definition: tuple[str, ...] = ()
    timeout: float = 30.0
    job_timeout: float | None = None
    check_mode: bool = False

    def checked(self) -> SnapshotOptions:
        """These options, or InputInvalid when they cannot be meant."""
        reason = _wrong(self)
        if reason is not None:
            raise InputInvalid(message=reason)
        return self


def _wrong(options: SnapshotOptions) -> str | None:
    reason = _wrong_name(options)
    if reason is not None:
        return reason
    pattern = options.overlay_name
    for field in _FIELDS:
        pattern = pattern.replace(field, "x")
    if "/" in pattern or "{" in pattern or "}" in pattern or not pattern.strip("."):
        return f"overlay_name: {options.overlay_name!r} is not a file name with the fields {', '.join(_FIELDS)}."
    if "{drive}" not in options.overlay_name:
        return f"overlay_name: {options.overlay_name!r} lacks {{drive}}, so two drives would share one file."
    if options.overlay_directory is not None and not os.path.isabs(options.overlay_directory):
        return f"overlay_directory: {options.overlay_directory!r} is not an absolute path."
    times = {"timeout": options.timeout, "freeze_timeout": options.freeze_timeout}
    return wrong_limits(times, options.job_timeout, options.bandwidth)


def _wrong_name(options: SnapshotOptions) -> str | None:
    if options.state == "recovered":
        return "state=recovered is about what any run has left; omit name." if options.name else None
    if not options.name:
        return f"name: state={options.state} needs the name of a snapshot."
    if _NAME.fullmatch(options.name):
        return None
    return (
        f"name: {options.name!r} is not a snapshot's name; it has 1 to 63 letters, digits, '_', '.' and '-', and "
        "begins with a letter or digit."
    )


@dataclass(frozen=True)
class Scene:
    """What one VM's operation works with: the connection, the VM as it was observed last, and what was asked for.

    ``gone``: files that check mode has to take for deleted, because cleaning up would have deleted them by now.
    ``mended``: the definition files that cleaning up has (or would have) rewritten.
    ``stale``: (drive, overlay) of killed runs, which definition files may name although the VM never came to use them.
    """

    session: Session
    vm: Vm
    entry: VmEntry
    options: SnapshotOptions
    guard: ThawGuard | None = None
    group: Rendezvous | None = None
    gone: frozenset[str] = frozenset()
    mended: tuple[dict[str, t.Any], ...] = ()
    stale: frozenset[tuple[str, str]] = frozenset()

    @property
    def check_mode(self) -> bool:
        return self.options.check_mode

    @property
    def definition(self) -> tuple[str, ...]:
        """Files that say how the VM is started: its own go before those of the task."""
        return self.entry.definition or self.options.definition
