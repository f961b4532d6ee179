# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""Running the collection's playbooks by name, as its user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


class PlaybookError(Exception):
    """A playbook failed; holds what Ansible printed."""


class Playbooks:
    """``ansible-playbook blockops.qemu.NAME`` with an inventory of one hypervisor, this machine."""

    def __init__(self, directory: Path, variables: Mapping[str, Any], verbose: bool = False) -> None:
        self._directory = directory
        self._verbose = verbose
        self._inventory = directory / "inventory.yml"
        python = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        hosts = {"hypervisors": {"hosts": {"this-machine": {**python, **variables}}}}
        self._inventory.write_text(yaml.safe_dump(hosts, sort_keys=False), encoding="utf-8")
        (directory / "ansible.cfg").write_text("", encoding="utf-8")

    @property
    def inventory(self) -> str:
        return self._inventory.read_text(encoding="utf-8")

    def run(self, name: str, **variables: Any) -> float:
        """Run one and return the seconds it took. PlaybookError when it fails."""
        extra = self._directory / "extra.yml"
        extra.write_text(yaml.safe_dump(variables), encoding="utf-8")
        command = [sys.executable, "-m", "ansible.cli.playbook", f"blockops.qemu.{name}", "-i", str(self._inventory)]
        more = "".join(f" -e {key}={str(value).lower()}" for key, value in variables.items())
        print(f"    $ ansible-playbook blockops.qemu.{name} -i inventory.yml{more}", flush=True)
        began = time.monotonic()
        with subprocess.Popen(
            [*command, "-e", f"@{extra}"],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C comes to us, and we end all of it
        ) as process:
            try:
                output = self._follow(process)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode != 0:
            raise PlaybookError(f"ansible-playbook blockops.qemu.{name} failed:\n{output}")
        return time.monotonic() - began

    def _follow(self, process: subprocess.Popen[str]) -> str:
        """Show what it does while it does it: everything, or the names of the tasks that change something."""
        lines: list[str] = []
        task = ""
        for line in process.stdout or ():
            lines.append(line)
            if self._verbose:
                print(f"      {line}", end="", flush=True)
            elif line.startswith("TASK ["):
                task = line.removeprefix("TASK [").rstrip("* \n").removesuffix("]")
            elif line.startswith("changed:") and task:
                print(f"      {task}", flush=True)
                task = ""
        return "".join(lines)

    def _environment(self) -> dict[str, str]:
        """Nothing of the user's own Ansible."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
        return {
            **inherited,
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".collections"),
            "ANSIBLE_CONFIG": str(self._directory / "ansible.cfg"),
            "ANSIBLE_HOME": str(self._directory / "ansible"),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_REMOTE_TMP": str(self._directory / "ansible" / "remote"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
