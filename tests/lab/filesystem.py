# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""Look into the ext4 of an image that nobody has open, with e2fsprogs: was it quiesced, what is in its files?"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.images import run_tool
from lab.process import LabError


@contextmanager
def _raw(image: str | Path, fmt: str) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(prefix="bo-") as raw:
        run_tool("qemu-img", "convert", "-f", fmt, "-O", "raw", image, raw.name)
        yield raw.name


def _e2(*argv: str, accept: tuple[int, ...] = (0,)) -> bytes:
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C"}
    done = subprocess.run(argv, capture_output=True, check=False, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode not in accept:
        raise LabError(f"{' '.join(argv)}: {done.stderr.decode(errors='replace')}")
    return done.stdout


def needs_recovery(image: str | Path, fmt: str = "qcow2") -> bool:
    """True for a crash-consistent image, False for one taken while frozen or after a clean shutdown."""
    with _raw(image, fmt) as raw:
        header = _e2("dumpe2fs", "-h", raw).splitlines()
        features = next(line for line in header if line.startswith(b"Filesystem features:"))
        return b"needs_recovery" in features.split()


def is_sound(image: str | Path, fmt: str = "qcow2") -> bool:
    """Does e2fsck find nothing to repair once the journal is replayed (in a temporary copy)?"""
    with _raw(image, fmt) as raw:
        _e2("e2fsck", "-E", "journal_only", "-fp", raw, accept=(0, 1))
        return not _e2("e2fsck", "-fn", raw, accept=(0, 4)).count(b"error")


def read_file(image: str | Path, path: str, fmt: str = "qcow2", replay: bool = True) -> bytes:
    """A file's content, ``path`` from the file system's root; with the journal replayed in a temporary copy."""
    with _raw(image, fmt) as raw:
        if replay:
            _e2("e2fsck", "-fp", raw, accept=(0, 1))
        return _e2("debugfs", "-R", f"cat {path}", raw)
