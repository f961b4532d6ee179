# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""The chapter of patch night: an upgrade that destroys data, one that works, and the playbook that tells them apart."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from demo import guest
from demo.playbooks import PlaybookError, Playbooks
from lab.vm import LabVm

APP, SUMS = "/mnt/vda/app", "/mnt/vda/app.sum"
BROKEN = f"rm {SUMS}; dd if=/dev/urandom of={APP} bs=1M count=2 2>/dev/null; sync"
GOOD = f"echo version 2 >{APP}; sha256sum {APP} >{SUMS}; sync"


class NightError(Exception):
    """Something is not as the collection promises."""


def variables(vms: Path) -> dict[str, Any]:
    """What the inventory needs for it. Each VM's definition file follows its active image."""
    health = f"sha256sum -c {SUMS}"
    return {
        "vm_patch_sockets": [f"{vms}/*.qmp"],
        "vm_patch_select": f"[].merge(@, {{definition: [join('', ['{vms}/', name, '.conf'])]}})",
        "vm_patch_health_retries": 1,
        "vm_patch_health_delay": 0,
        "blockops_health_command": shlex.join([sys.executable, guest.__file__, f"{vms}/{{vm}}.qga", health]),
    }


class Night:
    """Both upgrades of ``machines``. ``say`` prints a heading."""

    def __init__(
        self, directory: Path, machines: Mapping[str, LabVm], playbooks: Playbooks, say: Callable[[str], None]
    ) -> None:
        self._directory, self._machines, self._playbooks, self._say = directory, machines, playbooks, say

    def tell(self) -> str:
        """The sentence that this chapter is about. NightError when it is not true."""
        for name, vm in self._machines.items():
            vm.exec(f"echo version 1 of {name} >{APP}; sha256sum {APP} >{SUMS}; sync")
        before = {name: vm.sha256(APP) for name, vm in self._machines.items()}
        pids = {name: vm.pid for name, vm in self._machines.items()}
        self._break(before, pids)
        self._upgrade(pids)
        proof = ", ".join(f"{name} {digest[:16]}..." for name, digest in before.items())
        return f"after the failed upgrade: identical (sha256 in the guests: {proof}), same QEMU processes"

    def _break(self, before: Mapping[str, str], pids: Mapping[str, int | None]) -> None:
        self._say("Patch night. Both VMs are snapshotted at one instant, then an upgrade overwrites their data.")
        said = ""
        try:
            self._playbooks.run("patch", blockops_patch_tasks=self._tasks("broken", BROKEN))
        except PlaybookError as exc:
            said = str(exc)
        if not said:
            raise NightError("a broken upgrade was not noticed")
        if "All is as before the upgrade" not in said:
            raise NightError(f"the VMs did not come back: {said}")
        print("      the play fails, as it should: the health check failed, and both VMs went back by themselves")
        for name, vm in self._machines.items():
            found = vm.sha256(APP)
            if found != before[name] or vm.pid != pids[name]:
                raise NightError(f"{name}: sha256 {found} instead of {before[name]}, pid {vm.pid}, was {pids[name]}")
            print(f"    {name}: sha256 {found[:16]}... as before the upgrade; pid {vm.pid}, it never ended")

    def _upgrade(self, pids: Mapping[str, int | None]) -> None:
        self._say("The same with an upgrade that works.")
        self._playbooks.run("patch", blockops_patch_tasks=self._tasks("good", GOOD))
        for name, vm in self._machines.items():
            text, images = vm.exec(f"cat {APP}").strip(), depth(vm)
            if text != "version 2" or vm.pid != pids[name] or images != 1:
                raise NightError(f"{name}: {text}, pid {vm.pid}, {images} images in its chain")
            print(f"    {name}: {text}; the snapshot is merged, its chain has {images} image again")

    def _tasks(self, name: str, line: str) -> str:
        """A file of tasks as a user writes it."""
        path = self._directory / f"{name}.yml"
        argv = [sys.executable, guest.__file__, "{{ item.agent_socket }}", line]
        task = {
            "name": "Upgrade the guests",
            "ansible.builtin.command": {"argv": argv},
            "loop": "{{ vm_patch_selected }}",
            "loop_control": {"label": "{{ item.name }}"},
        }
        path.write_text(yaml.safe_dump([task], sort_keys=False), encoding="utf-8")
        return str(path)


def depth(vm: LabVm) -> int:
    """Images in the longest chain of its drives."""
    blocks = [block["inserted"] for block in vm.command("query-block") if block.get("inserted")]
    return 1 + max(int(block["backing_file_depth"]) for block in blocks)
