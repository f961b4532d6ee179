# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""Where the lab keeps what is expensive to make: the guest kernel, its initramfs, saved machine states."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def cache_directory() -> Path:
    """``$BLOCKOPS_LAB_CACHE`` or ``.cache/lab`` in the checkout; created when missing."""
    chosen = os.environ.get("BLOCKOPS_LAB_CACHE")
    directory = Path(chosen).absolute() if chosen else CHECKOUT / ".cache" / "lab"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def built_once(entry: str, build: Callable[[Path, Path], None]) -> Path:
    """The directory ``entry`` of the cache; made by ``build(work, target)`` when missing.

    Parallel runs wait for one builder; the entry appears by rename, complete or not at all; what a killed builder left
    in ``work`` is swept away by the next one.
    """
    cache = cache_directory()
    directory, work = cache / entry, cache / f".{entry}.partial"
    with (cache / f"{entry}.lock").open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            shutil.rmtree(work, ignore_errors=True)
            target = work / "finished"
            target.mkdir(parents=True)
            try:
                build(work, target)
                target.rename(directory)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return directory
