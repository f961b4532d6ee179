# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""A new image takes the place of one that shows the same content; the old one is kept under another name, when asked.

Under the name there is at every moment the old image or the finished new one::

    make NEW (hidden) -> [link old to ASIDE] -> record, when it changes -> rename NEW over the name

A record is written before the image that it is about: until then it names an image that is not below, and is not
believed; the next run writes it again. The caller holds the image.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import secrets
import shutil
import typing as t
from datetime import datetime, timezone

from .._errors import FileFailed
from .._image.snapshot_record import SnapshotRecord, read_record, write_record
from .._repository._files import named, sync_directory
from .._repository.space import require

_ASIDE = "before-rebase"
_TIME = "%Y%m%dT%H%M%SZ"
_CLONE = 0x40049409  # FICLONE
_PIECE = 16 << 20

Make = t.Callable[[str], t.Awaitable[None]]


def aside_name(image: str) -> str:
    """A name that nothing has yet, for the old image: with the time in it, and a number when that is taken."""
    first = f"{image}.{_ASIDE}-{datetime.now(timezone.utc).strftime(_TIME)}"
    names = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


async def swap(image: str, make: Make, *, aside: str | None, record: SnapshotRecord | None) -> None:
    """Put what ``make`` makes under the name it is given in the place of ``image``.

    :raise BlockOpsError: it did not happen, and what was begun is removed.
    """
    directory, name = os.path.split(image)
    new, old = os.path.join(directory, f".{name}.{secrets.token_hex(4)}.rebasing"), read_record(image)
    try:
        await make(new)
        with named(image, "putting the new image in its place"):
            _take_after(new, image)
            if aside is not None:
                os.link(image, aside)
            if record is not None:
                write_record(record)
            sync_directory(directory)
            os.rename(new, image)
            sync_directory(directory)
    except BaseException:
        _remove(new)
        with contextlib.suppress(OSError, FileFailed):
            recover(image)
            if record is not None and old is not None:
                write_record(old)
        raise


def _take_after(new: str, image: str) -> None:
    """Owner, mode, ACL, label of the image; and on disk before its name is."""
    status = os.stat(image)
    if os.geteuid() == 0:
        os.chown(new, status.st_uid, status.st_gid)
    shutil.copystat(image, new)
    os.utime(new)
    fd = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def leftovers(image: str) -> list[str]:
    """What killed runs left: unfinished images, and second names of the image itself."""
    directory, name = os.path.split(image)
    unfinished = re.compile(re.escape(f".{name}.") + r"[0-9a-f]{8}\.rebasing")
    aside = re.compile(re.escape(name) + rf"\.{_ASIDE}-\d{{8}}T\d{{6}}Z(-\d+)?")
    with named(directory, "looking for what a killed run left"):
        names = sorted(os.listdir(directory))
        found = [os.path.join(directory, entry) for entry in names if unfinished.fullmatch(entry)]
        second = [os.path.join(directory, entry) for entry in names if aside.fullmatch(entry)]
        return found + [path for path in second if os.path.samefile(path, image)]


def recover(image: str) -> list[str]:
    """Remove what killed runs left beside the image. What was done, in words."""
    found = leftovers(image)
    with named(image, "cleaning up after a killed run"):
        for path in found:
            _remove(path)
    return [f"removed the unfinished {os.path.basename(path)}" for path in found]


def duplicate(image: str, new: str) -> None:
    """A file of the same bytes: sharing them where the file system can, else a copy with the same holes."""
    with named(new, "copying the image"), open(image, "rb", buffering=0) as source, open(new, "xb") as target:
        try:
            fcntl.ioctl(target.fileno(), _CLONE, source.fileno())
        except OSError:  # the file system cannot, each says so in its own way
            status = os.fstat(source.fileno())
            require(os.path.dirname(new), status.st_blocks * 512, f"A copy of {image}")
            os.ftruncate(target.fileno(), status.st_size)
            _copy_data(source.fileno(), target.fileno(), status.st_size)


def _copy_data(source: int, target: int, size: int) -> None:
    position = 0
    while position < size:
        try:
            position = os.lseek(source, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return  # nothing but holes up to the end
            raise
        end = os.lseek(source, position, os.SEEK_HOLE)
        while position < end:
            data = memoryview(os.pread(source, min(_PIECE, end - position), position))
            while data:
                count = os.pwrite(target, data, position)
                data, position = data[count:], position + count


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
