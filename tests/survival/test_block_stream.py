# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qmp_block_stream on real chains: to the active image and to others, flat, off a backup, killed, and adopted."""

from __future__ import annotations

import os
import signal
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.chains import STREAM, Chain
from support.killer import Trap
from support.module import run_module
from support.points import Drive, Site
from support.shots import MIB, SIZE, vm_of

STOP = int(signal.SIGSTOP)
SLOW = bool(os.environ.get("BLOCKOPS_SLOW"))


@pytest.fixture
def chain(workdir: Path, qemu_factory: QemuFactory) -> Chain:
    base = images.create(workdir / "base.qcow2", SIZE)
    return Chain(qemu_factory("vm", [Drive("vda", base)], paused=False), workdir)


def test_flat(chain: Chain) -> None:
    """The active image needs no other one; ours go, the base stays as it was."""
    chain.begin()
    _predicted, data = chain.commit_predicted(STREAM, delete=True)
    assert chain.chain() == ["vda.k3.qcow2"]
    assert data["kept"] == [str(chain.directory / "base.qcow2")] and len(data["deleted"]) == 3
    assert chain.files() == ["base.qcow2", "vda.k3.qcow2"]
    chain.again(STREAM, delete=True)
    chain.live()
    chain.off()


@pytest.mark.parametrize("end", [{"base": "base.qcow2"}, {"bottom": "vda.k0.qcow2"}], ids=["base", "bottom"])
def test_into_an_image_in_the_middle(chain: Chain, end: dict[str, str]) -> None:
    """It takes the place, and the snapshot's name, of the lowest that was copied into it."""
    chain.begin()
    options = {"top": "vda.k2.qcow2", **end, "delete": True}
    _predicted, data = chain.commit_predicted(STREAM, **options)
    assert chain.chain() == ["vda.k3.qcow2", "vda.k2.qcow2", "base.qcow2"]
    assert chain.names() == ["k3", "k0"]
    assert [Path(path).name for path in data["deleted"]] == ["vda.k1.qcow2", "vda.k0.qcow2"]
    chain.expect_only_chain(emptied=False)
    chain.again(STREAM, **options)
    chain.live()
    chain.off()


def test_bad_input(chain: Chain) -> None:
    chain.begin()
    assert chain.refused(STREAM, top="vda.k9.qcow2")["kind"] == "ImageNotInChain"
    assert chain.refused(STREAM, base="vda.k3.qcow2")["kind"] == "WrongOrder"
    result = chain.run(STREAM, base="base.qcow2", bottom="vda.k0.qcow2")
    assert result.failed and result.data["error"]["kind"] == "InputInvalid"
    chain.off()


def test_an_instantly_restored_vm_becomes_independent_of_its_backup(chain: Chain, qemu_factory: QemuFactory) -> None:
    """The backup is not written to, and can be deleted while the guest goes on."""
    site = Site(chain.directory)
    chain.grow(1)
    site.backup(chain.qemu)
    chain.change()
    point = site.backup(chain.qemu)
    (chain.directory / "back").mkdir()
    where = {"repository": str(site.repository), "vm": "vm", "point": point.id, "mode": "instant"}
    run_module("backup_restore", {**where, "dest": str(chain.directory / "back")}).ok()
    (overlay,) = (chain.directory / "back").glob("*.qcow2")
    restored = Chain(qemu_factory("restored", [Drive("vda", overlay)], paused=False), chain.directory / "back")
    restored.truth = {"vda": bytearray(chain.truth["vda"])}
    restored.live()
    restored.change()
    _predicted, data = restored.commit_predicted(STREAM)
    assert restored.chain() == [overlay.name] and len(data["kept"]) == 2
    site.check()
    os.rename(site.repository, chain.directory / "gone")
    restored.change()
    restored.live()
    restored.off()


def test_paused_by_somebody_and_adopted(chain: Chain) -> None:
    """A run that was killed left its job, which somebody paused: the next one resumes it and follows it to its end."""
    chain.write("vda", 0, 100)
    chain.begin()
    result = chain.run(STREAM, bandwidth=MIB // 4, job_timeout=0.3)
    assert vm_of(result)["error"]["kind"] == "ChainJobUnfinished"
    (job,) = chain.qemu.jobs()
    chain.qemu.command("job-pause", id=job["id"])
    assert vm_of(chain.run(STREAM, check=True).ok())["status"] == "merged"
    data = chain.commit(STREAM, bandwidth=1 << 40, delete=True)
    assert not [each for each in data["commands"] if each["execute"] == "block-stream"]
    assert chain.chain() == ["vda.k3.qcow2"]
    chain.live()
    chain.off()


TASKS: dict[str, dict[str, t.Any]] = {
    "flat": {"base": "base.qcow2", "delete": True},
    "middle": {"top": "vda.k2.qcow2", "base": "base.qcow2", "delete": True},
    "middle-kept": {"top": "vda.k2.qcow2", "base": "base.qcow2"},
}


@pytest.mark.parametrize("name", TASKS)
def test_a_kill_at_any_step_loses_nothing(chain: Chain, name: str) -> None:
    task, stride, log = TASKS[name], 1 if SLOW else 7, chain.directory / "steps"
    chain.begin()
    chain.run(STREAM, trap=Trap(log=str(log)), **task).ok()
    steps = log.read_text().splitlines()
    for number in range(list(TASKS).index(name) % stride, len(steps), stride):
        print(f"killed before {steps[number]} ({number})")
        chain.begin()
        chain.run(STREAM, trap=Trap(number=number), **task)
        chain.live()
        chain.change()
        predicted = vm_of(chain.run(STREAM, check=True, **task).ok())
        data = chain.commit(STREAM, **task)
        assert predicted["changed"] == data["changed"], (predicted, data)
        chain.live()
        chain.expect_only_chain(emptied=not task.get("delete"))
        chain.again(STREAM, **task)
    chain.off()


def test_qemu_killed_when_all_is_done(chain: Chain) -> None:
    """What was copied up is on the disk by then: the images it came from are gone."""
    chain.begin()
    chain.qemu.flush("vda")
    chain.commit(STREAM, delete=True)
    active = chain.active()
    chain.qemu.kill9()
    chain.judge(active, bytes(chain.truth["vda"]))
