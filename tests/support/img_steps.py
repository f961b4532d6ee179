# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A prelude for ``start_module``: kills a module that rebases or commits images before its n-th step."""

from __future__ import annotations

# Ends the module before its NUMBER-th step that may change something.
KILLER = """
import asyncio, functools, os, sys
count = [0]
def step():
    if count[0] == {number}:
        os.kill(os.getpid(), 9)
    count[0] += 1
def wrap(owner, name, wanted):
    original = getattr(owner, name)
    @functools.wraps(original)
    def patched(*args, **kwargs):
        if wanted(sys._getframe(1).f_code.co_filename, args):
            step()
        return original(*args, **kwargs)
    setattr(owner, name, patched)
def ours(file, args):
    return any(part in file for part in ("img_rebase", "img_commit", "snapshot_record", "_repository/_files"))
for name in ("link", "rename", "replace", "unlink", "fsync", "chown", "utime"):
    wrap(os, name, ours)
wrap(asyncio, "create_subprocess_exec", lambda file, args: "qemu_img" in file and "map" not in args)
wrap(asyncio, "to_thread", lambda file, args: "difference" in file)
"""
