# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guest agents of every kind: thaw is always sent, the budget holds, and the manifest says what is true."""

from __future__ import annotations

import signal
import time
import typing as t
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import filesystem, images
from lab.fixtures import LabVmFactory
from support.agent import CLOSE, FREEZE, HANG, SYNC, THAW, Error, FakeAgent
from support.backup import Bench, BenchFactory
from support.killer import Trap
from support.module import run_module

BUDGET = 0.5
TIMEOUT = 1.0

GARBAGE = b"\xff\x00{]\n"
# What the agent does; what a freeze for the backup was worth; whether the guest may still be frozen afterwards.
GOOD: dict[str, dict[str, t.Any]] = {"good": {}}
UNFREEZABLE: dict[str, dict[str, t.Any]] = {
    "hangs at sync": {SYNC: HANG},
    "garbage at sync": {SYNC: GARBAGE},
    "hangs up at sync": {SYNC: CLOSE},
    "hangs at freeze": {FREEZE: HANG},
    "garbage at freeze": {FREEZE: GARBAGE},
    "hangs up at freeze": {FREEZE: CLOSE},
    "refuses to freeze": {FREEZE: Error("fsfreeze hook has failed with status 1")},
    "freezes nothing": {FREEZE: 0, THAW: 0},
    "freezes a string": {FREEZE: "two"},
    "freezes true": {FREEZE: True},
    "an error that is none": {FREEZE: b'{"return": 2, "error": "x"}\n'},
    "a list for an answer": {FREEZE: b"[1]\n"},
    "half an answer": {FREEZE: b'{"return": 2'},
    "deep nesting": {FREEZE: b"[" * 100_000 + b"\n"},
}
STATUS = "guest-fsfreeze-status"
FROZEN_TOO_SHORT: dict[str, dict[str, t.Any]] = {
    "thaws by itself": {THAW: 0},
    "refuses to thaw what is thawed": {THAW: Error("no"), STATUS: "thawed"},
}
STUCK: dict[str, dict[str, t.Any]] = {
    "cannot thaw": {THAW: Error("no"), STATUS: "frozen"},
    "hangs at thaw": {THAW: HANG},
    "garbage at thaw": {THAW: GARBAGE},
    "hangs up at thaw": {THAW: CLOSE},
}


class Run(t.NamedTuple):
    data: dict[str, t.Any]
    failed: bool
    agent: FakeAgent
    seconds: float


class Freezer:
    """Runs backups of one VM with agents of different kinds."""

    def __init__(self, bench: Bench, directory: Path) -> None:
        self.bench = bench
        self._path = directory / "agent"

    def run(self, answers: t.Mapping[str, t.Any], quiesce: str, **options: t.Any) -> Run:
        self._path.unlink(missing_ok=True)
        with FakeAgent(self._path, answers) as agent:
            began = time.monotonic()
            result = self.bench.backup(
                quiesce=quiesce, vm_agent_socket=str(self._path), freeze_timeout=BUDGET, timeout=TIMEOUT, **options
            )
            return Run(result.data["vms"][0], result.failed, agent, time.monotonic() - began)

    def consistency(self) -> str:
        return str(self.bench.newest()["consistency"])


@pytest.fixture
def freezer(bench_factory: BenchFactory, workdir: Path) -> Iterator[Freezer]:
    bench = bench_factory(1)
    yield Freezer(bench, workdir)
    bench.no_leftovers()
    bench.expect_restorable()


@pytest.mark.parametrize("quiesce", ["required", "try"])
def test_a_good_agent_freezes_and_thaws(freezer: Freezer, quiesce: str) -> None:
    run = freezer.run({}, quiesce)
    assert not run.failed
    assert [name for name, _when in run.agent.calls] == [FREEZE, THAW]
    assert freezer.consistency() == run.data["consistency"] == "filesystem"
    window = run.agent.asked(THAW)[0] - run.agent.asked(FREEZE)[0]
    assert 0 < window < BUDGET
    assert window * 1000 <= run.data["freeze_ms"] + 1


@pytest.mark.parametrize("kind", UNFREEZABLE)
def test_what_cannot_be_frozen(freezer: Freezer, kind: str) -> None:
    """``try``: a crash consistent backup that says so. ``required``: no backup. Thaw is sent wherever freeze was."""
    for quiesce in ("try", "required"):
        known = len(freezer.bench.ids())
        run = freezer.run(UNFREEZABLE[kind], quiesce)
        assert run.seconds < 3 * TIMEOUT + BUDGET + 5
        assert not run.agent.frozen
        assert bool(run.agent.asked(FREEZE)) == bool(run.agent.asked(THAW))
        if quiesce == "try":
            assert not run.failed, run.data
            assert (freezer.consistency(), freezer.bench.newest()["freeze_ms"]) == ("crash", None)
            assert "crash consistent only" in freezer.bench.newest()["warnings"][0]
        else:
            assert run.data["error"]["kind"] == "QuiesceFailed"
            assert len(freezer.bench.ids()) == known


@pytest.mark.parametrize("quiesce", ["required", "try"])
def test_no_agent_at_all(freezer: Freezer, workdir: Path, quiesce: str) -> None:
    for path in (None, str(workdir / "nobody")):
        result = freezer.bench.backup(quiesce=quiesce, vm_agent_socket=path)
        assert result.failed == (quiesce == "required")
        assert quiesce == "required" or freezer.consistency() == "crash"


@pytest.mark.parametrize("kind", FROZEN_TOO_SHORT)
def test_a_guest_that_was_no_longer_frozen_is_crash_consistent(freezer: Freezer, kind: str) -> None:
    run = freezer.run(FROZEN_TOO_SHORT[kind], "try")
    assert not run.failed
    assert freezer.consistency() == "crash"
    assert run.agent.asked(THAW)


@pytest.mark.parametrize("kind", STUCK)
def test_a_guest_that_does_not_say_that_it_thawed(freezer: Freezer, kind: str) -> None:
    """Thaw is sent again on new connections, and the task fails aloud; the backup itself is published."""
    run = freezer.run(STUCK[kind], "try")
    assert run.failed
    assert run.data["error"]["kind"] == "GuestFrozen"
    assert len(run.agent.asked(THAW)) >= 2
    assert run.seconds < 5 * TIMEOUT + 5
    assert freezer.consistency() == "crash"
    assert len(freezer.bench.ids()) == 1


def test_the_transaction_fails_while_the_guest_is_frozen(freezer: Freezer, workdir: Path) -> None:
    with FakeAgent(workdir / "agent") as agent:
        options: dict[str, t.Any] = {"quiesce": "required", "vm_agent_socket": str(agent.path)}
        with freezer.bench.stopped("qmp transaction", **options) as running:
            assert agent.frozen
            node = next(node for node in freezer.bench.vm.node_names() if node.endswith("-target"))
            freezer.bench.vm.command("blockdev-del", node_name=node)
        assert running.finish().data["vms"][0]["error"]["kind"] == "CommandFailed"
        assert not agent.frozen


@pytest.mark.parametrize("where", ["agent guest-fsfreeze-freeze", "qmp transaction", "agent guest-fsfreeze-thaw"])
def test_a_module_killed_while_the_guest_is_frozen(freezer: Freezer, workdir: Path, where: str) -> None:
    """The guard thaws."""
    with FakeAgent(workdir / "agent") as agent:
        result = freezer.bench.backup(Trap(label=where), quiesce="required", vm_agent_socket=str(agent.path))
        assert result.rc < 0
        agent.wait_for(THAW)
        assert not agent.frozen
    freezer.bench.backup().ok()


def test_qemu_that_hangs_does_not_keep_the_guest_frozen(freezer: Freezer, workdir: Path) -> None:
    """QEMU stopped (SIGSTOP) before the transaction: the budget ends the freeze, as far as it is ours to end."""
    freezer.bench.vm.flush()
    with FakeAgent(workdir / "agent") as agent:
        options: dict[str, t.Any] = {
            "quiesce": "required",
            "vm_agent_socket": str(agent.path),
            "freeze_timeout": BUDGET,
            "timeout": TIMEOUT,
        }
        with freezer.bench.stopped("qmp transaction", **options) as running:
            began = time.monotonic()
            freezer.bench.vm._process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
        agent.wait_for(THAW)
        assert time.monotonic() - began < BUDGET + 2
        assert running.finish().data["vms"][0]["error"]["kind"] == "CommandTimedOut"
        freezer.bench.vm._process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
    freezer.bench.note()
    freezer.bench.backup().ok()


def test_a_real_guest(lab_vm_factory: LabVmFactory, workdir: Path) -> None:
    """Its own ext4 tells: after a frozen point there is no journal to replay, after another there is."""
    vm = lab_vm_factory("real", disks=2)
    entry = {"name": "real", "socket": str(vm.socket)}
    vm.exec("for d in vda vdb; do (while echo x >>/mnt/$d/busy; do sync; done) </dev/null >/dev/null 2>&1 & done")
    for quiesce, recovery in (("required", False), ("off", True)):
        params = {"repository": str(workdir / "repository"), "vms": [entry], "quiesce": quiesce, "level": "full"}
        done = run_module("qmp_drive_backup", params).ok().data["vms"][0]
        for drive in done["drives"]:
            assert filesystem.needs_recovery(drive["path"]) is recovery
            assert images.check(drive["path"]).get("corruptions") is None
        assert done["consistency"] == ("crash" if recovery else "filesystem")
        assert vm.agent("guest-fsfreeze-status") == "thawed"
