# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rooms of drills: what is a leftover, and that ending one ends exactly its processes."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from ansible_collections.blockops.qemu.plugins.module_utils._guest.room import (
    VARIABLE,
    end_room,
    leftovers,
    new_room,
    remove_leftovers,
)


def test_a_living_room_is_no_leftover(tmp_path: Path) -> None:
    room = new_room(str(tmp_path))
    assert os.stat(room.directory).st_mode & 0o777 == 0o700
    assert leftovers(str(tmp_path)) == []
    os.close(room.lock)  # as when its process has gone
    assert leftovers(str(tmp_path)) == [room.directory]
    assert remove_leftovers(str(tmp_path)) == [room.directory]
    assert os.listdir(tmp_path) == []


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    for name in (".blockops-drill-xyz", "blockops-drill-01234567", ".blockops-drill-0123456789"):
        (tmp_path / name).mkdir()
    (tmp_path / ".blockops-drill-00000001").write_text("a file")
    (tmp_path / ".blockops-drill-00000002").symlink_to(tmp_path)
    fresh = tmp_path / ".blockops-drill-00000003"
    fresh.mkdir()  # its lock may be about to be made
    assert leftovers(str(tmp_path)) == []
    os.utime(fresh, (time.time() - 60,) * 2)
    assert leftovers(str(tmp_path)) == [str(fresh)]
    assert leftovers("/nowhere/at/all") == []


def test_ending_ends_its_processes_and_no_others(tmp_path: Path) -> None:
    rooms = [new_room(str(tmp_path)) for _number in range(2)]
    line = ["sh", "-c", "sleep 600 & sleep 600"]
    programs = [
        subprocess.Popen(line, env={**os.environ, VARIABLE: room.directory}, start_new_session=True) for room in rooms
    ]
    try:
        assert end_room(rooms[0].directory)
        assert programs[0].wait(5) != 0
        assert programs[1].poll() is None
        assert not os.path.exists(rooms[0].directory)
        assert end_room(rooms[0].directory), "ending it again does nothing"
    finally:
        rooms[1].end()
        programs[1].wait(5)
