# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stop the module at an exact step: patches laid over the product from outside, inside the module's own process.

A *boundary* is the moment before a step that may change something: a QMP command, a call of the guest agent, a step on
the file system of one of the ``OWNERS`` of files. What a boundary leaves behind does not depend on how the process ends
there, so "before each step, and after the last" is every state that a kill can leave.

``prelude(Trap(...))`` is what ``start_module`` takes. A trap can also stop the process (SIGSTOP), so that a test does
its worst at that very moment and lets it go on with SIGCONT: no sleeping, no guessing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib
import os
import pathlib
import signal
import sys
import threading
import typing as t

PRODUCT = "ansible_collections.blockops.qemu.plugins.module_utils"
FILE_STEPS = (
    "mkdir", "rename", "link", "unlink", "rmdir", "chmod", "fchmod", "fchown", "truncate", "ftruncate", "fsync",
    "write", "pwrite", "open", "replace",
)  # fmt: skip
OWNERS = ("_repository", "_image.snapshot_record", "_image.definition", "_ops.overlay", "_ops.block_rebase_swap")
_LOOK_UP = 8  # frames between os.unlink in shutil.rmtree and the caller in _repository


@dataclasses.dataclass(frozen=True)
class Trap:
    """Where and how. ``number``: the n-th boundary; ``label``: the first one that is called so (``nth`` of its name).

    ``log``: a file that gets one label per line. ``on_target_error``: what jobs are told to do instead of "report".
    """

    number: int | None = None
    label: str | None = None
    nth: int = 1
    sends: int = signal.SIGKILL
    log: str | None = None
    on_target_error: str | None = None


def prelude(trap: Trap) -> str:
    tests = str(pathlib.Path(__file__).resolve().parents[1])
    trap = dataclasses.replace(trap, sends=int(trap.sends))  # an enum's repr is not Python
    return f"import sys; sys.path.append({tests!r}); from support import killer; killer.install(killer.{trap!r})\n"


class _Steps:
    def __init__(self, trap: Trap) -> None:
        self.trap = trap
        self.lock = threading.Lock()  # sealing runs in a thread
        self.count = 0
        self.seen: dict[str, int] = {}

    def boundary(self, label: str, *, numbered: bool = True) -> None:
        with self.lock:
            self.seen[label] = self.seen.get(label, 0) + 1
            hit = label == self.trap.label and self.seen[label] == self.trap.nth
            if numbered:
                hit = hit or self.count == self.trap.number
                self.count += 1
                self._log(label)
            if hit:
                # to this thread: sent to the process, it may take effect a moment later than this
                signal.pthread_kill(threading.get_ident(), self.trap.sends)

    def _log(self, label: str) -> None:
        if self.trap.log is not None:
            with open(self.trap.log, "a", encoding="utf-8") as stream:
                stream.write(label + "\n")


def install(trap: Trap) -> None:
    """Lay the patches. Called in the module's process, before the module is imported."""
    importlib.import_module("shutil")  # it looks at os.* once, when it is imported
    steps = _Steps(trap)
    session = importlib.import_module(f"{PRODUCT}._qmp.session")
    agent = importlib.import_module(f"{PRODUCT}._guest.agent")
    _patch_async(session.Session, "execute", steps, lambda _self, command, *_rest: _qmp_label(session, command, trap))
    _patch_async(session.Session, "pass_file", steps, lambda *_rest: "qmp pass_file")
    _patch_async(agent.Agent, "call", steps, lambda _self, command, *_rest: f"agent {command}")
    _patch_async(asyncio, "to_thread", steps, lambda *_rest: "thread")
    for name in FILE_STEPS:
        _patch_os(name, steps)


def _qmp_label(session: t.Any, command: t.Any, trap: Trap) -> str | None:
    if command.name.startswith("query-") or command.name in session._READING:
        return None
    if trap.on_target_error and command.name == "transaction":
        for action in command.arguments["actions"]:
            if action["type"] == "blockdev-backup":
                action["data"]["on-target-error"] = trap.on_target_error
    return f"qmp {command.name}"


def _patch_async(owner: t.Any, name: str, steps: _Steps, label_of: t.Callable[..., str | None]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    async def patched(*args: t.Any, **kwargs: t.Any) -> t.Any:
        label = label_of(*args)
        if label is not None:
            steps.boundary(label)
        answer = await original(*args, **kwargs)
        if label is not None:
            steps.boundary(f"after {label}", numbered=False)
        return answer

    setattr(owner, name, patched)


def _patch_os(name: str, steps: _Steps) -> None:
    original = getattr(os, name)

    @functools.wraps(original)
    def patched(*args: t.Any, **kwargs: t.Any) -> t.Any:
        if name == "open" and not (len(args) > 1 and isinstance(args[1], int) and args[1] & os.O_CREAT):
            return original(*args, **kwargs)
        caller = _owner_function()
        if caller is None:
            return original(*args, **kwargs)
        label = f"file {name} in {caller}"
        steps.boundary(label)
        answer = original(*args, **kwargs)
        steps.boundary(f"after {label}", numbered=False)
        return answer

    setattr(os, name, patched)
    if original in os.supports_dir_fd:  # shutil.rmtree asks
        os.supports_dir_fd.add(patched)


def _owner_function() -> str | None:
    """The function of one of ``OWNERS`` that the call comes from, seen through shutil and the like."""
    frame = sys._getframe(2)
    for _step in range(_LOOK_UP):
        if frame.f_globals.get("__name__", "").startswith(tuple(f"{PRODUCT}.{owner}" for owner in OWNERS)):
            return frame.f_code.co_name
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None
