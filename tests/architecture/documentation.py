# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the collection's modules say about themselves, as ansible-doc shows it (fragments merged in)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing as t
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What Ansible itself adds to a module's answer, or documents for all of them.
COMMON_RETURN = {
    "_ansible_no_log",
    "ansible_facts",
    "ansible_loop_var",
    "attempts",
    "changed",
    "deprecations",
    "diff",
    "exception",
    "failed",
    "failed_when_result",
    "failed_when_suppressed_exception",
    "invocation",
    "msg",
    "warnings",
}


def module_names() -> list[str]:
    return sorted(path.stem for path in (ROOT / "plugins" / "modules").glob("*.py") if path.stem != "__init__")


@cache
def documentation() -> dict[str, dict[str, t.Any]]:
    """Module name to ansible-doc's view of it: doc, examples, return."""
    names = [f"blockops.qemu.{name}" for name in module_names()]
    if not names:
        return {}
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".collections"), "ANSIBLE_NOCOLOR": "1"}
    command = [sys.executable, "-m", "ansible.cli.doc", "--json", "--type", "module", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ansible-doc failed: {done.stderr}")
    return {name.rsplit(".", 1)[1]: entry for name, entry in json.loads(done.stdout).items()}


def undocumented(result: t.Any, returns: t.Mapping[str, t.Any], where: str = "") -> list[str]:
    """The keys of a module's answer that RETURN does not know, down to where RETURN stops saying ``contains``."""
    missing: list[str] = []
    for item in result if isinstance(result, list) else [result]:
        for key, value in item.items() if isinstance(item, dict) else ():
            if key not in returns:
                missing.append(where + key)
            elif returns[key].get("contains"):
                missing += undocumented(value, returns[key]["contains"], f"{where}{key}.")
    return sorted(set(missing))
