# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""backup_prune on repositories whose every point has a raw witness: removed, merged, killed at every step, run full.

qemu-img compare of what is published with the witnesses judges. ``BLOCKOPS_SLOW=1`` kills at every boundary; without,
at every seventeenth.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import typing as t
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from architecture.documentation import COMMON_RETURN, documentation, undocumented
from support.fabricate import MIB, Fabricated, fabricate, identical, sha256
from support.forked import run_forked
from support.killer import Trap, prelude
from support.module import Result, run_module, start_module

STRIDE = 1 if os.environ.get("BLOCKOPS_SLOW") else 17
SIZES = {"disk0": 8 * MIB, "disk1": 4 * MIB}


@pytest.fixture
def repository(tmp_path: Path) -> Fabricated:
    return fabricate(tmp_path / "repository", points=5, sizes=SIZES)


def prune(made: Fabricated, *, check: bool = False, trap: Trap | None = None, **rules: t.Any) -> Result:
    return run_forked("backup_prune", {"repository": str(made.path), **rules}, trap, check=check)


def vm_of(result: Result) -> dict[str, t.Any]:
    return dict(result.data["vms"][0])


def predicted(made: Fabricated, **rules: t.Any) -> Result:
    """Check mode, which must not have changed anything."""
    before = made.state()
    result = prune(made, check=True, **rules)
    assert made.state() == before
    return result


def pruned(made: Fabricated, **rules: t.Any) -> dict[str, t.Any]:
    """Predict, run, run again; the answer of the run."""
    promise = vm_of(predicted(made, **rules).ok())
    result = prune(made, **rules).ok()
    answer = vm_of(result)
    assert {**answer, "written": None} == promise
    again = vm_of(prune(made, **rules).ok())
    assert not again["changed"], again
    return answer


def there(made: Fabricated) -> list[int]:
    """Which points are published; AssertionError when something else lies there or one of them is not exact."""
    entries = {name for name in os.listdir(made.directory) if name != "lock"}
    found = [number for number, name in enumerate(made.ids) if name in entries]
    assert entries == {made.ids[number] for number in found}, entries
    for number in found:
        exact(made, number)
    return found


def exact(made: Fabricated, number: int) -> None:
    manifest = made.manifest(number)
    assert manifest["id"] == made.ids[number]
    assert manifest["a key of a later release"] == {"is": "ignored"}
    for record in manifest["drives"]:
        image = made.image(number, record["name"])
        assert identical(made.witness(number, record["name"]), "raw", image, "qcow2"), f"{number} {record['name']}"
        assert (image.stat().st_size, sha256(image)) == (record["size"], record["sha256"])
        assert image.stat().st_mode & 0o777 == 0o440
        check = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(image)], check=False)
        assert check.returncode == 0


def action(answer: dict[str, t.Any]) -> str:
    """A letter for each backup, the oldest first."""
    return "".join(backup["action"][0] for backup in reversed(answer["backups"]))


def test_a_chain_that_nothing_needs_goes(repository: Fabricated) -> None:
    repository.add(full=True)
    repository.add()
    size = sum(
        path.stat().st_blocks * 512
        for n in range(5)
        for path in (repository.directory / repository.ids[n]).rglob("*.*")
    )
    answer = pruned(repository, keep_last=2)
    assert action(answer) == "rrrrrkk"
    assert answer["removed"] == [repository.ids[n] for n in (4, 3, 2, 1, 0)]
    assert answer["freed"] == size
    assert there(repository) == [5, 6]


def test_what_is_needed_stays(repository: Fabricated) -> None:
    before = repository.state()
    answer = pruned(repository, keep_last=1)
    assert action(answer) == "kkkkk"
    assert answer["backups"][1]["reasons"] == [f"it is needed by {repository.ids[4]}"]
    after = repository.state()
    assert {path for path in after if path not in before} == {repository.directory / "lock"}
    assert there(repository) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("rules", "expected", "levels"),
    [
        ({"keep_last": 2}, [3, 4], ["full", "incremental"]),
        ({"keep_last": 1}, [4], ["full"]),
        ({"keep_within": "1d"}, [4], ["full"]),
        ({"keep_last": 1, "keep_tags": ["gold"]}, [1, 4], ["full", "incremental"]),
        ({"keep_last": 1, "keep_monthly": 2}, [0, 4], ["full", "incremental"]),  # the oldest: restic's rule
        ({"keep_last": 1, "keep_monthly": 2, "policy": "proxmox"}, [4], ["full"]),
    ],
)
def test_merging(repository: Fabricated, rules: dict[str, t.Any], expected: list[int], levels: list[str]) -> None:
    repository.edit(1, lambda manifest: manifest.update(tags=["gold"]))
    repository.save_file(4, Path("/etc/vms/web1.conf"), b"definition")
    answer = pruned(repository, merge=True, **rules)
    assert there(repository) == expected
    assert [repository.manifest(number)["level"] for number in expected] == levels
    assert 0 < answer["written"] <= answer["needed"]
    saved = repository.directory / repository.ids[4] / "definition" / "0"
    assert saved.read_bytes() == b"definition"


def test_forever_incremental(repository: Fabricated) -> None:
    """One is added, the oldest is merged away, and so on."""
    for round_ in range(2):
        repository.add(seed=round_)
        pruned(repository, keep_last=3, merge=True)
        assert there(repository) == [len(repository.ids) - n for n in (3, 2, 1)]
    assert [repository.manifest(n)["level"] for n in there(repository)] == ["full", "incremental", "incremental"]


def test_an_increment_on_a_kept_ancestor_stays_small(tmp_path: Path) -> None:
    made = fabricate(tmp_path / "repository", points=5, sizes={"disk0": 64 * MIB})
    made.edit(0, lambda manifest: manifest.update(tags=["gold"]))
    answer = pruned(made, merge=True, keep_last=1, keep_tags=["gold"])
    assert there(made) == [0, 4]
    assert made.manifest(4)["drives"][0]["parent"] == made.ids[0]
    assert answer["merged"][0]["drives"][0]["absorbed"] == [made.ids[n] for n in (3, 2, 1)]
    assert answer["freed"] > 0


def test_protected_backups_stay_until_they_are_not(repository: Fabricated) -> None:
    for _number in range(2):
        repository.add(full=True)
    answer = pruned(repository, protect=[repository.ids[4]])
    assert (answer["protected"], answer["removed"]) == ([repository.ids[4]], [])
    marker = repository.directory / repository.ids[4] / "protected"
    assert marker.is_file()
    assert action(pruned(repository, keep_last=1)) == "kkkkkrk"
    assert action(pruned(repository, keep_last=1, merge=True)) == "mmmmkk"
    assert marker.is_file()
    assert there(repository) == [4, 6]
    assert action(pruned(repository, keep_last=1, unprotect=[repository.ids[4]])) == "rk"
    assert there(repository) == [6]
    assert prune(repository, protect=[repository.ids[0]]).data["error"]["kind"] == "BackupMissing"


def test_copies_the_unreadable_and_the_damaged_stay(repository: Fabricated) -> None:
    for _number in range(4):
        repository.add(full=True)
    repository.edit(
        5, lambda manifest: [manifest.update(level="copy"), *(d.update(level="copy") for d in manifest["drives"])]
    )
    repository.manifest_path(6).write_text("{")
    repository.image(7).chmod(0o600)
    os.truncate(repository.image(7), 65536)
    result = prune(repository, keep_last=1).ok()
    answer = vm_of(result)
    assert {backup["id"]: backup["action"] for backup in answer["backups"]} == {
        name: "remove" if number < 5 else "keep" for number, name in enumerate(repository.ids)
    }
    reasons = {backup["id"]: " ".join(backup["reasons"]) for backup in answer["backups"]}
    for number, word in ((5, "copy"), (6, "cannot be read"), (7, "65536 bytes"), (8, "last")):
        assert word in reasons[repository.ids[number]]
    assert any(repository.ids[7] in warning for warning in result.warnings)


def test_what_an_unreadable_backup_needs_stays(repository: Fabricated) -> None:
    repository.manifest_path(3).unlink()
    repository.manifest_path(3).write_text("no JSON")
    repository.ids.append(repository.ids.pop(4))
    shutil.rmtree(repository.directory / repository.ids[4])
    repository.add(full=True)
    answer = vm_of(prune(repository, keep_last=1).ok())
    actions = {backup["id"]: backup["action"] for backup in answer["backups"]}
    assert set(actions.values()) == {"keep"}, answer
    merged = vm_of(prune(repository, keep_last=1, merge=True).ok())
    assert repository.ids[2] not in merged["removed"]
    assert identical(repository.witness(3), "raw", repository.image(3), "qcow2")


def test_a_newer_release_works_here(repository: Fabricated) -> None:
    repository.edit(4, lambda manifest: manifest.update(format=7))
    before = repository.state()
    result = prune(repository, keep_last=1)
    assert (result.failed, result.data["error"]["kind"]) == (True, "FormatUnsupported")
    assert set(repository.state()) - set(before) <= {repository.directory / "lock"}


@contextmanager
def opened(image: Path, overlay: Path | None = None) -> Iterator[int]:
    """An image in use, as by a VM restored instantly."""
    target = image
    if overlay is not None:
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "qcow2", str(overlay)], check=True
        )
        target = overlay
    file = {"driver": "file", "filename": str(target)}
    node = json.dumps({"driver": "qcow2", "node-name": "n", "read-only": overlay is None, "file": file})
    command = ["qemu-storage-daemon", "--blockdev", node, "--pidfile", str(image.parents[2] / "pid")]
    process = subprocess.Popen(command)
    try:
        while not (image.parents[2] / "pid").exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield process.pid
    finally:
        process.terminate()
        process.wait()
        (image.parents[2] / "pid").unlink(missing_ok=True)


def test_an_instant_restore_keeps_its_backup(repository: Fabricated, tmp_path: Path) -> None:
    repository.add(full=True)
    with opened(repository.image(2), tmp_path / "overlay.qcow2") as pid:
        answer = pruned(repository, keep_last=1)
        assert action(answer) == "kkkrrk"
        assert f"qemu-storage-da ({pid})" in answer["backups"][3]["reasons"][0]
        assert there(repository) == [0, 1, 2, 5]
        assert action(pruned(repository, keep_last=1, merge=True)) == "kkkk"
    assert action(pruned(repository, keep_last=1)) == "rrrk"


def test_a_merge_is_not_made_into_an_image_in_use(repository: Fabricated, tmp_path: Path) -> None:
    with opened(repository.image(4), tmp_path / "overlay.qcow2"):
        assert action(pruned(repository, keep_last=1, merge=True)) == "kkkkk"
    assert action(pruned(repository, keep_last=1, merge=True)) == "mmmmk"


def test_what_lies_about_is_found(repository: Fabricated) -> None:
    """Old unfinished backups go; young and finished ones, and what nobody knows, stay."""
    old, young, whole = (f".20261123T0{n}0000Z-0000000{n}.partial" for n in (1, 2, 3))
    for name in (old, young, whole):
        shutil.copytree(repository.directory / repository.ids[4], repository.directory / name)
        if name != whole:
            (repository.directory / name / "manifest.json").unlink()
    for name in (old, whole):
        for path in [*(repository.directory / name).iterdir(), repository.directory / name]:
            os.utime(path, (1, 1))
    (repository.directory / "20200101T000000Z-00000000").mkdir()
    shutil.copy(repository.image(4), repository.directory / repository.ids[4] / "foreign.qcow2")
    (repository.directory / "README").write_text("mine")
    promise = vm_of(predicted(repository, keep_last=9).ok())
    answer = vm_of(prune(repository, keep_last=9).ok())
    assert promise["orphans"] == answer["orphans"]
    assert {Path(entry["path"]).name: entry["removed"] for entry in answer["orphans"]} == {
        old: True, young: False, whole: False, "20200101T000000Z-00000000": False, "foreign.qcow2": False,
    }  # fmt: skip
    left = set(os.listdir(repository.directory))
    assert left == {*repository.ids, young, whole, "20200101T000000Z-00000000", "README", "lock"}
    assert not vm_of(prune(repository, keep_last=9).ok())["changed"]


def test_damage_is_not_merged(repository: Fabricated) -> None:
    """A flipped byte in a parent: the merged image would have a fresh checksum over it."""
    image = repository.image(1)
    image.chmod(0o600)
    data = bytearray(image.read_bytes())
    data[-1000] ^= 1
    image.write_bytes(data)
    before = repository.state()
    result = prune(repository, keep_last=2, merge=True)
    assert result.data["error"]["kind"] == "ChecksumMismatch"
    assert vm_of(result)["removed"] == []
    after = repository.state()
    assert {path: after.get(path) for path in before if path != repository.directory} == {
        path: before[path] for path in before if path != repository.directory
    }


def test_a_header_that_leads_elsewhere_is_not_followed(repository: Fabricated) -> None:
    image = repository.image(1)
    image.chmod(0o600)
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "/etc/hostname", "-F", "raw", str(image)], check=True
    )
    repository.reseal(1)
    for check in (True, False):
        assert prune(repository, keep_last=1, merge=True, check=check).data["error"]["kind"] in (
            "ImageInvalid",
            "ChainBroken",
        )


BAD: list[tuple[dict[str, t.Any], str]] = [
    ({}, "InputInvalid"),
    ({"keep_last": 0}, "InputInvalid"),
    ({"keep_last": -2}, "InputInvalid"),
    ({"keep_within": "1w"}, "InputInvalid"),
    ({"keep_within": "1d", "policy": "proxmox"}, "InputInvalid"),
    ({"keep_last": 1, "timezone": "Europe/Atlantis"}, "InputInvalid"),
    ({"keep_last": 1, "timezone": "../../etc/passwd"}, "InputInvalid"),
    ({"keep_tags": [""]}, "InputInvalid"),
    ({"keep_last": 1, "max_parallel": 0}, "InputInvalid"),
    ({"protect": ["latest"]}, "InputInvalid"),
    ({"keep_last": 1, "vms": ["web9"]}, "VmUnknown"),
    ({"keep_last": 1, "vms": ["web1", "web1"]}, "InputInvalid"),
    ({"keep_last": 1, "repository": "/nonexistent"}, "RepositoryMissing"),
]


def test_bad_input(repository: Fabricated) -> None:
    before = repository.state()
    for number, (rules, kind) in enumerate(BAD):
        result = prune(repository, check=bool(number % 2), **rules)
        assert result.failed
        assert result.data["error"]["kind"] == kind, rules
    assert repository.state() == before


def test_a_busy_lock(repository: Fabricated) -> None:
    with (repository.directory / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        result = prune(repository, keep_last=1, merge=True, lock_timeout=0.2)
        assert vm_of(result)["error"]["kind"] == "RepositoryLocked"
        prune(repository, keep_last=1, merge=True, check=True).ok()
    assert there(repository) == [0, 1, 2, 3, 4]


def test_one_vm_does_not_stop_the_others(repository: Fabricated) -> None:
    other = repository.path / "web2"
    shutil.copytree(repository.directory, other)
    for name in repository.ids:
        text = (other / name / "manifest.json").read_text().replace('"name": "web1"', '"name": "web2"')
        (other / name / "manifest.json").write_text(text)
    repository.image(1).chmod(0o600)
    with repository.image(1).open("r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        stream.write(b"damage")
    result = prune(repository, keep_last=1, merge=True)
    assert result.failed
    assert [("error" in vm, len(vm["removed"])) for vm in result.data["vms"]] == [(True, 0), (False, 4)]
    assert result.data["error"]["kind"] == "PruneFailed"


def test_another_owner_may_not(repository: Fabricated) -> None:
    for path in [repository.path.parent, repository.path]:
        path.chmod(0o755)
    repository.directory.chmod(0o755)
    for parent in repository.path.parents:
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(parent.stat().st_mode | 0o055)
    result = run_forked("backup_prune", {"repository": str(repository.path), "keep_last": 1}, None, user=65534)
    assert result.failed
    assert vm_of(result)["error"]["kind"] == "TargetUnwritable"


def boundaries(made: Fabricated, log: Path, **rules: t.Any) -> list[str]:
    prune(made, trap=Trap(log=str(log)), **rules).ok()
    return log.read_text().splitlines()


KILLED: dict[str, tuple[dict[str, t.Any], list[int]]] = {
    "remove": ({"keep_last": 2}, [5, 6]),
    "full": ({"keep_last": 1, "keep_tags": ["gold"], "merge": True}, [3, 6]),
    "two steps": ({"keep_last": 1, "keep_tags": ["gold"], "merge": True}, [3, 6]),
}


@pytest.mark.parametrize("case", list(KILLED))
def test_killed_at_every_step(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kill leaves can be restored, kept points exactly, and the same task again ends right."""
    rules, expected = KILLED[case]
    if case == "two steps":  # as on NFS, which cannot exchange two directories
        from ansible_collections.blockops.qemu.plugins.module_utils._repository import merge

        monkeypatch.setattr(merge, "_exchange", lambda *_names: False)
    pristine = fabricate(tmp_path / "pristine", points=5, sizes={"disk0": 4 * MIB, "disk1": 2 * MIB})
    pristine.edit(3, lambda manifest: manifest.update(tags=["gold"]))
    pristine.add(full=case == "remove")
    pristine.add()
    site = copied(pristine, tmp_path / "site")
    steps = boundaries(site, tmp_path / "steps", **rules)
    assert there(site) == expected
    assert len(steps) > (20 if case == "remove" else 50)
    for number in range(0, len(steps), STRIDE):
        shutil.rmtree(site.path)
        site = copied(pristine, tmp_path / "site")
        killed = prune(site, trap=Trap(number=number), **rules)
        assert killed.rc == -signal.SIGKILL, f"{number} {steps[number]}: {killed}"
        whole = all((site.directory / name).exists() for name in (site.ids[point] for point in expected))
        assert whole or case == "two steps"
        for point in expected if whole else ():
            exact(site, point)
        context = f"killed before {steps[number]} ({number})"
        promise = prune(site, check=True, **rules).ok()
        result = prune(site, **rules).ok()
        if not any("put" in warning for warning in promise.warnings):
            assert {**vm_of(result), "written": None} == vm_of(promise), context
        assert there(site) == expected, context
        assert not prune(site, **rules).ok().changed, context


def copied(made: Fabricated, path: Path) -> Fabricated:
    shutil.copytree(made.path, path)
    return Fabricated(path, made.vm, path / made.vm, made.witnesses, made.sizes, list(made.ids))


# Ends the module as soon as it has started its NUMBER-th qemu-img, which lives on.
ORPHAN = """
import asyncio, os
original = asyncio.create_subprocess_exec
count = [0]
async def patched(*args, **kwargs):
    process = await original(*args, **kwargs)
    count[0] += 1
    if count[0] == {number}:
        os.kill(os.getpid(), 9)
    return process
asyncio.create_subprocess_exec = patched
"""


def test_killed_while_qemu_img_works(tmp_path: Path) -> None:
    pristine = fabricate(tmp_path / "pristine", points=4, sizes={"disk0": 8 * MIB})
    pristine.edit(1, lambda manifest: manifest.update(tags=["gold"]))
    rules: dict[str, t.Any] = {"keep_last": 1, "keep_tags": ["gold"], "merge": True}
    for number in range(1, 12):
        site = copied(pristine, tmp_path / f"site{number}")
        params = {"repository": str(site.path), **rules}
        killed = start_module("backup_prune", params, prelude=ORPHAN.format(number=number)).finish()
        if not killed.failed:
            break
        prune(site, **rules).ok()
        assert there(site) == [1, 3]
    assert number > 5


@pytest.mark.parametrize("free", [1, 2, 3])
def test_the_repository_runs_full(tmp_path: Path, free: int) -> None:
    """Not enough for the merge: found before it, or while it is made; nothing changes, and with room it goes on."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mount)], check=True)
    try:
        made = fabricate(mount / "repository", points=4, sizes={"disk0": 8 * MIB})
        shutil.move(made.witnesses, tmp_path / "witnesses")
        made.witnesses = tmp_path / "witnesses"
        filler = mount / "filler"
        stat = os.statvfs(mount)
        with filler.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(stat.f_bavail * stat.f_frsize - free * MIB, 1))
        before = made.state()
        for check in (True, False):
            result = prune(made, keep_last=1, merge=True, check=check)
            assert vm_of(result)["error"]["kind"] in ("NoSpace", "SpaceExhausted"), result
        changed = {path for path in {*before, *made.state()} if before.get(path) != made.state().get(path)}
        assert changed <= {made.directory, made.directory / "lock"}
        assert there(made) == [0, 1, 2, 3]
        filler.unlink()
        assert action(pruned(made, keep_last=1, merge=True)) == "mmmk"
        assert there(made) == [3]
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_full_in_the_middle_of_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate was wrong (somebody else wrote meanwhile)."""
    from ansible_collections.blockops.qemu.plugins.module_utils._repository import space

    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mount)], check=True)
    try:
        made = fabricate(mount / "repository", points=4, sizes={"disk0": 8 * MIB})
        shutil.move(made.witnesses, tmp_path / "witnesses")
        made.witnesses = tmp_path / "witnesses"
        stat = os.statvfs(mount)
        with (mount / "filler").open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, stat.f_bavail * stat.f_frsize - MIB)
        answers = iter([1 << 40])
        true = space.available
        monkeypatch.setattr(space, "available", lambda path: next(answers, None) or true(path))
        result = prune(made, keep_last=1, merge=True)
        assert vm_of(result)["error"]["kind"] == "SpaceExhausted", result
        monkeypatch.undo()
        assert there(made) == [0, 1, 2, 3]
        (mount / "filler").unlink()
        pruned(made, keep_last=1, merge=True)
        assert there(made) == [3]
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_restore_meanwhile_is_right(repository: Fabricated, tmp_path: Path) -> None:
    """Restores of what is being replaced: the old or the new one, or a clear no, and never another content."""
    out = tmp_path / "out"
    out.mkdir()
    running = start_module("backup_prune", {"repository": str(repository.path), "keep_last": 1, "merge": True})
    number = 0
    while running.process.poll() is None:
        dest = out / f"{number}.raw"
        drives = [{"name": "disk0", "dest": str(dest), "format": "raw"}]
        params = {"repository": str(repository.path), "vm": "web1", "point": repository.ids[4], "drives": drives}
        if not run_forked("backup_restore", params, None).failed:
            assert identical(repository.witness(4), "raw", dest, "raw")
            number += 1
    running.finish()
    prune(repository, keep_last=1, merge=True).ok()
    assert there(repository) == [4]


def test_ten_thousand_backups_are_planned_quickly(tmp_path: Path) -> None:
    """The whole module, manifests read from disk; check mode."""
    made = fabricate(tmp_path / "repository", points=2)
    text = made.manifest_path(1).read_text()
    count = 10_000 if STRIDE == 1 else 2_000
    for number in range(2, count):
        name = f"20250101T{number % 86400 // 3600:02}{number % 3600 // 60:02}{number % 60:02}Z-{number:08x}"
        directory = made.directory / name
        directory.mkdir()
        os.link(made.image(1), directory / "disk0.qcow2")
        changed = json.loads(text)
        changed.update(id=name, sequence=number + 1)
        changed["drives"][0].update(parent=made.ids[-1])
        (directory / "manifest.json").write_text(json.dumps(changed))
        made.ids.append(name)
    began = time.monotonic()
    result = run_module("backup_prune", {"repository": str(made.path), "keep_last": 7}, check=True, timeout=120)
    assert len(vm_of(result.ok())["backups"]) == count
    assert time.monotonic() - began < 60


def test_answers_are_documented(repository: Fabricated) -> None:
    (repository.directory / "20200101T000000Z-00000000").mkdir()
    result = prune(repository, keep_last=2, merge=True).ok()
    answer = {key: value for key, value in result.data.items() if key not in COMMON_RETURN}
    assert undocumented(answer, documentation()["backup_prune"]["return"]) == []


def test_opened_at_the_last_moment(repository: Fabricated, tmp_path: Path) -> None:
    """Stopped just before the backup leaves the catalogue, which is when somebody restores it instantly."""
    repository.add(full=True)
    trap = Trap(label="file rename in hide", sends=signal.SIGSTOP)
    running = start_module("backup_prune", {"repository": str(repository.path), "keep_last": 1}, prelude=prelude(trap))
    os.waitid(os.P_PID, running.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    with opened(repository.image(4), tmp_path / "overlay.qcow2"):
        running.process.send_signal(signal.SIGCONT)
        error = vm_of(running.finish())["error"]
        assert (error["kind"], error["backup"]) == ("BecameBusy", repository.ids[4])
        assert there(repository) == [0, 1, 2, 3, 4, 5]
    assert action(pruned(repository, keep_last=1)) == "rrrrrk"


def test_a_hidden_backup_in_use_is_put_back(repository: Fabricated, tmp_path: Path) -> None:
    """Killed between hiding it and the last look."""
    repository.add(full=True)
    with opened(repository.image(4), tmp_path / "overlay.qcow2"):
        hidden = repository.directory / f".{repository.ids[4]}.pruned"
        (repository.directory / repository.ids[4]).rename(hidden)
        answer = vm_of(prune(repository, keep_last=1).ok())
        assert answer["recovered"] == [str(hidden)]
        assert there(repository) == [0, 1, 2, 3, 4, 5]
    assert action(pruned(repository, keep_last=1)) == "rrrrrk"
