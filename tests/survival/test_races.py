# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two controllers at once, sockets of every kind, two repositories of one VM, one dead VM among eight."""

from __future__ import annotations

import os
import socket
import time
import typing as t
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.qmp import Qmp
from support.agent import FakeAgent
from support.backup import NOBODY, Bench, BenchFactory
from support.forked import run_forked

TIMEOUT = 1.0


def kind_of(result: t.Any, number: int = 0) -> str:
    assert result.failed and result.data, result
    return str(result.data["vms"][number]["error"]["kind"])


def test_the_second_of_two_runs_waits_for_the_first(bench: Bench) -> None:
    bench.backup().ok()
    bench.change()
    first, second = bench.start(), bench.start()
    assert not first.finish().failed
    assert not second.finish().failed
    bench.note()
    assert len(bench.ids()) == 3
    assert set(bench.levels().values()) == {"incremental"}
    bench.no_leftovers()
    bench.expect_restorable()
    bench.expect_live()


def test_the_second_of_two_runs_gives_up_in_time(bench: Bench) -> None:
    bench.backup().ok()
    bench.change()
    with bench.stopped("after qmp transaction") as running:
        began = time.monotonic()
        result = bench.backup(timeout=TIMEOUT)
        assert time.monotonic() - began < TIMEOUT + 3
        assert kind_of(result) == "RepositoryLocked"
        assert f"process {running.process.pid} " in result.msg
        assert run_forked("qmp_drive_backup", bench.params(timeout=TIMEOUT), None, check=True).failed
    running.finish().ok()
    bench.note()
    bench.no_leftovers()
    bench.expect_restorable()


def test_a_lock_file_that_a_dead_process_wrote_locks_nothing(bench: Bench) -> None:
    bench.backup().ok()
    for text in ('{"host": "gone", "pid": 1, "since": "2026-01-01T00:00:00.000000Z"}', "no json", ""):
        (bench.store / "lock").write_text(text)
        bench.backup(timeout=TIMEOUT).ok()
    bench.no_leftovers()


@contextmanager
def busy(bench: Bench, _path: Path) -> Iterator[str]:
    with Qmp(bench.vm.socket):
        yield str(bench.vm.socket)


@contextmanager
def dead(_bench: Bench, path: Path) -> Iterator[str]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    yield str(path)


@contextmanager
def agent(_bench: Bench, path: Path) -> Iterator[str]:
    with FakeAgent(path):
        yield str(path)


@contextmanager
def regular(_bench: Bench, path: Path) -> Iterator[str]:
    path.write_text("")
    yield str(path)


@contextmanager
def missing(_bench: Bench, path: Path) -> Iterator[str]:
    yield str(path)


SOCKETS = [
    (busy, "SocketBusy"), (dead, "SocketDead"), (agent, "SocketBusy"), (regular, "NotQmp"), (missing, "SocketMissing"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind"), SOCKETS)
def test_a_socket_that_is_no_free_qmp_monitor(
    bench_factory: BenchFactory, workdir: Path, make: t.Callable[[Bench, Path], t.Any], kind: str
) -> None:
    bench = bench_factory(1)
    with make(bench, workdir / "odd") as path:
        began = time.monotonic()
        result = bench.backup(vm_socket=path, timeout=TIMEOUT)
        assert time.monotonic() - began < TIMEOUT + 3
        assert kind_of(result) == kind
        assert path in result.msg
    bench.backup().ok()


def test_a_monitor_for_humans(bench_factory: BenchFactory, workdir: Path) -> None:
    path = workdir / "human"
    bench = bench_factory(1, extra_args=["-monitor", f"unix:{path},server=on,wait=off"])
    assert kind_of(bench.backup(vm_socket=str(path), timeout=TIMEOUT)) == "NotQmp"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_socket_that_is_not_permitted(bench_factory: BenchFactory) -> None:
    bench = bench_factory(1)
    bench.vm.socket.chmod(0o600)
    bench.repository.mkdir()
    os.chown(bench.repository, NOBODY, NOBODY)
    assert kind_of(bench.backup(user=NOBODY)) == "SocketForbidden"


def test_two_repositories_of_one_vm_stay_incremental(bench: Bench) -> None:
    """Each has bitmaps of its own; neither takes away the other's."""
    places = [bench.repository, bench.directory / "second"]
    seen: dict[Path, set[str]] = {place: set() for place in places}
    for turn in range(6):
        place = places[turn % 2]
        bench.repository, bench.published = place, seen[place]
        bench.change()
        bench.backup().ok()
        seen[place] = bench.published
        assert set(bench.levels().values()) == {"full" if turn < 2 else "incremental"}
        bench.no_leftovers()
    for place in places:
        bench.repository = place
        bench.expect_restorable()


def test_one_dead_vm_does_not_stop_the_other_seven(bench_factory: BenchFactory) -> None:
    benches = [bench_factory(1, name=f"vm{number}") for number in range(8)]
    benches[3].vm.kill9()
    params = benches[0].params(timeout=5)
    params["vms"] = [bench.params()["vms"][0] for bench in benches]
    result = run_forked("qmp_drive_backup", params, None)
    assert result.failed and result.msg.startswith("1 of 8 VMs failed. vm3: ")
    assert [vm.get("error", {}).get("kind") for vm in result.data["vms"]].count(None) == 7
    assert kind_of(result, 3) in ("SocketDead", "SocketMissing")
    for bench in benches:
        bench.note()
        if bench is not benches[3]:
            assert len(bench.ids()) == 1
            bench.expect_restorable()
