# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirt and virtnbdbackup, when the distribution's packages are installed: a private libvirtd in session mode.

As root it is run for the user "nobody": that is what makes it a session, and keeps it out of /etc and /var. The VM
has a disk of the same size and content as the other tools' one.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.machines import MIB, make_disk, places
from bench.tools import ToolFailed, command, fresh
from lab.guard import guard, release

_SETTINGS = """
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
remember_owner = 0
dynamic_ownership = 0
"""
_DOMAIN = """<domain type='qemu'><name>bench</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os><devices><emulator>{emulator}</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>"""
_PUSH = """<domainbackup mode='push'><disks><disk name='vda' type='file'><target file='{target}'/>
<driver type='qcow2'/></disk></disks></domainbackup>"""
_CHECKPOINT = "<domaincheckpoint><name>pushed</name></domaincheckpoint>"


def find_libvirt() -> str:
    """Empty when both are there, else why they are absent."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [name for name in ("libvirtd", "virsh", "virtnbdbackup") if shutil.which(name, path=path) is None]
    return f"libvirt and virtnbdbackup (not installed: {', '.join(missing)})" if missing else ""


class Libvirt:
    """One domain; ``directory`` belongs to the user whose session it is."""

    def __init__(self, directory: Path, disk: Path) -> None:
        self.directory = directory
        self.disk = disk
        self._run_directory = directory / "run"
        self.environment = {
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
            "HOME": str(directory),
            "XDG_RUNTIME_DIR": str(self._run_directory),
            "XDG_CONFIG_HOME": str(directory / "config"),
            "XDG_CACHE_HOME": str(directory / "cache"),
            "LIBVIRT_DEFAULT_URI": "qemu:///session",
            "LC_ALL": "C.UTF-8",
        }
        nobody = pwd.getpwnam("nobody")
        self.identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            self.identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self.identity["env"] = self.environment

    def start(self) -> subprocess.Popen[bytes]:
        """libvirtd and the domain, paused."""
        settings = self.directory / "config" / "libvirt"
        settings.mkdir(parents=True)
        self._run_directory.mkdir(mode=0o700)
        (settings / "qemu.conf").write_text(_SETTINGS)
        emulator = shutil.which("qemu-system-x86_64")
        definition = self.directory / "domain.xml"
        definition.write_text(_DOMAIN.format(emulator=emulator, disk=self.disk))
        if "user" in self.identity:
            for path in (self.directory, *self.directory.rglob("*")):
                os.chown(path, self.identity["user"], self.identity["group"])
        with (self.directory / "libvirtd.log").open("wb") as log:
            process = subprocess.Popen(["libvirtd"], stdout=log, stderr=log, cwd=self.directory, **self.identity)
        self._wait_for_daemon()
        self.virsh("define", str(definition))
        self.virsh("start", "--paused", "bench")
        return process

    def _wait_for_daemon(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                self.virsh("version")
                return
            except ToolFailed:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def virsh(self, *words: str) -> str:
        return command("virsh", "-q", *words, cwd=self.directory, **self.identity)[1]

    def dirty(self, amount: int, size: int, seed: int) -> None:
        """Write ``amount`` bytes as the guest would, to the places that Machine.dirty takes."""
        for place in places(amount, size, seed):
            line = f'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "write -P 7 {place * MIB} {MIB}"'
            self.virsh("qemu-monitor-command", "--hmp", "bench", line)

    def push(self) -> float:
        """A full by ``backup-begin`` in push mode with a checkpoint, until the job's end."""
        target = self.directory / "pushed.qcow2"
        backup, checkpoint = self.directory / "backup.xml", self.directory / "checkpoint.xml"
        backup.write_text(_PUSH.format(target=target))
        checkpoint.write_text(_CHECKPOINT)
        begin = time.monotonic()
        words = ["virsh", "-q", "event", "bench", "--event", "job-completed", "--timeout", "300"]
        waiter = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=self.directory, **self.identity)
        try:
            time.sleep(0.05)  # the waiter must be registered; a shell script would do the same
            self.virsh("backup-begin", "bench", str(backup), str(checkpoint))
            waiter.wait(300)
        finally:
            waiter.kill()
            waiter.wait()
        seconds = time.monotonic() - begin
        if waiter.returncode != 0 or "Completed" not in self.virsh("domjobinfo", "bench", "--completed"):
            raise ToolFailed("virsh backup-begin: the job did not complete")
        target.unlink()
        self.virsh("checkpoint-delete", "bench", "pushed")  # virtnbdbackup refuses to work beside it
        return seconds

    def nbdbackup(self, level: str) -> float:
        """virtnbdbackup with its defaults (stream format)."""
        target = self.directory / "nbdbackup"
        if level in ("full", "copy"):
            shutil.rmtree(target, ignore_errors=True)
        words = ["virtnbdbackup", "-U", "qemu:///session", "-d", "bench", "-l", level, "-n", "-o", str(target)]
        return command(*words, "-f", str(self._run_directory / "nbd"), cwd=self.directory, **self.identity)[0]

    def newest_increment(self) -> int:
        """Bytes of the newest incremental that virtnbdbackup wrote."""
        found = max((self.directory / "nbdbackup").glob("vda.inc.*.data"), key=lambda path: path.stat().st_mtime_ns)
        return found.stat().st_size


@contextmanager
def libvirt(directory: Path, size: int, data: int, seed: int = 1) -> Iterator[Libvirt]:
    """The daemon and its domain; both are gone afterwards."""
    home = fresh(directory)
    home.chmod(0o755)
    bench = Libvirt(home, make_disk(home / "vda.qcow2", size, data, seed))
    guard(home)
    process = bench.start()
    try:
        yield bench
    finally:
        with suppress(ToolFailed):
            bench.virsh("destroy", "bench")
        process.terminate()
        process.wait(20)
        release(home)
