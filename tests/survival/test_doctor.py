# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The doctor of qmp_vm_info on real chains that were spoilt, its fixes carried out, and qmp_snapshot, recovered."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.chains import Chain
from support.forked import run_forked
from support.killer import Trap
from support.module import run_module
from support.points import Drive, Site
from support.shots import SIZE, vm_of

SLOW = bool(os.environ.get("BLOCKOPS_SLOW"))
Findings = dict[str, list[dict[str, t.Any]]]


@pytest.fixture
def chain(workdir: Path, qemu_factory: QemuFactory) -> Chain:
    base = images.create(workdir / "base.qcow2", SIZE)
    return Chain(qemu_factory("vm", [Drive("vda", base)], paused=False), workdir)


def examine(chain: Chain, **options: t.Any) -> Findings:
    """Findings by kind, without those that depend on the machine, or on how the lab starts its VMs."""
    before = chain.state()
    params = {"vms": [chain.entry], "doctor": True, "probe_agent": False, **options}
    vm = vm_of(run_forked("qmp_vm_info", params, None).ok())
    assert chain.state() == before
    found: Findings = {}
    for finding in vm["findings"]:
        assert finding["what"] and finding["fix"] and finding["severity"] in ("danger", "waste", "note")
        found.setdefault(finding["kind"], []).append(finding)
    return {kind: found[kind] for kind in found if kind not in ("LowSpace", "BootDrift")}


def only(found: Findings, kind: str) -> dict[str, t.Any]:
    assert list(found) == [kind] and len(found[kind]) == 1, found
    return found[kind][0]


def test_a_good_chain_has_no_findings(chain: Chain) -> None:
    assert examine(chain) == {}
    chain.grow(3)
    assert examine(chain) == {}
    chain.commit(keep=["s1"], delete=True)
    assert examine(chain) == {}
    chain.reverted("s1", discarded="delete")
    assert examine(chain) == {}
    chain.off()


def test_drift_is_said_once_with_its_way_out(chain: Chain) -> None:
    chain.present("s")
    vm = vm_of(run_module("qmp_vm_info", {"vms": [chain.entry], "doctor": True}).ok())
    (drift,) = [finding for finding in vm["findings"] if finding["kind"] == "BootDrift"]
    assert (drift["drive"], drift["object"]) == ("vda", str(chain.active()))
    assert "base.qcow2" in drift["fix"]
    plain = vm_of(run_module("qmp_vm_info", {"vms": [chain.entry]}).ok())
    assert "findings" not in plain
    back = run_module("qmp_vm_info", {"vms": [vm]}).ok()
    assert vm_of(back)["uuid"] == vm["uuid"]


def spoil(chain: Chain, layer: int, name: str) -> None:
    """Another tool writes a wrong name into a header."""
    root = chain.qemu.active_node("vda")
    tree = next(each for each in chain.qemu.command("query-blockstats") if each.get("node-name") == root)
    for _step in range(layer):
        tree = tree["backing"]
    names = {"device": root, "image-node-name": tree["node-name"], "backing-file": name}
    chain.qemu.command("change-backing-file", **names)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_wrong_backing_name_and_both_ways_to_mend_it(chain: Chain, layer: int) -> None:
    chain.grow(2)
    shutil.copy(chain.directory / "base.qcow2", chain.directory / "other.qcow2")
    spoil(chain, layer, "other.qcow2")
    finding = only(examine(chain), "WrongBacking")
    assert finding["object"] == str(chain.directory / chain.chain()[layer]) and finding["severity"] == "danger"
    live = re.search(r"device=(\S+), image-node-name=(\S+), backing-file=(\S+)\. Or", finding["fix"])
    assert live is not None
    names = ("device", "image-node-name", "backing-file")
    chain.qemu.command("change-backing-file", **dict(zip(names, live.groups())))
    assert examine(chain) == {}
    spoil(chain, layer, "missing.qcow2")
    command = only(examine(chain), "WrongBacking")["fix"].rsplit("next start: ", 1)[1]
    files = [str(chain.directory / name) for name in chain.chain()]
    active = chain.active()
    chain.qemu.quit()
    subprocess.run(shlex.split(command), check=True)
    assert images.chain(files[0]) == files
    chain.judge(active, bytes(chain.truth["vda"]))


def test_gone_and_replaced(chain: Chain) -> None:
    chain.grow(1)
    base = chain.directory / "base.qcow2"
    base.rename(chain.directory / "kept")
    assert only({"MissingImage": examine(chain)["MissingImage"]}, "MissingImage")["object"] == str(base)
    shutil.copy(chain.directory / "kept", base)
    assert only(examine(chain), "ReplacedImage")["object"] == str(base)
    (chain.directory / "kept").rename(base)
    assert examine(chain) == {}
    with base.open("rb"):
        assert only(examine(chain), "OpenElsewhere")["object"] == str(base)


def test_started_from_the_old_image(chain: Chain) -> None:
    """The trap of every snapshot tool: the overlay is an orphan then."""
    chain.present("s")
    overlay = chain.active()
    chain.write("vda", 7)
    chain.qemu.quit()
    chain.qemu.start()
    finding = only(examine(chain), "OrphanedOverlay")
    assert finding["object"] == str(overlay) and finding["bytes"] > 0 and finding["drive"] == "vda"


def test_overlays_of_others(chain: Chain) -> None:
    chain.grow(1)
    for name, backing in (("a", chain.active().name), ("b", "base.qcow2")):
        command = ["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2"]
        images.run_tool("qemu-img", *command, chain.directory / f"{name}.qcow2", str(SIZE))
    found = examine(chain)
    assert {kind: finding[0]["object"][-7:] for kind, finding in found.items()} == {
        "OverlayOfActive": "a.qcow2"[-7:],
        "ForeignOverlay": "b.qcow2"[-7:],
    }
    # What it says is so: the planner refuses to commit into the base.
    assert chain.refused(base="base.qcow2", top=chain.chain()[0], merge="commit")["kind"] == "ChainImageNeeded"


def test_what_was_kept_aside(chain: Chain) -> None:
    chain.present("s")
    chain.write("vda", 3)
    discarded = chain.active()
    chain.reverted("s")
    finding = only(examine(chain), "DiscardedBranch")
    assert finding["object"] == str(discarded) and finding["bytes"] == discarded.stat().st_blocks * 512
    for path in (discarded, discarded.with_name(f"{discarded.name}.snapshot.json")):
        assert str(path) in finding["fix"]
        path.unlink()
    assert examine(chain) == {}
    chain.change()
    chain.commit(base="base.qcow2")
    assert only(examine(chain), "EmptiedOverlay")["severity"] == "waste"
    chain.commit(base="base.qcow2", delete=True)
    assert examine(chain) == {}


def test_bitmaps(chain: Chain) -> None:
    site = Site(chain.directory)
    chain.change()
    point = site.backup(chain.qemu)
    repository = str(site.repository)
    assert examine(chain, repository=repository) == {}
    node = chain.qemu.active_node("vda")
    chain.qemu.command("block-dirty-bitmap-add", node=node, name="libvirt-x", persistent=True)
    fix = only(examine(chain, repository=repository), "ForeignBitmap")["fix"]
    name = re.search(r"name=(\S+), state=absent, drives=\[(\S+)\]", fix)
    assert name is not None
    task = {"vms": [chain.entry], "state": "absent", "name": name[1], "drives": [name[2]]}
    run_forked("qmp_dirty_bitmap", task, None).ok()
    assert examine(chain, repository=repository) == {}
    (directory,) = site.repository.glob(f"*/{point.id}")
    shutil.rmtree(directory)
    assert examine(chain) == {}
    fix = only(examine(chain, repository=repository), "BitmapOfNoBackup")["fix"]
    assert "ours=true" in fix
    bitmap = next(iter(chain.qemu.bitmaps("vda")))
    run_forked("qmp_dirty_bitmap", {**task, "name": bitmap, "ours": True}, None).ok()
    assert examine(chain, repository=repository) == {}
    assert only(examine(chain, repository="/nowhere"), "RepositoryUnreadable")["severity"] == "note"


def test_an_inconsistent_bitmap(chain: Chain) -> None:
    chain.qemu.command("block-dirty-bitmap-add", node=chain.qemu.active_node("vda"), name="x", persistent=True)
    chain.qemu.quit()
    chain.qemu.start()
    chain.qemu.kill9()
    chain.qemu.start()
    assert only(examine(chain), "InconsistentBitmap")["object"] == "x"


def test_a_job_that_nobody_dismissed(chain: Chain) -> None:
    target = images.create(chain.directory / "t.raw", SIZE, fmt="raw")
    file = {"driver": "file", "filename": str(target)}
    chain.qemu.command("blockdev-add", **{"driver": "raw", "node-name": "t", "file": file})
    job = {"job-id": "theirs", "auto-dismiss": False, "sync": "full"}
    chain.qemu.command("blockdev-backup", device=chain.qemu.active_node("vda"), target="t", **job)
    chain.wait_jobs("concluded")
    assert only(examine(chain), "UndismissedJob")["object"] == "theirs"


def test_while_another_task_is_at_work(chain: Chain) -> None:
    """Half of what it is about is no finding."""
    chain.run("qmp_snapshot", name="s", quiesce="off", trap=Trap(label="qmp transaction"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
        claim.bind(f"\0blockops.qemu/snapshot/{chain.qemu.pid}")
        assert only(examine(chain), "TaskRunning")["severity"] == "note"
    assert list(examine(chain)) == ["InterruptedRun"]


def recovered(chain: Chain, *, check: bool = False) -> dict[str, t.Any]:
    return vm_of(chain.run("qmp_snapshot", state="recovered", check=check).ok())


@pytest.mark.parametrize("state", ["present", "absent", "reverted"])
def test_what_a_killed_run_left_is_found_and_cleaned_up(chain: Chain, state: str) -> None:
    """At every step: the doctor finds something exactly when state=recovered does something, and nothing after it."""
    log, stride, left = chain.directory / "steps", 1 if SLOW else 13, 0
    task: dict[str, t.Any] = {"name": "s", "state": state, "quiesce": "off", "allow_reset": state == "reverted"}

    def begin() -> None:
        chain.change()
        recovered_or_reverted(chain)
        if state == "present":
            chain.commit(base="base.qcow2", delete=True)
        elif "s" not in chain.past or len(chain.chain()) == 1:
            chain.call("s").ok()
            chain.past["s"] = {drive: bytearray(content) for drive, content in chain.truth.items()}
            chain.change()

    begin()
    chain.run("qmp_snapshot", trap=Trap(log=str(log)), **task).ok()
    if state == "reverted":
        chain.truth = {drive: bytearray(content) for drive, content in chain.past["s"].items()}
    steps = log.read_text().splitlines()
    for number in range(["present", "absent", "reverted"].index(state), len(steps), stride):
        begin()
        print(f"killed before {steps[number]} ({number})")
        chain.run("qmp_snapshot", trap=Trap(number=number), **task)
        found = examine(chain)
        if "RevertInterrupted" in found:
            assert vm_of(chain.run("qmp_snapshot", state="recovered"))["error"]["kind"] == "RevertInterrupted"
            continue
        assert not set(found) - {"InterruptedRun", "DiscardedBranch"}, found
        left += "InterruptedRun" in found
        before = chain.state()
        predicted = recovered(chain, check=True)
        assert chain.state() == before
        done = recovered(chain)
        for key in ("changed", "status", "recovered", "deleted"):
            assert predicted[key] == done[key], key
        assert done["changed"] == ("InterruptedRun" in found), (found, done)
        assert recovered(chain)["status"] == "unchanged"
        assert not set(examine(chain)) - {"DiscardedBranch"}
        if state != "reverted":
            chain.live()
    assert not chain.qemu.jobs() and left


def recovered_or_reverted(chain: Chain) -> None:
    """From whatever the round before left: a VM that runs, with a truth that is known."""
    if vm_of(chain.run("qmp_snapshot", state="recovered")).get("error"):
        chain.call("s", "reverted", allow_reset=True).ok()
    if chain.qemu.command("query-status")["status"] != "running":
        chain.qemu.command("cont")


def test_bad_input(chain: Chain) -> None:
    result = chain.run("qmp_snapshot", state="recovered", name="s")
    assert result.failed and result.data["error"]["kind"] == "InputInvalid"
    result = chain.run("qmp_snapshot", state="present")
    assert result.failed and result.data["error"]["kind"] == "InputInvalid"
    result = run_module("qmp_vm_info", {"vms": [chain.entry], "repository": "/srv"})
    assert result.failed and result.data["error"]["kind"] == "InputInvalid"


def test_a_long_chain_is_examined_quickly(chain: Chain) -> None:
    chain.pile(24)
    assert only(examine(chain), "DeepChain")["object"] == str(chain.active())
    assert len(chain.chain()) == 25
