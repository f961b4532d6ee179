# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a module of the collection as Ansible would: its own process, arguments as JSON, the answer as JSON on stdout.

    result = run_module("backup_info", {"repository": "/srv/backup"}, check=True)
    result.rc, result.data["vms"], result.failed, result.changed

    running = start_module("backup_restore", {...})     # for tests that kill
    running.process.kill()
    result = running.finish()

What AnsiballZ adds to this is the shipping of files, which ``make sanity`` and the playbook tests cover; a run here
costs an interpreter start (0.15 s) and no Ansible controller.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import typing as t
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parents[2]
TREE = ROOT / ".collections"
NAMESPACE = "ansible_collections.blockops.qemu.plugins.modules"

# The two attributes are what the AnsiballZ wrapper of ansible-core >= 2.19 sets; older ones ignore the second.
_DRIVER = """
import runpy, sys
from ansible.module_utils import basic
basic._ANSIBLE_ARGS = sys.stdin.buffer.read()
basic._ANSIBLE_PROFILE = "legacy"
sys.path = [p for p in sys.path if p not in ("", ".")]
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Result:
    """What the module answered. ``data`` is empty when it printed no JSON (killed, or it crashed: see ``stderr``)."""

    rc: int
    data: dict[str, t.Any] = field(default_factory=dict)
    stdout: str = ""
    stderr: str = ""

    @property
    def failed(self) -> bool:
        """True when the module reported failure, was killed, or printed no result."""
        return self.rc != 0 or not self.data or bool(self.data.get("failed"))

    @property
    def changed(self) -> bool:
        return bool(self.data.get("changed"))

    @property
    def msg(self) -> str:
        """The failure message; the traceback when there is no answer."""
        return str(self.data.get("msg", self.stderr))

    @property
    def warnings(self) -> list[str]:
        """The texts of the warnings, whichever way this ansible-core spells them."""
        found = self.data.get("warnings") or []
        return [entry if isinstance(entry, str) else str(entry["event"]["msg"]) for entry in found]

    def ok(self) -> Result:
        """Itself, or an AssertionError that shows the failure."""
        if self.failed:
            raise AssertionError(f"the module failed (rc {self.rc}): {self.msg}\n{self.stdout}\n{self.stderr}")
        return self


@dataclass(frozen=True)
class Running:
    """A module that was started and not waited for."""

    process: subprocess.Popen[bytes]

    def finish(self, timeout: float = 120) -> Result:
        """Wait for the end (also after a kill) and read the answer."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return _result(self.process.returncode, stdout, stderr)


def start_module(
    name: str,
    params: t.Mapping[str, t.Any],
    *,
    check: bool = False,
    diff: bool = False,
    env: t.Mapping[str, str] | None = None,
    python: str | None = None,
    user: int | None = None,
    prelude: str = "",
) -> Running:
    """Start module ``name`` with ``params``. ``env`` is added to the environment; ``user`` is a uid to run as.

    ``prelude`` is Python that runs in the module's process before it (see killer.py).
    """
    _link_tree()
    arguments = dict(params, _ansible_check_mode=check, _ansible_diff=diff, _ansible_remote_tmp="/tmp")
    environment = {**os.environ, "PYTHONPATH": _pythonpath(python), "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    process = subprocess.Popen(
        [python or sys.executable, "-c", prelude + _DRIVER, f"{NAMESPACE}.{name}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        user=user,
    )
    if process.stdin is None:
        raise RuntimeError("no pipe to the module")
    try:
        process.stdin.write(json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # the interpreter died at once: its stderr says why
    process.stdin = None
    return Running(process)


def run_module(
    name: str,
    params: t.Mapping[str, t.Any],
    *,
    check: bool = False,
    diff: bool = False,
    timeout: float = 120,
    env: t.Mapping[str, str] | None = None,
    python: str | None = None,
    user: int | None = None,
) -> Result:
    """Run module ``name`` to its end. A failing module does not raise: see ``Result.failed`` and ``Result.ok()``."""
    return start_module(name, params, check=check, diff=diff, env=env, python=python, user=user).finish(timeout)


def _result(rc: int, stdout: bytes, stderr: bytes) -> Result:
    text = stdout.decode(errors="replace")
    try:
        data = json.loads(text)
    except ValueError:
        data = {}
    return Result(rc, data if isinstance(data, dict) else {}, text, stderr.decode(errors="replace"))


def _pythonpath(python: str | None) -> str:
    """The linked tree; for a foreign interpreter also the directory that holds ``ansible``."""
    if python is None:
        return str(TREE)
    import ansible

    return os.pathsep.join([str(TREE), str(pathlib.Path(ansible.__file__).parents[1])])


def _link_tree() -> None:
    """Make .collections/ansible_collections/blockops/qemu a link to the checkout; several may do so at once."""
    link = TREE / "ansible_collections" / "blockops" / "qemu"
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to("../../..")
