# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The processes that have a file open: real ones, under any name of the file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ansible_collections.blockops.qemu.plugins.module_utils._image.users import Holder, holders


@contextmanager
def opened(path: Path, mode: str = "rb") -> Iterator[subprocess.Popen[bytes]]:
    code = f"import sys; stream = open(sys.argv[1], {mode!r}); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        if process.stdout is None:
            raise RuntimeError("no pipe")
        process.stdout.readline()
        yield process
    finally:
        process.communicate()


def test_holders_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x")
    (tmp_path / "link").symlink_to("image")
    (tmp_path / "hard").hardlink_to(path)
    (tmp_path / "other").write_bytes(b"x")
    with opened(path) as reader, opened(tmp_path / "hard", "r+b") as writer, opened(tmp_path / "other"):
        found = holders(str(tmp_path / "link"))
        assert [holder.pid for holder in found] == sorted([reader.pid, writer.pid])
        assert all(isinstance(holder, Holder) and "python" in holder.command for holder in found)
    assert holders(str(path)) == []


def test_our_own_process_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb"):
        assert holders(str(path)) == []


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert holders(str(tmp_path / "missing")) == []
