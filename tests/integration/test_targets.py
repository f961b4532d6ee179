# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs every integration target as ansible-test would, but from the checkout, and ties the answers to RETURN.

A target is a role (tasks/main.yml) or a script (runme.sh) in targets/NAME; those that others depend on carry the
alias ``hidden``. ``scripts/ansible-test integration NAME`` runs the same targets with ansible-test itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
import yaml

from architecture.documentation import COMMON_RETURN, documentation, undocumented

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "integration"
TARGETS = HERE / "targets"
TIMEOUT = 900  # seconds


def aliases(target: Path) -> set[str]:
    path = target / "aliases"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {line.partition("#")[0].strip() for line in lines} - {""}


def runnable(target: Path) -> bool:
    has_code = (target / "tasks" / "main.yml").is_file() or (target / "runme.sh").is_file()
    return has_code and not aliases(target) & {"disabled", "hidden"}


def environment(scratch: Path) -> dict[str, str]:
    """Nothing of the user's own Ansible, and the collection from the checkout."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    return {
        **inherited,
        "ANSIBLE_CALLBACK_PLUGINS": str(HERE / "plugins" / "callback"),
        "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".collections"),
        "ANSIBLE_CONFIG": str(scratch / "ansible.cfg"),
        "ANSIBLE_HOME": str(scratch / "home"),
        "ANSIBLE_HOST_PATTERN_MISMATCH": "error",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_PLAYBOOK_DIR": str(TARGETS),
        "ANSIBLE_ROLES_PATH": str(TARGETS),
        "BLOCKOPS_RESULTS": str(scratch / "results"),
        "INVENTORY_PATH": str(scratch / "inventory"),
        "OUTPUT_DIR": str(scratch / "output"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def prepare(scratch: Path) -> None:
    (scratch / "output").mkdir()
    (scratch / "ansible.cfg").write_text("")
    variables = f"ansible_connection=local ansible_python_interpreter={sys.executable}"
    (scratch / "inventory").write_text(f"[testgroup]\ntesthost {variables}\n")


def command_for(target: Path, scratch: Path) -> list[str]:
    if (target / "runme.sh").is_file():
        return [str(target / "runme.sh")]
    play = {
        "hosts": "testhost",
        "gather_facts": "gather_facts/no" not in aliases(target),
        "vars": {"output_dir": str(scratch / "output"), "resource_prefix": f"test-{os.getpid()}"},
        "roles": [{"role": target.name}],
    }
    playbook = scratch / f"{target.name}.yml"
    playbook.write_text(yaml.safe_dump([play]))
    return [sys.executable, "-m", "ansible.cli.playbook", "-i", str(scratch / "inventory"), str(playbook)]


def answers(scratch: Path) -> list[dict[str, t.Any]]:
    results = scratch / "results"
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def not_in_return(given: list[dict[str, t.Any]]) -> list[str]:
    found: set[str] = set()
    for entry in given:
        module = entry["module"]
        of_loop = entry["answer"].get("ansible_loop_var")
        answer = {key: value for key, value in entry["answer"].items() if key not in (*COMMON_RETURN, of_loop)}
        answer = {key: value for key, value in answer.items() if not key.startswith("_ansible_")}
        returns = documentation().get(module, {}).get("return") or {}
        found.update(f"{module}: {key}" for key in undocumented(answer, returns))
    return sorted(found)


@pytest.mark.timeout(TIMEOUT + 30)
@pytest.mark.parametrize("target", sorted(filter(runnable, TARGETS.glob("*"))), ids=lambda path: path.name)
def test_target(target: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    done = subprocess.run(
        command_for(target, tmp_path),
        cwd=target,
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "[DEPRECATION WARNING]" not in done.stdout, done.stdout
    assert not not_in_return(answers(tmp_path)), "these answers are missing from RETURN"
