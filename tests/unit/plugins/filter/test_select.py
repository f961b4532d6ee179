# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter blockops.qemu.select, with the real jmespath, by itself and through Ansible's templating."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.blockops.qemu.plugins.filter import select as module
from ansible_collections.blockops.qemu.plugins.filter.select import FilterModule, select, to_plain

VMS = [
    {"name": "db", "status": "running", "drives": [{"id": "root", "size": 10}, {"id": "data", "size": 500}]},
    {"name": "web", "status": "running", "drives": [{"id": "root", "size": 20}]},
    {"name": "old", "status": "shutdown", "drives": []},
]


class TaggedText(str):
    """Like Ansible's tagged strings: str() of it is not to be relied on."""

    def __str__(self) -> str:
        return "not asked"


class TaggedNumber(int):
    """Like Ansible's tagged numbers."""


class UnsafeText(TaggedText):
    """Like AnsibleUnsafeText of ansible-core before 2.19."""

    __UNSAFE__ = True


class VaultText:
    """Like AnsibleVaultEncryptedUnicode: becomes plain when it is asked for its text."""

    __ENCRYPTED__ = True

    def __str__(self) -> str:
        return "opened"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("[?status=='running'].name", ["db", "web"]),
        ("[?name=='none']", []),
        ("[].drives[?size > `15`].id[]", ["data", "root"]),
        ("[?contains(name, 'd')] | [0].name", "db"),
        ("max_by([].drives[], &size).id", "data"),
        ("sum([].drives[].size)", 530),
        ("nothing", None),
        ("[0].{vm: name, drives: drives[].id}", {"vm": "db", "drives": ["root", "data"]}),
    ],
)
def test_selects(expression: str, expected: t.Any) -> None:
    assert select(VMS, expression) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (TaggedText("a"), "a"),
        (TaggedNumber(7), 7),
        (True, True),
        (None, None),
        (1.5, 1.5),
        (b"raw", "raw"),
        (VaultText(), "opened"),
        ((TaggedText("a"), TaggedText("b")), ["a", "b"]),
        ({TaggedText("k"): {TaggedText("v")}}, {"k": ["v"]}),
        (iter([TaggedText("a")]), ["a"]),
    ],
)
def test_makes_values_plain(value: t.Any, expected: t.Any) -> None:
    plain = to_plain(value)
    assert plain == expected
    assert type(plain) is type(expected)
    if isinstance(plain, list):
        assert [type(item) for item in plain] == [type(item) for item in expected]


def test_functions_accept_tagged_values() -> None:
    data = [{"name": TaggedText("db"), "size": TaggedNumber(3)}]
    assert select(data, TaggedText("[?starts_with(name, 'd')].abs(size)")) == [3]


def test_does_not_change_its_input() -> None:
    before = json.dumps(VMS)
    select(VMS, "reverse(sort_by(@, &name))")
    assert json.dumps(VMS) == before


def test_keeps_unsafe_text_unsafe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "wrap_var", lambda value: ("wrapped", value))
    assert select([UnsafeText("{{ x }}")], "[0]") == ("wrapped", "{{ x }}")
    assert select(["safe"], "[0]") == "safe"


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (
            "[?status='running']",
            "blockops.qemu.select: Unknown token '='\n  [?status='running']\n          ^",
        ),
        (
            "[?name=='a' size]",
            "blockops.qemu.select: Expecting: rbracket, got: unquoted_identifier\n  [?name=='a' size]\n              ^",
        ),
        (
            "[?name=='a'",
            "blockops.qemu.select: the expression ends too early\n  [?name=='a'\n             ^",
        ),
        (
            "[].name |\n  sort(@) |\n  [0",
            "blockops.qemu.select: the expression ends too early\n  [].name |\n    sort(@) |\n    [0\n      ^",
        ),
        (
            "[].length(`1`)",
            "blockops.qemu.select: length() wants string or array or object, but got number: 1\n"
            "  [].length(`1`)\n     ^",
        ),
        (
            "length(@, @)",
            "blockops.qemu.select: Expected 1 argument for function length(), received 2\n  length(@, @)\n  ^",
        ),
        (
            "[] | lenght(@)",
            "blockops.qemu.select: Unknown function: lenght()\n  [] | lenght(@)\n       ^",
        ),
        (
            "abs(length('a')) > abs(name)",
            "blockops.qemu.select: abs() wants number, but got null: None\n  abs(length('a')) > abs(name)",
        ),
        ("", "blockops.qemu.select: Invalid JMESPath expression: cannot be empty."),
    ],
)
def test_errors_show_the_expression_and_the_place(expression: str, message: str) -> None:
    with pytest.raises(AnsibleFilterError) as caught:
        select(VMS, expression)
    assert str(caught.value) == message


def test_a_large_argument_is_cut_in_the_message() -> None:
    with pytest.raises(AnsibleFilterError) as caught:
        select([{"name": "x" * 10000}], "abs(@)")
    assert len(str(caught.value)) < 300


def test_expression_must_be_a_string() -> None:
    with pytest.raises(AnsibleFilterError, match="wants a JMESPath expression as a string, but got list"):
        select(VMS, t.cast(str, ["name"]))


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JMESPATH_ERROR", ImportError("No module named 'jmespath'"))
    with pytest.raises(AnsibleFilterError, match=r"pip install jmespath.*No module named 'jmespath'"):
        select(VMS, "[]")


def test_ansible_finds_it() -> None:
    assert FilterModule().filters() == {"select": select}


PLAYBOOK = """
- hosts: localhost
  gather_facts: false
  vars:
    expression: "[?status=='running' && contains(name, 'e')].[name, to_number(size)][]"
    size: 12
    vms:
      - {name: "w{{ 'e' }}b", status: "{{ 'running' }}", size: "{{ size }}"}
      - {name: old, status: shutdown, size: 1}
  tasks:
    - ansible.builtin.command:
        argv: [printf, "%s", !unsafe '{"name": "{{ evil }}"}']
      register: answer
      changed_when: false
    - ansible.builtin.set_fact:
        evil_name: "{{ [answer.stdout | from_json] | blockops.qemu.select('[0].name') }}"
    - ansible.builtin.assert:
        that:
          - vms | blockops.qemu.select(expression) == ['web', 12]
          - vms | map('combine', {}) | blockops.qemu.select('length(@)') == 2
          - evil_name == '{' ~ '{ evil }' ~ '}'
    - ansible.builtin.debug:
        msg: "{{ vms | blockops.qemu.select('[?status=]') }}"
"""


def test_through_ansible_templating(tmp_path: Path) -> None:
    playbook = tmp_path / "play.yml"
    playbook.write_text(PLAYBOOK)
    environment = {
        **os.environ,
        "ANSIBLE_COLLECTIONS_PATH": str(collections_path()),
        "ANSIBLE_HOME": str(tmp_path / "home"),
        "ANSIBLE_LOCALHOST_WARNING": "false",
        "ANSIBLE_NOCOLOR": "1",
    }
    command = [sys.executable, "-m", "ansible.cli.playbook", "-i", "localhost,", "-c", "local", str(playbook)]
    command += ["-e", f"ansible_python_interpreter={sys.executable}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "All assertions passed" in output, output
    assert "Unknown token '='" in output.split("All assertions passed")[1], output


def collections_path() -> Path:
    """The directory that holds ansible_collections, be it the checkout's link tree or ansible-test's copy."""
    for parent in Path(module.__file__).parents:
        if parent.name == "ansible_collections":
            return parent.parent
    raise AssertionError(f"{module.__file__} is not below ansible_collections")
