# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Named errors with data: one class per situation, the words on the class.

An error says what was tried, on which object, what QEMU (or the operating system) said, and what to do next.
It never knows Ansible, and nothing ever matches on its text: decide by class or by asking QEMU.
"""

from __future__ import annotations

import typing as t


class BlockOpsError(Exception):
    """Base of every error that is the user's, QEMU's or the system's, as opposed to a bug of ours.

    ``template`` is formatted from the keyword arguments; they stay available as ``data`` (JSON-friendly values only).
    ``advice`` is the sentence that says what to do next.
    """

    template: t.ClassVar[str] = "{message}"
    advice: t.ClassVar[str] = ""

    def __init__(self, **data: t.Any) -> None:
        self.data: dict[str, t.Any] = data
        super().__init__(" ".join(part for part in (self.template.format(**data), self.advice.format(**data)) if part))

    @property
    def kind(self) -> str:
        """The class name, which playbooks may test for."""
        return type(self).__name__

    def to_result(self) -> dict[str, t.Any]:
        """What a module returns as ``error`` of one VM."""
        return {**self.data, "kind": self.kind, "message": str(self)}


class InputInvalid(BlockOpsError):
    """An option (or a combination of options) that cannot be meant."""

    template = "{message}"


class Unexpected(BlockOpsError):
    """A bug of ours, reported for the VM it struck. ``traceback`` is for whoever mends it."""

    template = "This module failed in a way nobody foresaw: {what}."
    advice = "Please report it with the traceback in this result. The next run looks and cleans up."


# -- the QMP socket and its QEMU ---------------------------------------------------------------------------------------


class SocketMissing(BlockOpsError):
    template = "There is no QMP socket at {socket}."
    advice = "Is the VM running, and was it started with -qmp unix:{socket},server=on,wait=off?"


class SocketForbidden(BlockOpsError):
    template = "The QMP socket {socket} may not be opened by user id {uid}: {reason}."
    advice = "Run the task with become, or as the user QEMU runs as."


class SocketDead(BlockOpsError):
    template = "Nobody listens on the QMP socket {socket}: {reason}."
    advice = "The QEMU process that made it has ended; start the VM, or remove the stale socket."


class SocketBusy(BlockOpsError):
    template = "The QMP socket {socket} took the connection but sent no greeting within {timeout:g} s."
    advice = (
        "A QMP socket serves one client at a time, so another one (libvirt, another tool, a running task) most likely "
        "holds it; or QEMU hangs. Start the VM with a second QMP monitor for backups."
    )


class NotQmp(BlockOpsError):
    template = "What listens on {socket} does not speak QMP: {reason}."
    advice = "Check that the path is the VM's QMP monitor, not its agent, console or HMP monitor."


class VmGone(BlockOpsError):
    template = "QEMU closed the QMP connection {socket} while {doing}."
    advice = "The VM was stopped or QEMU died. Nothing was published; run the task again when the VM is up."


class CommandFailed(BlockOpsError):
    """QEMU refused a command. ``said`` holds its own words."""

    template = "QEMU refused {command}{about}: {said}."


class CommandTimedOut(BlockOpsError):
    template = "QEMU did not answer {command} within {timeout:g} s."
    advice = "Whether it was carried out is unknown; the next run looks and cleans up. Is its storage hanging?"


class CheckModeViolation(BlockOpsError):
    """A bug of ours, caught by the session's gate: check mode may only query."""

    template = "Refused to send {command} in check mode."


# -- jobs --------------------------------------------------------------------------------------------------------------


class JobFailed(BlockOpsError):
    template = "The backup job of drive {drive} failed: {said}."


class JobStalled(BlockOpsError):
    template = "The backup job of drive {drive} is paused by an I/O error ({said})."
    advice = (
        "It is not waited for: it was cancelled and its target removed. Make room or mend the target, then run again."
    )


class JobVanished(BlockOpsError):
    template = "The backup job of drive {drive} is no longer known to QEMU, and its result with it."
    advice = "Was it dismissed by another tool, or QEMU restarted? Nothing was published; run the task again."


class CopyRunning(BlockOpsError):
    template = "VM {vm} has a running copy {backup} with sync=none, which never ends by itself, so no backup was made."
    advice = "End and publish it with state=cancelled, then run again."


class JobTimeout(BlockOpsError):
    template = "Backup {backup} is not finished after {timeout:g} s ({done} of {total} bytes)."
    advice = "It goes on inside QEMU. Run the task again to adopt and publish it, or use state=cancelled."


# -- drives and bitmaps ------------------------------------------------------------------------------------------------


class DriveUnknown(BlockOpsError):
    template = "VM {vm} has no drive {drive}; it has: {known}."


class DriveUnfit(BlockOpsError):
    template = "Drive {drive} of VM {vm} cannot be backed up: {reason}."


class NoDrives(BlockOpsError):
    template = "VM {vm} has no drive left to back up ({reasons})."


class BitmapLost(BlockOpsError):
    template = "Drive {drive} cannot continue the chain of backup {parent}: {reason}."
    advice = "on_lost_bitmap=fail forbids the full backup that would start a new chain."


class QuiesceFailed(BlockOpsError):
    template = "The guest of VM {vm} could not be frozen: {reason}."
    advice = "quiesce=required forbids going on without it. The guest was told to thaw."


class GuestFrozen(BlockOpsError):
    template = "The guest of VM {vm} may still be frozen: its agent did not confirm the thaw on {socket}.{besides}"
    advice = (
        "Thawing is tried again in the background. If the guest hangs, restart its agent or reset the VM. "
        "The state of the backup itself is in this result."
    )


# -- images and the repository -----------------------------------------------------------------------------------------


class ImageToolFailed(BlockOpsError):
    template = "{tool} failed on {image}: {said}."


class ImageToolMissing(BlockOpsError):
    template = "{tool} is not installed on this host."
    advice = "Install the QEMU image tools (Debian and Ubuntu: qemu-utils), or run the hypervisor role."


class ImageInUse(BlockOpsError):
    template = "The image {image} is open in another process: {said}."
    advice = "It was not touched. Stop the VM that uses it first."


class NoSpace(BlockOpsError):
    template = "{what} needs about {needed} bytes on {path}, and {available} are free."
    advice = "Nothing was started. Prune old backups or use another file system."


class TargetUnwritable(BlockOpsError):
    template = "Cannot write in {path}: {reason}."
    advice = "Nothing was started."


class RepositoryInvalid(BlockOpsError):
    template = "{path} is not a usable backup repository: {reason}."


class RepositoryMissing(BlockOpsError):
    template = "There is no backup repository at {path}."
    advice = "Is the file system mounted? qmp_drive_backup makes the repository with the first backup."


class RepositoryLocked(BlockOpsError):
    template = "Backups of VM {vm} are locked by {holder} for {waited:g} s already."
    advice = "Another task works on this VM. The lock goes with its process; run again when it has ended."


class FormatUnsupported(BlockOpsError):
    template = "{path} has format version {found}; this release reads up to {known}."
    advice = "It was written by a newer blockops.qemu: update the collection on this host."


class ManifestInvalid(BlockOpsError):
    template = "The manifest {path} is not valid: {reason}."
    advice = "Nothing was written. Do not trust this backup before you know who changed it."


class VmMismatch(BlockOpsError):
    template = "{path} holds backups of the VM with uuid {found}, but VM {vm} has uuid {uuid}."
    advice = "Two VMs of one name cannot share a directory: give one another name in vms, or another repository."


class BackupMissing(BlockOpsError):
    template = "No backup of VM {vm} in {repository} matches {point}; there are: {known}."


class ChainBroken(BlockOpsError):
    template = "Backup {backup} of VM {vm} cannot be restored: {reason}."
    advice = "Nothing was written. Choose an older or newer point whose chain is complete (backup_info shows them)."


class ChecksumMismatch(BlockOpsError):
    template = "{path} does not have the checksum its manifest records ({algorithm}: {found} instead of {expected})."
    advice = "The backup is damaged. Nothing was written; choose a point that does not need this file."


class DestinationExists(BlockOpsError):
    template = "{path} exists already and is not what would be restored there."
    advice = "A restore never overwrites: move the file aside or choose another destination."


# -- files (repository half) -------------------------------------------------------------------------------------------


class SpaceExhausted(NoSpace):
    """The file system filled up while something was written, in spite of (or without) a preflight."""

    template = "{path} ran out of space while {doing}: {reason}."
    advice = "What was written so far was removed, or will be by the next run."


class FileFailed(BlockOpsError):
    """The operating system refused something on a file or directory, and no better class says it."""

    template = "{path}: {doing} failed: {reason}."


class BackupExists(BlockOpsError):
    template = "Backup {backup} of VM {vm} is published already; a backup is never replaced."


class PartialIncomplete(BlockOpsError):
    template = "Backup {backup} was not published: {reason}."


class DefinitionMissing(BlockOpsError):
    template = "The file {path} cannot be saved with the backup: {reason}."
    advice = "Nothing was started. Correct the option definition."


class ImageInvalid(BlockOpsError):
    """An image whose header is not what the repository's rules and its manifest say. It was not opened by QEMU."""

    template = "The image {path} is not what its manifest says: {reason}."
    advice = "Nothing was written. Do not open this file with other tools before you know who changed it."


class DefinitionDiffers(BlockOpsError):
    template = "{path} exists and differs from the file saved with the backup."
    advice = "overwrite_definition=true replaces it and keeps the present one as {path}.before-restore."
