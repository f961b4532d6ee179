# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import typing as t
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils import _errors as errors
from ansible_collections.blockops.qemu.plugins.module_utils._repository import checksum, place
from ansible_collections.blockops.qemu.plugins.module_utils._repository._files import os_error
from ansible_collections.blockops.qemu.plugins.module_utils._repository.manifest import DriveRecord, Manifest
from ansible_collections.blockops.qemu.plugins.module_utils._repository.partial import Partial, check_definition
from ansible_collections.blockops.qemu.plugins.module_utils._repository.store import Repository, VmStore

ID, SECOND = "20261123T054500Z-1f3c9a2e", "20261122T054500Z-00000001"
NOW = datetime(2026, 11, 23, tzinfo=timezone.utc)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(str(tmp_path / "repository"))


@pytest.fixture
def store(repository: Repository) -> VmStore:
    store = repository.vm("web 1")
    store.ensure(0o750)
    return store


def manifest_of(repository: Repository, backup_id: str, content: bytes, **more: t.Any) -> Manifest:
    drive = DriveRecord("disk0", "disk0.qcow2", "full", 512, len(content), 0)
    return Manifest(
        backup_id, repository.id, 1, "web 1", None, "full", "full", "crash", NOW, NOW, NOW, (drive,), **more
    )


def fill(partial: Partial, content: bytes = b"image") -> None:
    fd = partial.create_image("disk0.qcow2", 0o600)
    os.write(fd, content)
    os.close(fd)
    assert partial.seal("disk0.qcow2", None, None, 0o440) == len(content)


def publish(repository: Repository, store: VmStore, backup_id: str = ID, **more: t.Any) -> Manifest:
    partial = store.begin(backup_id, 0o750)
    partial.write_intent({"drives": []})
    fill(partial)
    manifest = replace(manifest_of(repository, backup_id, b"image"), **more)
    partial.publish(manifest)
    return manifest


def test_create_is_open_the_second_time(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.mkdir()
    (path / "foreign").write_text("mine")
    one, two = Repository.create(str(path)), Repository.create(str(path))
    assert one == two == Repository.open(str(path))
    assert sorted(os.listdir(path)) == ["foreign", "repository.json"]


def test_create_by_many_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; from ansible_collections.blockops.qemu.plugins.module_utils._repository.store import Repository\n"
        "print(Repository.create(sys.argv[1]).id)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "r")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _number in range(8)]
    assert len({process.communicate()[0] for process in started}) == 1
    assert os.listdir(tmp_path / "r") == ["repository.json"]


def test_create_needs_the_parent(tmp_path: Path) -> None:
    with pytest.raises(errors.TargetUnwritable, match="mounted"):
        Repository.create(str(tmp_path / "not" / "there"))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, errors.RepositoryMissing),
        ("", errors.RepositoryInvalid),
        ("[]", errors.RepositoryInvalid),
        ('{"format": 1, "id": "../../"}', errors.RepositoryInvalid),
        ('{"format": 2, "id": "later"}', errors.FormatUnsupported),
    ],
)
def test_open(tmp_path: Path, content: str | None, error: type[Exception]) -> None:
    if content is not None:
        (tmp_path / "repository.json").write_text(content)
    with pytest.raises(error):
        Repository.open(str(tmp_path))


def test_publish_and_list(repository: Repository, store: VmStore) -> None:
    later = publish(repository, store, SECOND, sequence=2)
    first = publish(repository, store)
    found = store.catalogue()
    assert found.manifests == (first, later)
    assert not found.broken
    assert found.get(SECOND) == later
    assert store.partials() == []
    assert store.looks_intact(first, first.drives[0]) is None
    assert repository.vm_names() == ["web 1"]
    inside = Path(store.backup_path(first))
    assert sorted(os.listdir(inside)) == ["disk0.qcow2", "manifest.json"]
    assert inside.stat().st_mode & 0o777 == 0o750
    assert (inside / "manifest.json").stat().st_mode & 0o777 == 0o440


def test_foreign_entries_are_passed_over(repository: Repository, store: VmStore, tmp_path: Path) -> None:
    publish(repository, store)
    directory, elsewhere = Path(store.directory), tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("lost+found", ".snapshot", "a b"):
        (Path(repository.path) / name).mkdir()
    (Path(repository.path) / "web2").symlink_to(elsewhere)
    (directory / "20260101T000000Z-00000000").symlink_to(directory / ID)
    (directory / "20260102T000000Z-00000000").mkdir()
    (directory / ".20260103T000000Z-00000000.partial").symlink_to(elsewhere)
    (directory / "notes.txt").write_text("")
    assert repository.vm_names() == ["web 1"]
    found = store.catalogue()
    assert [manifest.id for manifest in found.manifests] == [ID]
    assert not found.broken
    assert store.partials() == []
    assert not repository.vm("web2").exists()
    with pytest.raises(errors.RepositoryInvalid):
        repository.vm("web2").ensure()


def test_a_bad_manifest_hides_no_other(repository: Repository, store: VmStore) -> None:
    publish(repository, store)
    publish(repository, store, SECOND, sequence=2)
    path = Path(store.directory) / ID / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    found = store.catalogue()
    assert [manifest.id for manifest in found.manifests] == [SECOND]
    assert [(backup_id, error.kind) for backup_id, error in found.broken] == [(ID, "ManifestInvalid")]


def test_shortened_names_are_told_by_the_manifest(repository: Repository) -> None:
    name = "w" * 300
    store = repository.vm(name)
    store.ensure()
    partial = store.begin(ID, 0o700)
    fill(partial)
    partial.publish(replace(manifest_of(repository, ID, b"image"), vm_name=name))
    assert repository.vm_names() == [name]


def test_publish_refuses_what_is_not_there(repository: Repository, store: VmStore) -> None:
    partial = store.begin(ID, 0o700)
    with pytest.raises(errors.PartialIncomplete):
        partial.publish(manifest_of(repository, ID, b"image"))
    fill(partial, b"image that grew")
    with pytest.raises(errors.PartialIncomplete):
        partial.publish(manifest_of(repository, ID, b"image"))
    with pytest.raises(errors.ManifestInvalid):
        partial.publish(manifest_of(repository, SECOND, b"image"))
    assert store.catalogue().manifests == ()


def test_ids_are_never_taken_twice(repository: Repository, store: VmStore) -> None:
    manifest = publish(repository, store)
    with pytest.raises(errors.BackupExists):
        store.begin(ID)
    store.begin(SECOND)
    with pytest.raises(errors.BackupExists):
        store.begin(SECOND)
    hijacked = Partial(ID, store.partials()[0].directory, "web 1")
    with pytest.raises(errors.BackupExists):
        hijacked.publish(manifest)


@pytest.mark.parametrize("file", ["../x.qcow2", "/x.qcow2", ".x.qcow2", "x.raw", "intent.json"])
def test_images_stay_inside(store: VmStore, file: str) -> None:
    partial = store.begin(ID)
    for act in (lambda: partial.create_image(file, 0o600), lambda: partial.seal(file, None, None, 0o400)):
        with pytest.raises(errors.PartialIncomplete):
            act()


def test_intent(store: VmStore) -> None:
    partial = store.begin(ID)
    assert partial.read_intent() is None
    partial.write_intent({"a": 1})
    partial.write_intent({"a": 2})
    assert partial.read_intent() == {"a": 2}
    (Path(partial.directory) / "intent.json").write_text("{")
    assert partial.read_intent() is None


def test_remove_never_follows_links(store: VmStore, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("")
    partial = store.begin(ID)
    (Path(partial.directory) / "link").symlink_to(precious)
    partial.remove()
    partial.remove()
    Path(partial.directory).symlink_to(precious)
    partial.remove()
    assert os.listdir(precious) == ["file"]
    assert not os.path.lexists(partial.directory)


def test_definition(repository: Repository, store: VmStore, tmp_path: Path) -> None:
    file, link = tmp_path / "web1.conf", tmp_path / "link"
    file.write_text("x")
    file.chmod(0o600)
    link.symlink_to(file)
    check_definition([str(file), str(link)])
    for bad in (str(tmp_path / "no"), "relative", str(tmp_path), f"{tmp_path}/../x", "/dev/zero"):
        with pytest.raises(errors.DefinitionMissing):
            check_definition([str(file), bad])
    with pytest.raises(errors.DefinitionMissing):
        check_definition([str(file), str(file)])
    partial = store.begin(ID, 0o700)
    fill(partial)
    records = partial.save_definition([str(file), str(link)], mode=0o440)
    assert [record.file for record in records] == ["definition/0", "definition/1"]
    assert records[0].mode == 0o600
    partial.publish(replace(manifest_of(repository, ID, b"image"), definition=records))
    assert store.catalogue().manifests[0].definition == records


# -- killed at every step ----------------------------------------------------------------------------------------------

KILLED = """
import os, sys
step, path, backup = int(sys.argv[1]), sys.argv[2], sys.argv[3]
def dying(function):
    def call(*args, **more):
        global step
        step -= 1
        if step < 0:
            os._exit(9)
        return function(*args, **more)
    return call
from ansible_collections.blockops.qemu.plugins.module_utils._repository.store import Repository
from ansible_collections.blockops.qemu.plugins.module_utils._repository.manifest import Manifest
repository = Repository.open(path)
store = repository.vm("web 1")
for name in ("open", "write", "fsync", "rename", "mkdir", "fchmod", "chmod", "unlink", "link", "close"):
    setattr(os, name, dying(getattr(os, name)))
partial = store.begin(backup, 0o700)
partial.write_intent({"x": 1})
fd = partial.create_image("disk0.qcow2", 0o600)
os.write(fd, b"image")
os.close(fd)
partial.seal("disk0.qcow2", None, None, 0o440)
text = open(sys.argv[4], "rb").read()
partial.publish(Manifest.from_json(text, "x", backup_id=backup, vm_directory="web%201"))
os._exit(0)
"""


def test_killed_at_every_system_call(repository: Repository, store: VmStore, tmp_path: Path) -> None:
    """Whatever the moment: a backup that is listed is whole, and what is not listed can be finished or removed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    text = tmp_path / "manifest"
    unpublished = finished = 0
    for step in range(200):
        backup_id = f"20261123T054500Z-{step:08x}"
        manifest = replace(manifest_of(repository, backup_id, b"image"), sequence=step + 1)
        text.write_text(manifest.to_json())
        command = [sys.executable, "-S", "-c", KILLED, str(step), repository.path, backup_id, str(text)]
        rc = subprocess.run(command, env=environment, check=False).returncode
        listed = store.catalogue()
        assert not listed.broken
        for found in listed.manifests:
            assert store.looks_intact(found, found.drives[0]) is None
        for partial in store.partials():
            unpublished += 1
            ready = partial.read_manifest()
            if ready is not None:
                finished += 1
                partial.publish(ready)
            partial.remove()
        assert store.partials() == []
        assert (listed.get(backup_id) is not None) >= (rc == 0)
        if rc == 0:
            break
    assert rc == 0
    assert unpublished > 20
    assert finished >= 2
    assert set(os.listdir(store.directory)) == {manifest.id for manifest in store.catalogue().manifests}


# -- lock --------------------------------------------------------------------------------------------------------------


def test_lock_excludes_and_names_its_holder(store: VmStore) -> None:
    async def body() -> None:
        async with store.lock(1):
            with pytest.raises(errors.RepositoryLocked) as caught:
                async with store.lock(0.25):
                    pass
            assert f"process {os.getpid()} on" in caught.value.data["holder"]
            assert caught.value.data["waited"] >= 0.2
        async with store.lock(0):
            pass

    asyncio.run(body())


def test_stale_text_does_not_matter(store: VmStore) -> None:
    (Path(store.directory) / "lock").write_text('{"host": "gone", "pid": 1, "since": "2020"}')

    async def body() -> None:
        async with store.lock(0):
            pass

    asyncio.run(body())


def test_lock_waits_for_a_holder_that_ends(store: VmStore) -> None:
    script = (
        "import fcntl,sys,time; f=open(sys.argv[1],'a'); fcntl.flock(f,2); print('held',flush=True); time.sleep(60)"
    )
    path = os.path.join(store.directory, "lock")
    holder = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE)
    if holder.stdout is None:
        raise RuntimeError
    holder.stdout.readline()

    async def body() -> None:
        asyncio.get_running_loop().call_later(0.2, holder.kill)
        async with store.lock(10):
            pass

    asyncio.run(body())
    holder.communicate()


# -- small things ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, (4 << 20) - 1, 4 << 20, (9 << 20) + 17])
def test_checksum(tmp_path: Path, size: int) -> None:
    import hashlib

    path = tmp_path / "file"
    data = os.urandom(size)
    path.write_bytes(data)
    assert asyncio.run(checksum.sha256(str(path))) == hashlib.sha256(data).hexdigest()


def test_checksum_of_no_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", "missing", "."):
        with pytest.raises(errors.FileFailed):
            asyncio.run(checksum.sha256(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, errors.SpaceExhausted),
        (errno.EDQUOT, errors.NoSpace),
        (errno.EROFS, errors.TargetUnwritable),
        (errno.EIO, errors.FileFailed),
    ],
)
def test_os_errors_are_named(number: int, error: type[Exception]) -> None:
    found = os_error(OSError(number, os.strerror(number)), "/x", "writing")
    assert isinstance(found, error)
    assert "/x" in str(found)
    assert os.strerror(number) in str(found)


def test_place_appears_once_and_leaves_nothing(tmp_path: Path) -> None:
    dest = tmp_path / "disk.qcow2"
    one, two = place.claim(str(dest)), place.claim(str(dest))
    Path(one.content).write_text("one")
    assert place.remove_leftovers(str(dest)) == []
    one.finish(place.Owner(mode=0o640))
    one.appear()
    with pytest.raises(errors.DestinationExists):
        two.appear()
    one.drop()
    two.drop()
    assert os.listdir(tmp_path) == ["disk.qcow2"]
    assert dest.stat().st_mode & 0o777 == 0o640


def test_leftovers_of_the_dead_are_removed_and_others_are_not(tmp_path: Path) -> None:
    dest = tmp_path / "disk.qcow2"
    dead, living = place.claim(str(dest)), place.claim(str(dest))
    os.close(dead.lock)
    empty = tmp_path / ".disk.qcow2.00000000.restoring"
    empty.mkdir()
    for name in (".disk.qcow2.mine.restoring", ".other.qcow2.00000000.restoring"):
        (tmp_path / name).mkdir()
    assert sorted(place.remove_leftovers(str(dest))) == sorted([dead.directory, str(empty)])
    living.drop()
    assert sorted(os.listdir(tmp_path)) == [".disk.qcow2.mine.restoring", ".other.qcow2.00000000.restoring"]


def test_place_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    dest = tmp_path / "disk.qcow2"
    one, two = place.claim(str(dest)), place.claim(str(dest))
    Path(one.content).write_text("one")
    one.appear()
    assert dest.read_text() == "one"
    with pytest.raises(errors.DestinationExists):
        two.appear()
    one.drop()
    two.drop()
    assert Repository.create(str(tmp_path / "r")) == Repository.open(str(tmp_path / "r"))


def test_undoing_goes_back_in_order() -> None:
    done: list[int] = []
    with pytest.raises(KeyError), place.undoing() as undo:
        undo.append(lambda: done.append(1))
        undo.append(lambda: os.unlink("/nonexistent/x"))
        undo.append(lambda: done.append(2))
        raise KeyError
    assert done == [2, 1]
