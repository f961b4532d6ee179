# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a module in a fork of this process: what run_module does, without the 0.3 s of starting an interpreter.

For tests that run a module hundreds of times. The child is the module from its first line on; nothing of the product
ever runs in the parent.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import runpy
import signal
import sys
import threading
import traceback
import typing as t

from support import killer
from support.module import NAMESPACE, Result, _link_tree, _result

_NEEDED = (
    "ansible.module_utils.basic",
    "qemu.qmp",
    "asyncio.subprocess",
    "concurrent.futures.thread",
    "shutil",
    "_strptime",
)
# What Ansible's basic loads by name when it reads and writes JSON (core 2.19 and later).
_PROFILES = tuple(f"ansible.module_utils._internal._json._profiles._module_legacy_{way}" for way in ("c2m", "m2c"))


def run_forked(
    name: str,
    params: t.Mapping[str, t.Any],
    trap: killer.Trap | None,
    *,
    check: bool = False,
    user: int | None = None,
) -> Result:
    """As ``run_module``; ``trap`` may kill it. ``user`` needs no way to the interpreter's own files."""
    _link_tree()
    _import_needed()
    arguments = dict(params, _ansible_check_mode=check, _ansible_remote_tmp="/tmp")
    out, err = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(name, json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode(), out[1], err[1], trap, user)
    os.close(out[1])
    os.close(err[1])
    texts: dict[int, bytes] = {}
    readers = [threading.Thread(target=lambda fd=fd: texts.update({fd: _drain(fd)})) for fd in (out[0], err[0])]
    for reader in readers:
        reader.start()
    status = os.waitpid(pid, 0)[1]
    for reader in readers:
        reader.join()
    return _result(os.waitstatus_to_exitcode(status), texts[out[0]], texts[err[0]])


def _import_needed() -> None:
    """Before the fork: the child's user may not be able to read these files."""
    for module in _NEEDED:
        importlib.import_module(module)
    for module in _PROFILES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)


def _drain(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as stream:
        return stream.read()


def _no_controller() -> None:
    """Warnings go to the controller's display once another test has imported that (core 2.19 and later)."""
    with contextlib.suppress(ImportError):
        importlib.import_module("ansible.module_utils._internal").is_controller = False  # type: ignore[attr-defined]


def _child(name: str, arguments: bytes, out: int, err: int, trap: killer.Trap | None, user: int | None) -> t.NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.closerange(3, 256)
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(fd, mode, closefd=False), write_through=True)
            for fd, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        basic = importlib.import_module("ansible.module_utils.basic")
        basic._ANSIBLE_ARGS, basic._ANSIBLE_PROFILE = arguments, "legacy"  # type: ignore[attr-defined]
        _no_controller()
        os.chdir("/")
        if trap is not None:
            killer.install(trap)
        if user is None:
            runpy.run_module(f"{NAMESPACE}.{name}", run_name="__main__", alter_sys=True)
        else:
            module = importlib.import_module(f"{NAMESPACE}.{name}")
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            module.main()
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
