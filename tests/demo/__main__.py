# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""Back up two running VMs, lose a disk, restore it, boot again, and compare; then patch night. Run by scripts/demo."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from demo.night import Night, NightError, variables
from demo.playbooks import PlaybookError, Playbooks
from demo.report import manifests, row, table
from lab import vmctl
from lab.guard import workspace
from lab.guest import guest_image
from lab.process import LabError
from lab.vm import LabVm

MIB = 1024 * 1024
DATA = {"web": 12, "db": 8}  # MiB written before the full backup
VICTIM = "web"


class DemoError(Exception):
    """Something is not as the collection promises."""


class Demo:
    """The story, a chapter per method. Everything lives in ``directory``."""

    def __init__(self, directory: Path, verbose: bool) -> None:
        self._began = time.monotonic()
        self._directory = directory
        self._vms = directory / "vms"
        self._repository = directory / "backup"
        self._vms.mkdir()
        self._machines: dict[str, LabVm] = {}
        self._checksums: dict[str, dict[str, str]] = {}
        self._playbooks = Playbooks(
            directory,
            {
                "blockops_become": False,
                "hypervisor_venv": str(directory / "venv"),
                "vm_backup_repository": str(self._repository),
                "vm_backup_sockets": [f"{self._vms}/*.qmp"],
                # each VM's definition file is saved with it
                "vm_backup_select": f"[].merge(@, {{definition: [join('', ['{self._vms}/', name, '.conf'])]}})",
                "vm_restore_repository": str(self._repository),
                "vm_restore_socket": f"{self._vms}/{{{{ vm_restore_vm }}}}.qmp",
                "vm_restore_start_command": shlex.join([sys.executable, vmctl.__file__, "start", f"{self._vms}/"])
                + "{{ vm_restore_vm }}.conf",
                **variables(self._vms),
            },
            verbose,
        )

    def say(self, text: str) -> None:
        print(f"\n[{time.monotonic() - self._began:5.1f} s] {text}", flush=True)

    def boot(self, stack: ExitStack) -> None:
        guest_image(lambda text: print(f"    {text}", flush=True))
        self.say("Starting two Linux VMs with plain QEMU, each by its definition file. No libvirt.")
        for name, disks in (("web", 1), ("db", 2)):
            self._machines[name] = LabVm(name, self._vms, disks=disks)
            stack.enter_context(self._machines[name])
        for name, vm in self._machines.items():
            vm.wait_agent()
            print(f"    {name} runs: {vm.exec('uname -sr').strip()}, pid {vm.pid}, definition {vm.definition.name}")

    def prepare(self) -> None:
        self.say("Preparing the hypervisor: a virtual environment with qemu.qmp, and a look at QEMU.")
        self._playbooks.run("prepare")

    def fill(self) -> None:
        self.say("The guests write data.")
        for name, vm in self._machines.items():
            vm.exec(f"dd if=/dev/urandom of=/mnt/vda/first bs=1M count={DATA[name]} 2>/dev/null && sync")
            print(f"    {name}: {DATA[name]} MiB into /mnt/vda/first")

    def back_up(self, what: str) -> None:
        self.say(what)
        self._playbooks.run("backup")

    def change(self) -> None:
        self.say("The guests go on working: web changes a file and adds one, db adds one on its second disk.")
        web, db = self._machines["web"], self._machines["db"]
        web.exec("dd if=/dev/urandom of=/mnt/vda/first bs=1M count=1 seek=5 conv=notrunc 2>/dev/null")
        web.exec("echo 'ordered: 3 pumpkins' >/mnt/vda/orders && sync")
        db.exec("dd if=/dev/urandom of=/mnt/vdb/second bs=64k count=9 2>/dev/null && sync")

    def remember(self) -> None:
        """What the files are at the moment of the last backup: the guests are not touched between here and there."""
        for name, vm in self._machines.items():
            lines = vm.exec("sha256sum /mnt/*/*[a-z] 2>/dev/null || true").splitlines()
            self._checksums[name] = {path: digest for digest, path in (line.split() for line in lines)}

    def lose(self) -> None:
        vm = self._machines[VICTIM]
        image = self._vms / f"{VICTIM}-vda.qcow2"
        self.say(f"Disaster: {VICTIM} is killed, and its disk is overwritten with noise.")
        vm.kill()
        size = image.stat().st_size
        with image.open("r+b") as stream:
            for _chunk in range(0, size, MIB):
                stream.write(os.urandom(min(MIB, size - stream.tell())))
        refused = subprocess.run(
            [sys.executable, vmctl.__file__, "start", str(vm.definition)], capture_output=True, text=True, check=False
        )
        if refused.returncode == 0:
            raise DemoError("the VM started from noise")
        print(f"    it does not start any more: {refused.stderr.strip().rpartition(': ')[2]}")

    def restore(self) -> None:
        self.say(f"Restoring {VICTIM} from the newest backup, and starting it.")
        self._playbooks.run("restore", vm_restore_vm=VICTIM, vm_restore_start=True, vm_restore_wait_agent=True)

    def judge(self) -> str:
        """The sentence that the demo is about. DemoError when it is not true."""
        vm = self._machines[VICTIM]
        vm.wait_agent()
        self.say(f"{VICTIM} has booted. Comparing its files with those at the time of the backup, inside the guest.")
        if not self._checksums[VICTIM]:
            raise DemoError("there was nothing to compare")
        for path, expected in self._checksums[VICTIM].items():
            found = vm.sha256(path)
            print(f"    {path}: sha256 {found[:16]}... {'identical' if found == expected else 'DIFFERENT'}")
            if found != expected:
                raise DemoError(f"{path} has sha256 {found} instead of {expected}")
        return f"restored data: identical (sha256 {self._checksums[VICTIM]['/mnt/vda/first']})"

    def patch_night(self) -> str:
        return Night(self._directory, self._machines, self._playbooks, self.say).tell()

    def report(self, verdict: str, of_the_night: str) -> None:
        kept = next(self._vms.glob("*.qcow2.before-*"))
        self.say("This is in the repository now:\n")
        print(table([row(manifest) for manifest in manifests(self._repository)]))
        print(f"\n{VICTIM}: restored, boots, agent answers; the lost disk was kept as {kept.name}")
        print(verdict)
        print(of_the_night, flush=True)

    def tell(self, stack: ExitStack) -> None:
        self.boot(stack)
        self.prepare()
        self.fill()
        self.back_up("First backup, while they run: full.")
        self.change()
        self.remember()
        self.back_up("Second backup, the same command: only what has changed.")
        self.lose()
        self.restore()
        verdict = self.judge()
        self.report(verdict, self.patch_night())


def terminate(_number: int, _frame: object) -> None:
    """As Ctrl-C, so that everything is cleaned up."""
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("-v", "--verbose", action="store_true", help="show all that Ansible says")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, terminate)
    try:
        with workspace() as directory, ExitStack() as stack:
            Demo(directory, options.verbose).tell(stack)
            print("\nStopping the VMs and removing everything the demo made.", flush=True)
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the VMs and files of the demo are gone", file=sys.stderr)
        return 130
    except (DemoError, LabError, NightError, PlaybookError) as exc:
        print(f"\ndemo: FAILED: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
