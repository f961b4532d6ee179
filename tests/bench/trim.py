# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Trimming an overlay, beside ``qemu-img compare`` of the same two images, which reads as much and changes nothing.

``compare`` stops at the first difference, so the overlay that both get holds just what its backing file shows.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.case import Bench, Outcome
from bench.goals import Goal
from bench.machines import GIB, MIB, make_disk, places
from bench.measure import Contender, Group, measure
from bench.tools import ToolFailed, command, fresh
from lab import images
from support.module import run_module

OURS, CHECKED, COMPARE = "qemu_img_rebase trim", "the same in check mode", "qemu-img compare"
DIRECT, PARTLY = "qemu-img compare -T none", "qemu_img_rebase trim, a tenth differs and is kept"
_BLOCK = 8 * MIB


def run(bench: Bench) -> Outcome:
    amount = 64 * MIB if bench.quick else 2 * GIB
    home = bench.directory / "trim"
    home.mkdir()
    trim = _Trim(home, amount)
    groups = []
    for word, prepare in (("warm", _warm), ("cold", _cold)):
        group = Group(f"trim of an overlay that holds {amount // MIB} MiB, {word} page cache", COMPARE, amount)
        groups.append(measure(group, trim.contenders(prepare), bench.rounds(5), bench.report))
    groups[-1].notes.append("MB/s of the overlay; as much is read of its backing file")
    goals = [
        Goal(f"trim, {word}: times qemu-img compare of the same images", group.ratio(OURS), 1)
        for word, group in zip(("warm", "cold"), groups)
    ]
    return Outcome(groups, [] if bench.quick else goals)


class _Trim:
    """A base, an overlay that shows no more than it, and one of which a tenth was changed. They are never changed."""

    def __init__(self, home: Path, amount: int) -> None:
        self._home = home
        self._amount = amount
        self._base = make_disk(home / "base.qcow2", amount, amount, 1)
        self._same = self._overlay("same.qcow2", 0)
        self._partly = self._overlay("partly.qcow2", amount // 10)

    def _overlay(self, name: str, changed: int) -> Path:
        path = self._home / name
        shutil.copyfile(self._base, path)
        images.run_tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", self._base.name, "-F", "qcow2", path)
        if changed:
            images.fill(path, [(place * MIB, MIB, 7) for place in places(changed, self._amount, 2)])
        return path

    def contenders(self, prepare: Callable[[Path], None]) -> list[Contender]:
        def compare(*options: str) -> float:
            for path in (self._base, self._same):
                prepare(path)
            words: list[str | Path] = ["-f", "qcow2", "-F", "qcow2", *options, self._same, self._base]
            return command("qemu-img", "compare", *words)[0]

        return [
            Contender(COMPARE, compare),
            Contender(DIRECT, lambda: compare("-T", "none")),
            Contender(OURS, lambda: self._trim(self._same, prepare)),
            Contender(CHECKED, lambda: self._trim(self._same, prepare, check=True)),
            Contender(PARTLY, lambda: self._trim(self._partly, prepare)),
        ]

    def _trim(self, pristine: Path, prepare: Callable[[Path], None], *, check: bool = False) -> float:
        """Of another name for the overlay: the module puts a new file in its place."""
        place = fresh(self._home / "run")
        path = place / "overlay.qcow2"
        for source, link in ((self._base, place / self._base.name), (pristine, path)):
            os.link(source, link)
            prepare(source)
        os.sync()
        begin = time.monotonic()
        answer = run_module("qemu_img_rebase", {"path": str(path), "trim": True}, check=check).ok().data
        seconds = time.monotonic() - begin
        self._judge(path, pristine, answer, check)
        return seconds

    def _judge(self, path: Path, pristine: Path, answer: dict[str, Any], check: bool) -> None:
        kept = self._amount - (self._amount // 10 // MIB * MIB if pristine == self._partly else 0)
        if answer["dropped_bytes"] != kept or not images.compare(path, pristine):
            raise ToolFailed(f"not trimmed, or not the same any more: {answer}")
        if not check and path.stat().st_blocks * 512 > self._amount - kept + 4 * MIB:
            raise ToolFailed(f"it still takes {path.stat().st_blocks * 512} bytes")


def _warm(path: Path) -> None:
    with path.open("rb", buffering=0) as stream:
        while stream.read(_BLOCK):
            pass


def _cold(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
