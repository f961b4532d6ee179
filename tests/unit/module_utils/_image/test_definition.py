# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Start-up files replaced: attributes and links stay, copies pile up only when they differ, nobody's change is lost."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import FileFailed, TargetUnwritable
from ansible_collections.blockops.qemu.plugins.module_utils._image import definition
from ansible_collections.blockops.qemu.plugins.module_utils._image.definition import (
    DefinitionChanged,
    DefinitionUnreadable,
    keep_copy,
    read_definition,
    remove_copy,
    replace_definition,
    require_writable,
)

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "vm.conf"
    path.write_bytes(b"old\n")
    return path


def test_a_link_leads_to_the_file(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("vm.conf")
    found = read_definition(str(link))
    assert (found.path, found.real, found.content) == (str(link), str(file), b"old\n")


@pytest.mark.parametrize("kind", ["missing", "relative", "directory", "fifo", "dangling"])
def test_what_cannot_be_a_start_up_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    with pytest.raises(DefinitionUnreadable):
        read_definition("relative" if kind == "relative" else str(path))


@pytest.mark.parametrize(
    ("content", "text"), [(b"", True), (b"\xff\r\n", True), (b"a\0", False), (b"a" * ((1 << 22) + 2), False)]
)
def test_firmware_variables_are_told_from_texts(file: Path, content: bytes, text: bool) -> None:
    file.write_bytes(content)
    assert read_definition(str(file)).text is text


@ROOT_ONLY
def test_owner_mode_and_attributes_stay(file: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    os.chown(file, nobody.pw_uid, nobody.pw_gid)
    file.chmod(0o4750)
    try:
        os.setxattr(file, "user.note", b"mine")
        attributes = [b"mine"]
    except OSError:  # a file system without them
        attributes = []
    kept = keep_copy(str(file), b"old\n")
    replace_definition(str(file), b"old\n", b"new\n")
    assert file.read_bytes() == b"new\n"
    assert Path(kept).read_bytes() == b"old\n"
    for path in (file, Path(kept)):
        found = path.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (nobody.pw_uid, nobody.pw_gid, 0o4750)
        assert [os.getxattr(path, name) for name in os.listxattr(path) if name == "user.note"] == attributes
    assert sorted(os.listdir(file.parent)) == ["vm.conf", "vm.conf.before-snapshot"]


def test_copies_are_never_overwritten_and_equal_ones_are_made_once(file: Path) -> None:
    first = keep_copy(str(file), b"old\n")
    assert keep_copy(str(file), b"old\n") == first == f"{file}.before-snapshot"
    second = keep_copy(str(file), b"newer\n")
    assert keep_copy(str(file), b"newer\n") == second == f"{file}.before-snapshot.1"
    assert keep_copy(str(file), b"old\n") == first
    third = keep_copy(str(file), b"newest\n")
    assert third == f"{file}.before-snapshot.2"
    assert [Path(path).read_bytes() for path in (first, second, third)] == [b"old\n", b"newer\n", b"newest\n"]


def test_a_link_in_place_of_a_copy_is_left_alone(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"other")
    Path(f"{file}.before-snapshot").symlink_to(other)
    assert keep_copy(str(file), b"old\n") == f"{file}.before-snapshot.1"
    assert other.read_bytes() == b"other"


def test_a_file_that_somebody_else_changed(file: Path) -> None:
    with pytest.raises(DefinitionChanged):
        replace_definition(str(file), b"older\n", b"new\n")
    assert file.read_bytes() == b"old\n"
    assert os.listdir(file.parent) == ["vm.conf"]
    file.unlink()
    with pytest.raises(FileFailed):
        replace_definition(str(file), b"old\n", b"new\n")


def test_a_copy_goes_only_when_it_is_what_was_kept(file: Path) -> None:
    kept = keep_copy(str(file), b"old\n")
    remove_copy(kept, b"other\n")
    assert Path(kept).exists()
    remove_copy(kept, b"old\n")
    assert not Path(kept).exists()


def test_a_failed_replacement_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(definition.os, "rename", full)
    for act in (lambda: keep_copy(str(file), b"old\n"), lambda: replace_definition(str(file), b"old\n", b"new\n")):
        with pytest.raises(FileFailed, match="No space left"):
            act()
        assert os.listdir(file.parent) == ["vm.conf"]
    assert file.read_bytes() == b"old\n"


@ROOT_ONLY
@pytest.mark.parametrize(("mode", "allowed"), [(0o777, True), (0o755, False)])
def test_a_directory_that_cannot_be_written_is_seen_beforehand(workdir: Path, mode: int, allowed: bool) -> None:
    workdir.chmod(mode)
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            require_writable(str(workdir / "vm.conf"))
        except TargetUnwritable:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if allowed else 1)
