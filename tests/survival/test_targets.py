# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Targets that are full, read-only, gone or not permitted: a clear error, the guest goes on, nothing is left."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import typing as t
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.backup import MIB, NOBODY, UNIT, Bench, BenchFactory
from support.forked import run_forked

SLOW = 64 * 1024
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and other users need root")


@contextmanager
def mounted(directory: Path, size: int) -> Iterator[Path]:
    """A tmpfs of ``size`` bytes."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.fixture
def small(bench: Bench, workdir: Path) -> Iterator[Bench]:
    """A bench whose repository, with one backup in it, is on a file system of 16 MiB."""
    with mounted(workdir / "small", 16 * MIB) as directory:
        bench.repository = directory / "repository"
        bench.backup().ok()
        yield bench


def fill(directory: Path, leave: int) -> Path:
    """Fill the file system up to ``leave`` bytes."""
    status = os.statvfs(directory)
    filler = directory / "filler"
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, status.f_bavail * status.f_frsize - leave)
    return filler


def error_of(bench: Bench, result: t.Any, *kinds: str) -> dict[str, t.Any]:
    """The named error; the guest works, QEMU and the tree are clean."""
    assert result.failed and result.data, result
    error = dict(result.data["vms"][0]["error"])
    assert error["kind"] in kinds, error
    bench.change()
    bench.no_leftovers()
    return error


def expect_healed(bench: Bench) -> None:
    bench.change()
    bench.backup().ok()
    assert set(bench.levels().values()) == {"incremental"}
    bench.no_leftovers()
    bench.expect_restorable()
    bench.expect_live()


@as_root
def test_a_full_target_is_noticed_before_anything_is_started(small: Bench) -> None:
    for drive in small.truth:
        small.write(drive, 0, 32)
    filler = fill(small.repository.parent, 2 * MIB)
    before = small.state()
    assert run_forked("qmp_drive_backup", small.params(), None, check=True).data["vms"][0]["error"]["kind"] == "NoSpace"
    error = error_of(small, small.backup(), "NoSpace")
    assert error["needed"] > error["available"]
    assert small.state()["nodes"] == before["nodes"]
    filler.unlink()
    expect_healed(small)


@as_root
@pytest.mark.parametrize("where", ["qmp pass_file", "qmp transaction"])
@pytest.mark.parametrize("compress", [False, True])
def test_a_target_that_fills_up_after_the_preflight(small: Bench, where: str, compress: bool) -> None:
    """The room is reserved: what fills up after that does no harm. What fills up before fails without any."""
    for drive in small.truth:
        small.write(drive, 0, 32)
    with small.stopped(where, compress=compress) as running:
        filler = fill(small.repository.parent, 0)
    result = running.finish()
    if where == "qmp transaction" and not result.failed:
        small.note()
    else:
        error_of(small, result, "NoSpace", "SpaceExhausted", "JobFailed", "CommandFailed")
    filler.unlink()
    expect_healed(small)


@pytest.mark.parametrize("adopted", [False, True])
def test_a_job_that_paused_for_want_of_space_is_not_waited_for(bench: Bench, adopted: bool) -> None:
    """Our jobs never pause by themselves; one that does all the same (here: told to) fails, now or when adopted."""
    bench.backup().ok()
    bench.change()
    with bench.stopped("qmp transaction", on_target_error="stop", wait=not adopted) as running:
        bench.break_target(1, errno.ENOSPC)
    result = running.finish()
    if adopted:
        result.ok()
        bench.vm.wait_event("BLOCK_JOB_ERROR")
        assert any("remove unfinished backup" in sentence for sentence in bench.predicted()["recovered"])
    else:
        error_of(bench, result, "JobStalled")
    expect_healed(bench)


@as_root
def test_a_read_only_target(small: Bench) -> None:
    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(small.repository.parent)], check=True)

    small.change()
    remount("ro")
    result = small.backup()
    remount("rw")
    error_of(small, result, "TargetUnwritable")
    expect_healed(small)


@pytest.mark.parametrize(
    "where", ["qmp pass_file", "qmp transaction", "after qmp transaction", "file rename in publish"]
)
def test_the_partial_directory_vanishes(bench: Bench, where: str) -> None:
    bench.backup().ok()
    bench.change()
    with bench.stopped(where) as running:
        shutil.rmtree(next(bench.store.glob(".*.partial")))
    error_of(bench, running.finish(), "FileFailed", "PartialIncomplete")
    expect_healed(bench)


def test_the_repository_vanishes(bench: Bench) -> None:
    """An unmounted disk: an error now, and when it is back the chain goes on."""
    bench.backup().ok()
    bench.change()
    away = bench.directory / "away"
    with bench.stopped("qmp transaction") as running:
        bench.repository.rename(away)
    assert running.finish().data["vms"][0]["error"]["kind"] == "FileFailed"
    away.rename(bench.repository)
    expect_healed(bench)


def test_a_repository_below_a_directory_that_is_missing(bench: Bench) -> None:
    bench.repository = bench.directory / "not mounted" / "repository"
    result = bench.backup()
    assert result.data["vms"][0]["error"]["kind"] == "TargetUnwritable"
    assert not bench.repository.parent.exists()
    assert [node for node in bench.vm.node_names() if node.startswith("bo-")] == []


@as_root
def test_qemu_may_not_enter_the_repository(bench_factory: BenchFactory) -> None:
    """QEMU runs as nobody, the repository is root's alone: it simply works."""
    bench = bench_factory(user=NOBODY)
    bench.backup().ok()
    assert bench.repository.stat().st_mode & 0o777 == 0o700
    assert bench.repository.stat().st_uid == 0
    expect_healed(bench)


@as_root
@pytest.mark.parametrize("closed", ["root", "vm", "unreadable"])
def test_the_module_may_not_write_in_the_repository(bench_factory: BenchFactory, closed: str) -> None:
    bench = bench_factory(user=NOBODY)
    bench.repository.mkdir(0o755)
    os.chown(bench.repository, NOBODY, NOBODY)
    bench.backup(user=NOBODY).ok()
    bench.change()
    place = bench.store if closed == "vm" else bench.repository
    for path in (place, bench.store):
        os.chown(path, 0, 0)
    place.chmod(0o700 if closed == "unreadable" else 0o555)
    result = bench.backup(user=NOBODY)
    place.chmod(0o755)
    for path in (place, bench.store):
        os.chown(path, NOBODY, NOBODY)
    error_of(bench, result, "TargetUnwritable", "RepositoryInvalid")
    bench.change()
    bench.backup(user=NOBODY).ok()
    assert set(bench.levels().values()) == {"incremental"}
    bench.expect_restorable()


def test_the_guest_writes_while_its_backup_fails(bench: Bench) -> None:
    """Copy before write towards a target that fails must never fail, or hold up, the guest's own write."""
    bench.backup().ok()
    for drive in bench.truth:
        bench.write(drive, 0, 32)
    with bench.stopped("after qmp transaction", bandwidth=SLOW) as running:
        bench.vm.command("job-cancel", id=bench.vm.jobs()[0]["id"])
        bench.change()
        assert bench.vm.holds("d0", 0, UNIT, bench.truth["d0"][0])
    assert running.finish().data["vms"][0]["error"]["kind"] == "JobFailed"
    bench.no_leftovers()
    expect_healed(bench)
