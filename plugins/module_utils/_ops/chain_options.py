# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Options of qmp_block_commit and qmp_block_stream as frozen data, the errors both share, and what is to be dropped."""

from __future__ import annotations

from dataclasses import dataclass

from .._block.graph import Drive
from .._errors import BlockOpsError, InputInvalid
from .limits import wrong_limits
from .snapshot_options import SnapshotOptions

COMMIT, STREAM = "commit", "stream"


class ImageNotInChain(BlockOpsError):
    template = "{option}={reference} is in the chain of none of the drives of VM {vm}; they have: {known}."
    advice = "Nothing was touched. Name an image by its file, its node name, or the name of a snapshot."


class WrongOrder(BlockOpsError):
    template = "In the chain of drive {drive} of VM {vm}, {upper} is not above {lower}."
    advice = "Nothing was touched. The active image is the topmost, its base the lowest."


class SnapshotUnknown(BlockOpsError):
    template = "VM {vm} has no snapshot {names} to keep; it has: {known}."
    advice = "Nothing was touched: a misspelt name would cost the snapshot that was meant."


class ChainTooDeep(BlockOpsError):
    template = "The chain of drive {drive} of VM {vm} cannot be brought down to {max_depth} images: {reason}."
    advice = "Nothing was touched. Raise max_depth, keep fewer snapshots, or name the images by top and base."


class ChainImageNeeded(BlockOpsError):
    """A job would change or delete an image under somebody else's feet."""

    template = "The images {images} of drive {drive} of VM {vm} cannot be merged by {how}: {reasons}."
    advice = "Nothing was touched. Delete or rebase what nobody needs; a shared base can be copied up (stream)."


class ChainJobFailed(BlockOpsError):
    template = "Merging {images} of drive {drive} of VM {vm} by {how} failed: {reason}.{done}"
    advice = "The chain is what it was before this step and the guest runs on. {state} Mend the cause and run again."


class ChainJobStalled(BlockOpsError):
    template = "Merging {images} of drive {drive} of VM {vm} by {how} was paused by an I/O error ({reason}).{done}"
    advice = "on_error={on_error} keeps the job {job} for you: mend the cause and run again, which resumes it."


class ChainJobUnfinished(BlockOpsError):
    template = "Merging {images} of drive {drive} of VM {vm} by {how} is not finished after {timeout:g} s.{done}"
    advice = "The job {job} goes on inside QEMU. Run the same task again to follow it and finish."


@dataclass(frozen=True)
class ChainOptions:
    """One call of either module. ``older_than`` in seconds, ``bandwidth`` in bytes per second for each VM.

    ``how``: commit, stream or auto. ``top`` and ``base``: the topmost and the lowest image of a range that becomes one
    image (``bottom``: the lowest that is streamed, so that the one below it stays). Otherwise a state is asked for:
    ``keep`` (snapshots that must stay), ``older_than`` and ``max_depth`` (those that may go).
    """

    how: str
    drives: tuple[str, ...] = ()
    exclude_drives: tuple[str, ...] = ()
    top: str | None = None
    base: str | None = None
    bottom: str | None = None
    max_depth: int | None = None
    keep: tuple[str, ...] | None = None
    older_than: int | None = None
    delete: bool = False
    on_error: str = "report"
    bandwidth: int | None = None
    definition: tuple[str, ...] = ()
    timeout: float = 30.0
    job_timeout: float | None = None
    streams: bool = False
    check_mode: bool = False

    @property
    def desired(self) -> bool:
        """Whether a state of the chain is asked for, and no range of images."""
        return self.max_depth is not None or self.keep is not None or self.older_than is not None

    def checked(self) -> ChainOptions:
        """These options, or InputInvalid when they cannot be meant."""
        reason = _wrong(self)
        if reason is not None:
            raise InputInvalid(message=reason)
        return self

    def for_snapshots(self) -> SnapshotOptions:
        """What the parts that work on snapshots as well need to know."""
        return SnapshotOptions(
            name="chain",
            state="absent",
            type="external",
            drives=self.drives,
            exclude_drives=self.exclude_drives,
            quiesce="off",
            bandwidth=self.bandwidth,
            definition=self.definition,
            timeout=self.timeout,
            job_timeout=self.job_timeout,
            check_mode=self.check_mode,
        )


def _wrong(options: ChainOptions) -> str | None:
    if options.desired and (options.top or options.base or options.bottom):
        return "top and base name a range of images; max_depth, keep and older_than describe a state: not both."
    if not options.streams and not (options.desired or options.top or options.base):
        return "Say what to drop: top or base, or one of max_depth, keep and older_than."
    if options.base and options.bottom:
        return "base is the image below the lowest one that is streamed, bottom that one itself: give one of them."
    if options.max_depth is not None and options.max_depth < 1:
        return f"max_depth must be at least 1, not {options.max_depth}."
    return wrong_limits({"timeout": options.timeout}, options.job_timeout, options.bandwidth)


def files_of(drive: Drive, first: int, last: int) -> str:
    """For messages: the images ``first`` to ``last`` of a chain, the topmost first; of many the ends only."""
    files = [layer.file for layer in drive.layers[first : last + 1]]
    return ", ".join(files if len(files) < 6 else [*files[:2], "...", *files[-2:]])
