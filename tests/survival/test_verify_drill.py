# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Restore drills with real guests: what boots is what was backed up, and nothing of it is left, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import typing as t
from collections.abc import Callable
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._image.qemu_img import in_use
from lab import images
from lab.fixtures import LabVmFactory
from lab.guest import GuestImage
from support.backup import BenchFactory
from support.fabricate import MIB, Fabricated, fabricate
from support.module import Result, Running, run_module, start_module

MODULE = "backup_verify"
TESTS = Path(__file__).resolve().parents[1]
EMPTY = {"machine": "pc", "accel": "tcg", "memory": "32M"}  # the firmware finds nothing to boot

# Run by the drill: asks the restored guest for a file, and QEMU for all that could have leaked.
EVIDENCE = """
import json, os, socket, struct, sys
sys.path.insert(0, {tests!r})
from lab.agent import Agent
from lab.qmp import Qmp
with socket.socket(socket.AF_UNIX) as peer:
    peer.connect(os.environ["BLOCKOPS_AGENT_SOCKET"])
    pid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
with Agent(os.environ["BLOCKOPS_AGENT_SOCKET"]) as agent:
    content = agent.run(["/bin/cat", "/mnt/vda/file"])[1].decode()
    agent.run(["/bin/sh", "-c", "echo changed >/mnt/vda/file; sync"])
with Qmp(os.environ["BLOCKOPS_QMP_SOCKET"]) as qmp:
    seen = dict(
        name=qmp.execute("query-name")["name"], uuid=qmp.execute("query-uuid")["UUID"],
        network=qmp.execute("human-monitor-command", {{"command-line": "info network"}}),
    )
opened = []
for fd in os.listdir(f"/proc/{{pid}}/fd"):
    try:
        target = os.readlink(f"/proc/{{pid}}/fd/{{fd}}")
        flags = [line for line in open(f"/proc/{{pid}}/fdinfo/{{fd}}") if line.startswith("flags")][0].split()[1]
    except FileNotFoundError:  # closed in the meantime, as that of the connection above
        continue
    opened.append([target, int(flags, 8) & os.O_ACCMODE])
mode = os.stat(os.environ["BLOCKOPS_DRILL_DIRECTORY"]).st_mode & 0o777
names = {{key: os.environ[key] for key in ("BLOCKOPS_VM", "BLOCKOPS_BACKUP", "BLOCKOPS_DRILL_DIRECTORY")}}
json.dump(dict(seen, content=content, opened=opened, mode=mode, **names), open(sys.argv[1], "w"))
sys.exit(0 if content == sys.argv[2] else 9)
"""

ASK = """
import json, os, sys
sys.path.insert(0, {tests!r})
from lab.qmp import Qmp
with Qmp(os.environ["BLOCKOPS_QMP_SOCKET"]) as qmp:
    devices = [entry for entry in qmp.execute("query-block") if entry.get("qdev") and "inserted" in entry]
names = sorted(os.path.basename(entry["inserted"]["image"]["filename"]) for entry in devices)
json.dump(names, open(sys.argv[1], "w"))
"""


@pytest.fixture
def made(workdir: Path) -> Fabricated:
    return fabricate(workdir / "repository", points=2)


@pytest.fixture
def room(workdir: Path) -> Path:
    path = workdir / "drills"
    path.mkdir()
    return path


def params(repository: Path, room: Path, drill: dict[str, t.Any], **more: t.Any) -> dict[str, t.Any]:
    base = {"repository": str(repository), "checks": ["drill"], "work_directory": str(room), "drill": drill}
    return {**base, **more}


def drilled(repository: Path, room: Path, drill: dict[str, t.Any], **more: t.Any) -> Result:
    """Run it; nothing may be left, however it ended."""
    result = run_module(MODULE, params(repository, room, drill, **more))
    assert os.listdir(room) == []
    assert processes_with(room) == []
    return result


def processes_with(room: Path) -> list[str]:
    """Command lines of what runs in a drill's directory."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.fsencode(f"DIRECTORY={room}/") in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def until(condition: Callable[[], object], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def booting(guest: GuestImage) -> dict[str, t.Any]:
    arguments = [argument.replace(" quiet", "") for argument in guest.arguments()]
    return {"machine": "pc", "accel": "tcg", "memory": "96M", "timeout": 120, "arguments": arguments}


def error(result: Result) -> dict[str, t.Any]:
    assert result.failed, result.stdout
    return dict(result.data["error"])


def test_what_boots_is_what_was_backed_up(
    workdir: Path, room: Path, lab_vm_factory: LabVmFactory, guest_image: GuestImage
) -> None:
    """An incremental of a running guest is booted (its full, too), and says what the guest had written by then."""
    vm = lab_vm_factory()
    backup = {"repository": str(workdir / "repository"), "vms": [{"name": "vm", "socket": str(vm.socket)}]}
    ids = []
    for written in (b"first", b"second"):
        vm.write_file("/mnt/vda/file", written)
        ids.append(run_module("qmp_drive_backup", {**backup, "quiesce": "off"}).ok().data["vms"][0]["backup"])
    vm.write_file("/mnt/vda/file", b"third")
    script = workdir / "evidence.py"
    script.write_text(EVIDENCE.format(tests=str(TESTS)))
    repository = workdir / "repository"
    before = contents(repository)
    drill = booting(guest_image)
    points = list(zip(ids, ("first", "second")))
    for backup_id, text in points if os.environ.get("BLOCKOPS_SLOW") else points[1:]:  # a boot takes seconds
        answer = workdir / f"{text}.json"
        check = [sys.executable, str(script), str(answer), text]
        drill.update(agent=True, console=r"^\[.*Linux version \d", check=check)
        result = drilled(repository, room, drill, vm=["vm"], point=backup_id).ok()
        (entry,) = result.data["backups"]
        assert entry["checks"][-1]["conditions"] == ["agent", "console", "check"]
        assert 0 < entry["seconds_to_boot"] < 120
        isolated(json.loads(answer.read_text()), text, backup_id, repository, room)
    assert contents(repository) == before, "a backup was changed"
    assert vm.read_file("/mnt/vda/file") == b"third"
    spoil(repository / "vm" / ids[1] / "vda.qcow2", b"second")
    spoilt = drilled(repository, room, drill, vm=["vm"], point=ids[1])
    assert (error(spoilt)["kind"], error(spoilt)["status"]) == ("DrillRefused", 9), "nobody compared checksums"
    assert "EXT4-fs" in error(spoilt)["console"]
    levels = run_module("qmp_drive_backup", {**backup, "quiesce": "off"}).ok().data["vms"][0]["drives"]
    assert [drive["level"] for drive in levels] == ["incremental"], "records do not break the chain"


def spoil(image: Path, text: bytes) -> None:
    content = image.read_bytes()
    assert text in content
    image.chmod(0o600)
    image.write_bytes(content.replace(text, text.swapcase()))


def contents(repository: Path) -> dict[Path, bytes]:
    files = (path for path in repository.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.name not in ("verified.json", "lock")}


def isolated(seen: dict[str, t.Any], text: str, backup_id: str, repository: Path, room: Path) -> None:
    assert seen["content"] == text
    assert seen["BLOCKOPS_BACKUP"] == backup_id
    assert seen["network"] == ""
    assert seen["name"].startswith("blockops-drill-")
    assert seen["mode"] == 0o700
    assert seen["BLOCKOPS_DRILL_DIRECTORY"].startswith(str(room))
    opened = [(path, mode) for path, mode in seen["opened"] if path.startswith(str(repository.parent))]
    assert any(path.startswith(str(repository)) for path, _mode in opened)
    writable = [path for path, mode in opened if mode != os.O_RDONLY]
    assert all(path.startswith(str(room)) for path in writable), writable


def test_a_guest_that_never_boots(made: Fabricated, room: Path) -> None:
    before = contents(made.path)
    result = drilled(made.path, room, {**EMPTY, "timeout": 1.0})
    assert error(result)["kind"] == "DrillTimeout"
    assert "the guest agent" in result.msg
    record = json.loads(made.manifest_path(1).with_name("verified.json").read_text())
    assert (record["outcome"], record["checks"][-1]["kind"]) == ("failed", "DrillTimeout")
    assert contents(made.path) == before


def test_console_that_never_says_it(made: Fabricated, room: Path) -> None:
    result = drilled(made.path, room, {**EMPTY, "console": "login:", "timeout": 1.0})
    assert error(result)["kind"] == "DrillTimeout"
    assert "login:" in result.msg


def test_qemu_that_ends(made: Fabricated, room: Path) -> None:
    result = drilled(made.path, room, {**EMPTY, "machine": "no-such-machine"})
    assert error(result)["kind"] == "DrillEnded"
    assert "unsupported machine type" in result.msg


@pytest.mark.parametrize(("status", "kind"), [(0, None), (7, "DrillRefused")])
def test_the_users_check_decides(made: Fabricated, room: Path, status: int, kind: str | None) -> None:
    result = drilled(made.path, room, {**EMPTY, "check": ["sh", "-c", f"echo it says so; exit {status}"]})
    if kind is None:
        assert result.ok().changed
    else:
        assert (error(result)["kind"], error(result)["status"]) == (kind, status)
        assert error(result)["said"] == "it says so"


def test_a_whole_command_line(made: Fabricated, room: Path) -> None:
    node = '{"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"{drive:disk0}"}}'
    command = ["qemu-system-x86_64", "-M", "pc,accel=tcg", "-m", "32M", "-nodefaults", "-name", "web1"]
    command += ["-blockdev", node, "-device", "virtio-blk-pci,drive=n"]
    check = 'test -S "$BLOCKOPS_QMP_SOCKET" && test -S "$BLOCKOPS_AGENT_SOCKET" && test -e "$BLOCKOPS_CONSOLE"'
    drilled(made.path, room, {"command": command, "check": ["sh", "-c", check]}).ok()
    wrong = drilled(made.path, room, {"command": [*command, "-drive", "file={drive:other}"], "check": ["true"]})
    assert error(wrong)["kind"] == "DriveUnknown"
    assert not made.manifest_path(1).with_name("verified.json").read_text().count("DriveUnknown")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_full_work_directory_is_not_the_backups_fault(made: Fabricated, room: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "drills", room], check=True)
    try:
        fill = 'dd if=/dev/zero of="$BLOCKOPS_DRILL_DIRECTORY/fill" bs=64k 2>/dev/null; exit 1'
        result = drilled(made.path, room, {**EMPTY, "check": ["sh", "-c", fill]})
    finally:
        subprocess.run(["umount", room], check=True)
    assert error(result)["kind"] == "SpaceExhausted"
    record = json.loads(made.manifest_path(1).with_name("verified.json").read_text())
    assert [check["name"] for check in record["checks"]] == ["chain"], "nothing is held against the backup"


@pytest.mark.parametrize("checks", [["drill"], ["checksums", "drill"]])
def test_a_damaged_image_does_not_boot(made: Fabricated, room: Path, checks: list[str]) -> None:
    """Its table is nowhere. Without checksums QEMU is the one to say so."""
    image = made.image(0)
    image.chmod(0o600)
    with image.open("r+b") as stream:
        stream.seek(40)
        stream.write((0x12345).to_bytes(8, "big"))
    result = drilled(made.path, room, {**EMPTY, "check": ["true"]}, checks=checks)
    assert error(result)["kind"] == ("ChecksumMismatch" if "checksums" in checks else "ImageToolFailed")


@pytest.mark.parametrize(
    ("interface", "machine"),
    [("virtio-blk", "q35"), ("virtio-scsi", "pc"), ("sata", "q35"), ("ide", "pc"), ("nvme", "q35")],
)
def test_every_interface(workdir: Path, room: Path, interface: str, machine: str) -> None:
    """QEMU takes the drives, three of them, and shows each to the guest."""
    made = fabricate(workdir / "repository", points=1, sizes={"system": MIB, "data": MIB, "more": MIB})
    answer = workdir / "answer"
    ask = ASK.format(tests=str(TESTS))
    check = [sys.executable, "-c", ask, str(answer)]
    drilled(made.path, room, {**EMPTY, "machine": machine, "interface": interface, "check": check}).ok()
    assert json.loads(answer.read_text()) == ["0.qcow2", "1.qcow2", "2.qcow2"]


def test_a_backup_that_is_replaced_meanwhile(made: Fabricated, room: Path) -> None:
    manifest = made.manifest_path(0)
    result = drilled(made.path, room, {**EMPTY, "check": ["sh", "-c", f"chmod u+w {manifest}; echo >>{manifest}"]})
    assert error(result)["kind"] == "BackupChanged"
    assert not result.changed
    assert not made.manifest_path(1).with_name("verified.json").exists()


def test_many_drills_one_failure(workdir: Path, room: Path) -> None:
    """Each point has its own QEMU; the check fails for one of them."""
    made = fabricate(workdir / "repository", points=3)
    drill = {**EMPTY, "check": ["sh", "-c", f'test "$BLOCKOPS_BACKUP" != {made.ids[1]}']}
    result = drilled(made.path, room, drill, point="all", max_parallel=3)
    assert [entry["outcome"] for entry in result.data["backups"]] == ["passed", "failed", "passed"]
    again = drilled(made.path, room, drill, point="unverified")
    assert [entry["backup"] for entry in again.data["backups"]] == [made.ids[1]]


def test_images_without_what_lies_below(made: Fabricated, room: Path) -> None:
    made.edit(1, lambda manifest: manifest["drives"][0].update(standalone=False, parent=None, level="copy"))
    os.chmod(made.image(1), 0o600)
    images.run_tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", str(made.image(1)))
    made.reseal(1)
    for check in (True, False):
        result = run_module(MODULE, params(made.path, room, EMPTY), check=check)
        assert error(result)["kind"] == "DrillImpossible"


# -- killed ------------------------------------------------------------------------------------------------------------


def hanging(made: Fabricated, room: Path) -> Running:
    """A module whose drill goes on for long; its QEMU and its check run."""
    drill = {**EMPTY, "check": ["sh", "-c", "sleep 1000 & sleep 1000"], "timeout": 600.0}
    running = start_module(MODULE, params(made.path, room, drill))
    until(lambda: len(processes_with(room)) >= 4)
    return running


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_module_leaves_nothing(made: Fabricated, room: Path, sent: signal.Signals) -> None:
    # Whoever runs the tests in a shell's background has them ignore it, and all their children.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = hanging(made, room)
    signal.signal(signal.SIGINT, ignored)
    running.process.send_signal(sent)
    assert running.finish().failed
    until(lambda: not processes_with(room) and not os.listdir(room))
    assert not made.manifest_path(1).with_name("verified.json").exists()


def test_what_a_killed_guard_leaves_goes_with_the_next_run(made: Fabricated, room: Path) -> None:
    running = hanging(made, room)
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
    guards = [pid for pid in children if os.fsencode(MODULE) in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(guards) == 1
    os.kill(int(guards[0]), signal.SIGKILL)
    running.process.kill()
    running.finish()
    assert processes_with(room)
    busy = room / ".blockops-drill-fedcba98"  # not ours to judge: it is being made
    busy.mkdir()
    result = run_module(MODULE, params(made.path, room, {**EMPTY, "check": ["true"]})).ok()
    assert result.changed
    assert os.listdir(room) == [busy.name]
    assert processes_with(room) == []


def test_a_running_drill_is_left_alone(made: Fabricated, room: Path) -> None:
    running = hanging(made, room)
    others = set(os.listdir(room))
    run_module(MODULE, params(made.path, room, {**EMPTY, "check": ["true"]})).ok()
    assert set(os.listdir(room)) == others
    running.process.kill()
    running.finish()
    until(lambda: not processes_with(room) and not os.listdir(room))


def test_backup_and_restore_do_not_mind(bench_factory: BenchFactory, workdir: Path, room: Path) -> None:
    """The record beside the manifest, and a drill that goes on while the next backup is made."""
    bench = bench_factory(1)
    bench.backup().ok()
    run_module(MODULE, {"repository": str(bench.repository)}).ok()
    drill = {**EMPTY, "check": ["sleep", "1000"], "timeout": 600.0}
    running = start_module(MODULE, params(bench.repository, room, drill))
    until(lambda: len(processes_with(room)) >= 2)
    (first,) = bench.ids()
    assert in_use(str(bench.store / first / "d0.qcow2")), "who prunes can see it"
    bench.change()
    bench.backup().ok()
    assert set(bench.levels().values()) == {"incremental"}
    bench.expect_restorable()
    running.process.kill()
    running.finish()
    until(lambda: not processes_with(room) and not os.listdir(room))
    bench.no_leftovers()
