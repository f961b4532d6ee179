# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several VMs at one instant: all of them or none, every guest thawed whatever happens."""

from __future__ import annotations

import signal
import time
import typing as t
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.agent import FREEZE, HANG, THAW, Error, FakeAgent
from support.forked import run_forked
from support.killer import Trap, prelude
from support.module import Result, start_module
from support.points import Drive
from support.shots import NAMES, SIZE, Shots

BUDGET = 1.0
TIMEOUT = 2.0


class Group:
    """VMs in directories of their own, each with an agent."""

    def __init__(self, directory: Path, factory: QemuFactory, stack: ExitStack) -> None:
        self._directory, self._factory, self._stack = directory, factory, stack
        self.shots: dict[str, Shots] = {}
        self.agents: dict[str, FakeAgent] = {}

    def add(self, name: str, answers: t.Mapping[str, t.Any] | None = None) -> Shots:
        place = self._directory / name
        place.mkdir()
        base = images.create(place / "base.qcow2", SIZE)
        shots = Shots(self._factory(name, [Drive("vda", base)], directory=place, paused=False), place)
        self.agents[name] = self._stack.enter_context(FakeAgent(place / "agent", answers))
        shots.entry["agent_socket"] = str(place / "agent")
        self.shots[name] = shots
        shots.change()
        return shots

    def params(self, **options: t.Any) -> dict[str, t.Any]:
        base = {
            "name": "one",
            "overlay_name": NAMES,
            "group": True,
            "quiesce": "required",
            "freeze_timeout": BUDGET,
            "timeout": TIMEOUT,
        }
        return {**base, "vms": [shots.entry for shots in self.shots.values()], **options}

    def call(self, *, check: bool = False, **options: t.Any) -> Result:
        return run_forked("qmp_snapshot", self.params(**options), None, check=check)

    def errors(self, result: Result) -> dict[str, dict[str, t.Any]]:
        return {vm["name"]: vm["error"] for vm in result.data["vms"] if "error" in vm}

    def nobody_has_it(self) -> None:
        """No VM has an overlay, a record or a node of it; all guests are thawed and see what they wrote."""
        for shots in self.shots.values():
            if not shots.qemu.running:
                continue
            assert shots.chain() == ["base.qcow2"]
            assert "vda.one.qcow2.snapshot.json" not in shots.files()
            assert not [name for name in shots.qemu.node_names() if name.startswith("bo")]
            shots.live()
        self.thawed()

    def thawed(self) -> None:
        assert not [name for name, agent in self.agents.items() if agent.frozen]


@pytest.fixture
def group(workdir: Path, qemu_factory: QemuFactory) -> Iterator[Group]:
    with ExitStack() as stack:
        yield Group(workdir, qemu_factory, stack)


@pytest.mark.parametrize("parallel", [2, 8])
def test_all_at_one_instant(group: Group, parallel: int) -> None:
    """All are frozen before the first snapshot and none is thawed before the last, however many run at once else."""
    names = [f"vm{number}" for number in range(4)]
    for name in names:
        group.add(name)
    result = group.call(max_parallel=parallel).ok()
    freezes = [group.agents[name].asked(FREEZE)[0] for name in names]
    thaws = [group.agents[name].asked(THAW)[0] for name in names]
    assert max(freezes) < min(thaws)
    for vm in result.data["vms"]:
        assert (vm["status"], vm["consistency"]) == ("taken", "filesystem")
        assert 0 <= vm["group_spread_ms"] <= (max(thaws) - max(freezes)) * 1000 + 1
        assert vm["freeze_ms"] < BUDGET * 1000
    assert len({vm["group_spread_ms"] for vm in result.data["vms"]}) == 1
    for shots in group.shots.values():
        assert shots.chain() == ["vda.one.qcow2", "base.qcow2"]
        shots.change()
        shots.live()
    again = group.call().ok()
    assert not again.changed and {vm["status"] for vm in again.data["vms"]} == {"present"}
    assert all(len(agent.asked(FREEZE)) == 1 for agent in group.agents.values())
    gone = group.call(state="absent").ok()
    assert {vm["status"] for vm in gone.data["vms"]} == {"removed"}
    for shots in group.shots.values():
        shots.live()
        shots.off()


def test_one_has_it_already(group: Group) -> None:
    """The others do not wait for it."""
    for name in ("a", "b", "c"):
        group.add(name)
    group.shots["b"].present("one")
    result = group.call().ok()
    assert {vm["name"]: vm["status"] for vm in result.data["vms"]} == {"a": "taken", "b": "present", "c": "taken"}
    assert not group.agents["b"].asked(FREEZE)
    group.thawed()


def _no_socket(group: Group) -> None:
    group.shots["b"].qemu.quit()


def _overlay_exists(group: Group) -> None:
    (group.shots["b"].directory / "vda.one.qcow2").write_bytes(b"somebody's")


def _jobs(group: Group) -> None:
    shots = group.shots["b"]
    target = {"driver": "null-co", "size": SIZE, "node-name": "their-target"}
    shots.qemu.execute("blockdev-add", target)
    job = {"job-id": "theirs", "device": shots.qemu.active_node("vda"), "target": "their-target", "sync": "full"}
    shots.qemu.execute("blockdev-backup", {**job, "speed": 4096})


BROKEN: dict[str, tuple[t.Callable[[Group], None], str]] = {
    "nobody answers": (_no_socket, ""),
    "overlay exists": (_overlay_exists, "OverlayExists"),
    "jobs run": (_jobs, "JobsRunning"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_one_that_cannot(group: Group, how: str) -> None:
    """Nobody gets it, and every other VM says whose fault that is; without it, all the others do."""
    for name in ("a", "b", "c"):
        group.add(name)
    breaks, kind = BROKEN[how]
    breaks(group)
    result = group.call()
    errors = group.errors(result)
    assert set(errors) == {"a", "b", "c"} and not result.changed
    assert kind in (errors["b"]["kind"], "")
    for name in ("a", "c"):
        assert (errors[name]["kind"], errors[name]["culprit"]) == ("GroupBroken", "b")
    for name in ("a", "c"):
        assert group.shots[name].chain() == ["base.qcow2"] and group.shots[name].files() == ["base.qcow2"]
        assert not group.agents[name].asked(FREEZE)
        group.shots[name].live()
    group.thawed()
    del group.shots["b"]
    assert {vm["status"] for vm in group.call().ok().data["vms"]} == {"taken"}


@pytest.mark.parametrize("kind", ["refuses", "hangs", "freezes nothing"])
def test_an_agent_that_does_not_freeze(group: Group, kind: str) -> None:
    """``required``: nobody gets it. ``try``: all get it, that one crash consistent only, within its time."""
    answers: dict[str, dict[str, t.Any]] = {
        "refuses": {FREEZE: Error("no")},
        "hangs": {FREEZE: HANG},
        "freezes nothing": {FREEZE: 0, THAW: 0},
    }
    for name in ("a", "b", "c"):
        group.add(name, answers[kind] if name == "b" else None)
    began = time.monotonic()
    result = group.call()
    assert time.monotonic() - began < BUDGET + 2 * TIMEOUT + 4
    errors = group.errors(result)
    assert errors["b"]["kind"] == "QuiesceFailed" or errors["b"]["kind"] == "SnapshotFailed", errors
    assert {errors[name]["kind"] for name in ("a", "c")} == {"GroupBroken"}
    group.nobody_has_it()
    began = time.monotonic()
    result = group.call(quiesce="try")
    assert time.monotonic() - began < BUDGET + 2 * TIMEOUT + 4
    group.thawed()
    if kind == "hangs" and result.failed:
        # The others' budget was used up by waiting for it: nobody has it, and that is said.
        assert {error["culprit"] for error in group.errors(result).values()} == {"b"}, group.errors(result)
        group.nobody_has_it()
        return
    consistency = {vm["name"]: vm["consistency"] for vm in result.ok().data["vms"]}
    assert consistency == {"a": "filesystem", "b": "crash", "c": "filesystem"}
    assert any("crash consistent only" in warning for warning in result.warnings)


@pytest.mark.parametrize("where", ["agent guest-fsfreeze-freeze", "qmp transaction", "agent guest-fsfreeze-thaw"])
@pytest.mark.parametrize("nth", [1, 2])
def test_killed_between_freeze_and_thaw(group: Group, where: str, nth: int) -> None:
    """The guard thaws every guest, and the next run makes it whole."""
    for name in ("a", "b"):
        group.add(name)
    running = start_module("qmp_snapshot", group.params(), prelude=prelude(Trap(label=where, nth=nth)))
    assert running.finish().rc == -signal.SIGKILL
    for agent in group.agents.values():
        if agent.asked(FREEZE):
            agent.wait_for(THAW)
    deadline = time.monotonic() + 10
    while any(agent.frozen for agent in group.agents.values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for shots in group.shots.values():
        shots.live()
    result = group.call()
    assert not result.failed, result.msg
    for shots in group.shots.values():
        assert shots.chain() == ["vda.one.qcow2", "base.qcow2"]
        shots.change()
        shots.live()
        shots.off()
    group.thawed()


def test_check_mode_asks_no_guest(group: Group) -> None:
    for name in ("a", "b"):
        group.add(name)
    result = group.call(check=True).ok()
    assert result.changed and {vm["status"] for vm in result.data["vms"]} == {"taken"}
    assert not any(agent.calls for agent in group.agents.values())
    group.nobody_has_it()


@pytest.mark.parametrize("quiesce", ["try", "required"])
@pytest.mark.parametrize("answer", [HANG, Error("no")], ids=["hangs", "refuses"])
def test_one_vm_with_a_bad_agent(group: Group, quiesce: str, answer: t.Any) -> None:
    """Without a group: in time, thaw sent, and crash consistent or not at all."""
    group.add("a", {FREEZE: answer})
    began = time.monotonic()
    result = group.call(group=False, quiesce=quiesce)
    assert time.monotonic() - began < BUDGET + 2 * TIMEOUT + 4
    assert group.agents["a"].asked(THAW)
    if quiesce == "required":
        assert result.failed
        group.nobody_has_it()
    else:
        assert result.ok().data["vms"][0]["consistency"] == "crash"
    group.thawed()
