# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Another image takes the place of an active one, and the old one is kept under another name or deleted.

There is an image under the active name at every moment, and it is the old one or the finished new one. In between the
old one has two names; that tells the next run where a killed one stopped::

    make NEW (hidden) -> link old to ASIDE -> record of ASIDE -> record of the active name ("reverting")
    -> rename NEW over the active name -> record ("present") -> delete, when asked, from the snapshot upwards

ASIDE and the active name are one file: it had not happened, and is undone. They are two: it had, and is finished. An
image to delete is called ``.deleting-`` so that one to keep is never taken for it. The caller holds the active image.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import shutil
import typing as t
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from .._errors import FileFailed
from .._image import qemu_img
from .._image.chain import Link, rules_for, walk
from .._image.dependents import dependents
from .._image.qemu_img import Image
from .._image.snapshot_record import (
    DISCARDED,
    PRESENT,
    REVERTING,
    SnapshotRecord,
    read_record,
    record_path,
    remove_record,
    write_record,
)

_KEPT, _DELETING = "discarded", "deleting"
_TIME = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True)
class Swap:
    """What takes the place of ``active``: an overlay of ``size`` bytes on ``backing`` with ``bitmaps`` and ``record``.

    ``aside`` is the other name for the old image. ``delete``: images to delete afterwards, the active one first and
    each based on the next; empty: none.
    """

    active: str
    backing: str
    record: SnapshotRecord
    size: int
    options: t.Mapping[str, str]
    bitmaps: tuple[tuple[str, int], ...]
    delete: tuple[str, ...]
    aside: str


def free_name(active: str, *, delete: bool) -> str:
    """A name that nothing has yet, for the old image: with the time in it, and a number when that is taken."""
    first = f"{active}.{_DELETING if delete else _KEPT}-{datetime.now(timezone.utc).strftime(_TIME)}"
    names = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name) and not os.path.lexists(record_path(name)))


async def swap(plan: Swap) -> None:
    """Do it.

    :raise FileFailed, ImageToolFailed: it did not happen, and what was begun is removed.
    """
    new = _hidden(plan.active)
    try:
        await _make(plan, new)
        with _named(plan.active, "putting the new overlay in its place"):
            _put(plan, new)
    except BaseException:
        _remove(new)
        with contextlib.suppress(OSError, FileFailed):
            recover(plan.active)
        raise
    write_record(plan.record.in_state(PRESENT))
    if plan.delete:
        with _named(plan.active, "deleting the discarded images"):
            _delete((plan.aside, *plan.delete[1:]))


async def _make(plan: Swap, new: str) -> None:
    backing = Image(plan.backing, plan.record.image_format)
    await qemu_img.create(new, "qcow2", plan.size, backing=backing, options=plan.options)
    for name, granularity in plan.bitmaps:
        await qemu_img.add_bitmap(new, name, granularity)
    with _named(new, "finishing the new overlay"):
        status = os.stat(plan.active)
        if os.geteuid() == 0:
            os.chown(new, status.st_uid, status.st_gid)
        shutil.copystat(plan.active, new)  # mode, ACL, SELinux label
        os.utime(new)
        _sync(new)


def _put(plan: Swap, new: str) -> None:
    old = read_record(plan.active)
    os.link(plan.active, plan.aside)
    if old is not None:
        write_record(replace(old, overlay=plan.aside, state=DISCARDED))
    write_record(plan.record.in_state(REVERTING))
    _sync(os.path.dirname(plan.active))
    os.rename(new, plan.active)
    _sync(os.path.dirname(plan.active))


def recover(active: str) -> list[str]:
    """Finish or undo what killed runs left beside the active image. What was done, in words."""
    done: list[str] = []
    directory, name = os.path.split(active)
    with _named(directory, "looking for what a killed run left"):
        names = sorted(os.listdir(directory))
    hidden = re.compile(re.escape(f".{name}.") + r"[0-9a-f]{8}\.applying")
    aside = re.compile(re.escape(name) + rf"\.({_KEPT}|{_DELETING})-\d{{8}}T\d{{6}}Z(-\d+)?")
    with _named(active, "cleaning up after a killed run"):
        for entry in filter(hidden.fullmatch, names):
            _remove(os.path.join(directory, entry))
            done.append(f"removed the unfinished {entry}")
        for path in [os.path.join(directory, entry) for entry in names if aside.fullmatch(entry)]:
            done += _recover_one(active, path, delete=f".{_DELETING}-" in os.path.basename(path)[len(name) :])
        for path in _records_without_image(directory, names, aside):
            remove_record(path)
    return done


def _recover_one(active: str, aside: str, *, delete: bool) -> list[str]:
    if os.path.samefile(active, aside):
        _undo(active, aside)
        return [f"undid the beginning of {os.path.basename(aside)}"]
    done = []
    record = read_record(active)
    if record is not None and record.state == REVERTING:
        write_record(record.in_state(PRESENT))
        done.append(f"finished the record of {os.path.basename(active)}")
    if delete:
        _delete(_doomed(active, aside))
        done.append(f"finished deleting {os.path.basename(aside)}")
    return done


def _undo(active: str, aside: str) -> None:
    """The records first: while the second name is there, this can be done again."""
    record, kept = read_record(active), read_record(aside)
    if record is not None and record.state == REVERTING:
        if kept is not None:
            write_record(replace(kept, overlay=active, state=PRESENT))
        else:
            remove_record(active)  # the old image had none
    remove_record(aside)
    _remove(aside)


def _doomed(active: str, aside: str) -> list[str]:
    """What is left to delete of the branch whose top is ``aside``: as far as it is ours and nothing is based on it."""
    rules = rules_for(aside, ("/",))  # the names in it were looked at before it was given up
    chain = walk(aside, "qcow2", rules)
    for problem in chain.problems:
        if not os.path.lexists(problem.path) and read_record(problem.path) is not None:
            remove_record(problem.path)  # its image was deleted before the kill
    alive = {link.real for link in walk(active, "qcow2", rules).links}
    doomed: list[Link] = []
    for link in chain.links:
        directories = {os.path.dirname(active), os.path.dirname(link.real)}
        above = {other.real for other in doomed}
        if link.real in alive or read_record(link.real) is None:
            break
        if any(os.path.realpath(path) not in above for path in dependents(link.real, directories)):
            break
        doomed.append(link)
    return [link.real for link in doomed]


def _delete(images: t.Sequence[str]) -> None:
    """From the lowest up, so that what is left can still be found from the topmost one; each before its record."""
    for image in reversed(images):
        _remove(image)
        remove_record(image)
    if images:
        _sync(os.path.dirname(images[0]))


def _records_without_image(directory: str, names: t.Iterable[str], aside: t.Pattern[str]) -> list[str]:
    suffix = record_path("")
    images = [name[: -len(suffix)] for name in names if name.endswith(suffix)]
    paths = [os.path.join(directory, image) for image in images if aside.fullmatch(image)]
    return [path for path in paths if not os.path.lexists(path)]


def _hidden(active: str) -> str:
    directory, name = os.path.split(active)
    return os.path.join(directory, f".{name}.{secrets.token_hex(4)}.applying")


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _named(path: str, doing: str) -> t.Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise FileFailed(path=path, doing=doing, reason=exc.strerror or str(exc)) from exc
