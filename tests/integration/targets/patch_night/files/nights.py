# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Patch nights of booted Linux guests: upgrades that work, that destroy data, that fail, and a controller that dies.

Judged from inside the guests (sha256), by the processes, by the images (qemu-img), and by what ansible-playbook says.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from demo import guest
from lab.guard import workspace
from lab.instant import instant_vm
from lab.vm import LabVm

HERE = Path(__file__).resolve().parent
TASKS = HERE / "tasks"
OLD = "version 1"


def expect(condition: object, *about: object) -> None:
    if not condition:
        raise SystemExit("\n".join(["NOT AS PROMISED", *(str(each) for each in about)]))


class Site:
    """Hypervisors, each a directory with VMs, and ``ansible-playbook blockops.qemu.NAME`` on them."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.inventory = directory / "inventory.yml"
        self.hosts: dict[str, list[LabVm]] = {}
        self._stack = stack

    def hypervisor(self, host: str, *names: str) -> list[LabVm]:
        place = self.directory / host
        place.mkdir()
        self.hosts[host] = []
        for name in names:
            vm = instant_vm(name, place)
            self._stack.callback(vm.close)
            self.hosts[host].append(vm)
        for vm in self.hosts[host]:
            vm.wait_agent()
            vm.exec(f"cd /mnt/vda && echo {OLD} {vm.name} >app && sha256sum app >app.sum && sync")
        self._write_inventory()
        return self.hosts[host]

    def _write_inventory(self) -> None:
        hosts = {host: self._variables(self.directory / host) for host in self.hosts}
        self.inventory.write_text(yaml.safe_dump({"hypervisors": {"hosts": hosts}}), encoding="utf-8")

    def _variables(self, place: Path) -> dict[str, Any]:
        definition = f"[].merge(@, {{definition: [join('', ['{place}/', name, '.conf'])]}})"
        roles = ("vm_patch", "vm_snapshot", "vm_rollback")
        found = {f"{role}_sockets": [f"{place}/*.qmp"] for role in roles}
        chosen = {f"{role}_select": definition for role in roles}
        inside = f"{sys.executable} {guest.__file__}"
        return {
            **found,
            **chosen,
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "blockops_become": False,
            "lab_python": sys.executable,
            "lab_guest": str(guest.__file__),
            "lab_begun": str(place / "begun"),
            "blockops_health_command": f"{inside} {place}/{{vm}}.qga 'cd /mnt/vda && sha256sum -c app.sum'",
            "vm_patch_health_retries": 3,
            "vm_patch_health_delay": 1,
            "vm_patch_python": "",
            "vm_rollback_python": "",
            "vm_snapshot_python": "",
        }

    def command(self, name: str, *more: str, **variables: Any) -> list[str]:
        argv = [sys.executable, "-m", "ansible.cli.playbook", f"blockops.qemu.{name}", "-i", str(self.inventory)]
        return [*argv, *more, "-e", json.dumps(variables)]

    def run(self, name: str, *more: str, says: str = "", code: int = 0, **variables: Any) -> str:
        began = time.monotonic()
        done = subprocess.run(
            self.command(name, *more, **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(
            f"{name} {' '.join(more)} {variables}: exit {done.returncode}, {time.monotonic() - began:.1f} s", flush=True
        )
        expect(done.returncode == code, done.stdout, f"exit {done.returncode}, not {code}")
        expect(says in re.sub(r"\s+", " ", done.stdout), done.stdout, f"does not say: {says}")
        return done.stdout


def content(vm: LabVm) -> str:
    """What the guest's file says; DESTROYED when it is not what its checksum says."""
    vm.wait_agent()
    return vm.exec("cd /mnt/vda && sha256sum -c app.sum >/dev/null 2>&1 && cat app || echo DESTROYED").strip()


def chain(vm: LabVm) -> list[str]:
    """File names of the active image and those below it, by qemu-img."""
    (block,) = vm.command("query-block")
    name = block["inserted"]["file"]  # of an overlay that was put on top while QEMU ran, everything that QEMU knows
    active = json.loads(name.removeprefix("json:"))["file"]["filename"] if name.startswith("json:") else name
    argv = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", active]
    images = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    return [Path(image["filename"]).name for image in images]


def is_as_before(vms: list[LabVm], pids: list[int | None]) -> None:
    for vm, pid in zip(vms, pids):
        expect(content(vm) == f"{OLD} {vm.name}", vm.name, content(vm))
        expect(vm.pid == pid, f"{vm.name} is another process")
        expect(chain(vm) == [f"{vm.name}-vda.qcow2"], chain(vm))
        expect(f"{vm.name}-vda.qcow2" in vm.definition.read_text(), vm.definition.read_text())


def test_bad_input(site: Site, vms: list[LabVm]) -> None:
    """Nothing begins before everything is there."""
    pids = [vm.pid for vm in vms]
    good = str(TASKS / "good.yml")
    unknown = site.directory / "unknown.yml"
    unknown.write_text("- name: Nobody knows this\n  no.such.module:\n", encoding="utf-8")
    site.run("patch", code=2, says="Say in blockops_patch_tasks")
    site.run("patch", code=2, says="There is no file", blockops_patch_tasks="/nowhere/tasks.yml")
    site.run("patch", code=4, says="no.such.module", blockops_patch_tasks=str(unknown))
    site.run(
        "patch",
        code=2,
        says="Nobody would notice a failed upgrade",
        blockops_patch_tasks=good,
        blockops_health_command="",
    )
    site.run(
        "patch", code=2, says="There is no VM to upgrade", blockops_patch_tasks=good, vm_patch_select="[?name=='x']"
    )
    is_as_before(vms, pids)


def test_broken_upgrade(site: Site, vms: list[LabVm]) -> None:
    """The check fails, or the tasks do: back to what was, in the same processes, and the play fails."""
    pids = [vm.pid for vm in vms]
    back = "All is as before the upgrade: db, web went back to snapshot patch-night and are in order."
    site.run("patch", code=2, says=back, blockops_patch_tasks=str(TASKS / "broken.yml"))
    is_as_before(vms, pids)
    site.run("patch", code=2, says=back, blockops_patch_tasks=str(TASKS / "failing.yml"))
    is_as_before(vms, pids)
    left = sorted(path.name for path in vms[0].directory.iterdir() if "patch-night" in path.name)
    expect(not left, left)


def test_check_mode(site: Site, vms: list[LabVm]) -> None:
    pids = [vm.pid for vm in vms]
    site.run("patch", "--check", "--diff", says="db, web: predicted", blockops_patch_tasks=str(TASKS / "good.yml"))
    is_as_before(vms, pids)


def test_dead_controller(site: Site, vms: list[LabVm]) -> None:
    """The snapshot stays; the next night refuses to begin, until it is told what to do about it."""
    pids = [vm.pid for vm in vms]
    begun = vms[0].directory / "begun"
    command = site.command("patch", blockops_patch_tasks=str(TASKS / "endless.yml"))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as controller:
        while not begun.exists():
            expect(controller.poll() is None, "it has ended")
            time.sleep(0.1)
        os.killpg(controller.pid, signal.SIGKILL)
    begun.unlink()  # which ends the task, if it is still there
    expect([len(chain(vm)) for vm in vms] == [2, 2], "no snapshot")
    good = str(TASKS / "good.yml")
    site.run("patch", code=2, says="have a snapshot patch-night already", blockops_patch_tasks=good)
    site.run("patch", "--check", code=2, says="have a snapshot patch-night already", blockops_patch_tasks=good)
    vms[0].exec("rm /mnt/vda/app && sync")
    site.run("rollback", code=2, says="Say allow_reset=true", vm_rollback_name="patch-night")
    site.run("rollback", vm_rollback_name="patch-night", vm_rollback_allow_reset=True, vm_rollback_discarded="delete")
    for vm, pid in zip(vms, pids):
        expect(content(vm) == f"{OLD} {vm.name}" and vm.pid == pid, vm.name, content(vm))
    # on with the old snapshot, and back to it
    site.run(
        "patch",
        code=2,
        says="All is as before the upgrade",
        blockops_patch_tasks=str(TASKS / "broken.yml"),
        blockops_existing_snapshot="use",
    )
    is_as_before(vms, pids)


def test_good_upgrade(site: Site, vms: list[LabVm]) -> None:
    """Kept first, merged then; a cold start from the definition has it."""
    pids = [vm.pid for vm in vms]
    health = str(TASKS / "health.yml")
    good = {"blockops_patch_tasks": str(TASKS / "good.yml"), "blockops_health_tasks": health}
    # as the README says it: what Ansible takes for text
    site.run("patch", "-e", "blockops_keep_snapshot=true", says="db, web: kept", **good)
    expect([len(chain(vm)) for vm in vms] == [2, 2], "no snapshot")
    back = ("-e", "vm_rollback_name=patch-night", "-e", "vm_rollback_allow_reset=true")
    site.run("rollback", *back, vm_rollback_discarded="delete")
    expect([content(vm) for vm in vms] == [f"{OLD} db", f"{OLD} web"], "not back")
    site.run("snapshot", vm_snapshot_name="patch-night", vm_snapshot_state="absent")
    is_as_before(vms, pids)
    site.run("patch", says="db, web: patched", **good)
    for vm, pid in zip(vms, pids):
        expect(content(vm) == "version 2" and vm.pid == pid, vm.name, content(vm))
        expect(chain(vm) == [f"{vm.name}-vda.qcow2"], chain(vm))
        vm.kill()
        vm.start()
    for vm in vms:
        expect(content(vm) == "version 2", "after a cold start", vm.name, content(vm))


def test_batches(site: Site) -> None:
    """One of three fails: the others are left alone, or not, as max_fail_percentage says."""
    vms = {host: site.hypervisor(host, f"vm-{host}")[0] for host in ("a", "b", "c")}
    broken = {"blockops_patch_tasks": str(TASKS / "broken.yml"), "lab_victims": ["b"], "blockops_hosts": "a:b:c"}
    said = site.run("patch", code=2, says="All is as before the upgrade: vm-b", **broken)
    expect("vm-a: patched" in said and "vm-c:" not in said, said)
    said = site.run("patch", code=2, blockops_max_fail_percentage=100, blockops_serial=2, **broken)
    expect("vm-a: patched" in said and "vm-b: rolled_back" in said and "vm-c: patched" in said, said)
    for vm in vms.values():
        expect(content(vm) == f"{OLD} {vm.name}", content(vm))
        expect(chain(vm) == [f"{vm.name}-vda.qcow2"], chain(vm))


def main() -> None:
    with workspace() as directory, ExitStack() as stack:
        site = Site(directory, stack)
        vms = site.hypervisor("one", "db", "web")
        for test in (test_bad_input, test_check_mode, test_broken_upgrade, test_dead_controller, test_good_upgrade):
            print(f"== {test.__name__}", flush=True)
            test(site, vms)
        print("== test_batches", flush=True)
        for vm in vms:
            vm.close()
        test_batches(site)


if __name__ == "__main__":
    main()
