# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A role's argument spec, defaults, and README table say the same; playbooks only order."""

from __future__ import annotations

import re
import typing as t
from pathlib import Path

import pytest
import yaml

from architecture.source import ROOT, project_files, text_of

ROLES = sorted(path for path in (ROOT / "roles").glob("*") if path.is_dir())
PLAYBOOKS = sorted((ROOT / "playbooks").glob("*.yml"))
PLAY_KEYWORDS = {
    "any_errors_fatal",
    "become",
    "gather_facts",
    "hosts",
    "max_fail_percentage",
    "module_defaults",
    "name",
    "order",
    "roles",
    "serial",
    "strategy",
    "throttle",
    "vars",
}

every_role = pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)


def load(path: Path) -> t.Any:
    return (yaml.safe_load(text_of(path)) if path.is_file() else None) or {}


def specified(role: Path) -> dict[str, dict[str, t.Any]]:
    """The options of all entry points."""
    options: dict[str, dict[str, t.Any]] = {}
    for entry in load(role / "meta" / "argument_specs.yml")["argument_specs"].values():
        options.update(entry.get("options") or {})
    return options


def defaults(role: Path) -> dict[str, t.Any]:
    return t.cast("dict[str, t.Any]", load(role / "defaults" / "main.yml"))


def computed(value: t.Any) -> bool:
    return "{{" in str(value) or "{%" in str(value)


@every_role
def test_every_default_is_specified(role: Path) -> None:
    assert not sorted(set(defaults(role)) - set(specified(role)))


@every_role
def test_every_optional_variable_has_a_default(role: Path) -> None:
    """Ansible does not apply the defaults of an argument spec."""
    optional = {name for name, option in specified(role).items() if not option.get("required")}
    assert optional == set(defaults(role))


@every_role
def test_specified_defaults_are_the_defaults(role: Path) -> None:
    options = specified(role)
    wrong = {
        name: {"defaults": value, "argument_specs": options[name].get("default")}
        for name, value in defaults(role).items()
        if name in options and not computed(value) and options[name].get("default") != value
    }
    assert not wrong


@every_role
def test_variables_carry_the_prefix(role: Path) -> None:
    names = {*defaults(role), *specified(role)}
    assert not sorted(name for name in names if not name.startswith(f"{role.name}_"))
    internal = {name for path in (role / "vars").glob("*.yml") for name in load(path)}
    assert not sorted(name for name in internal if not name.startswith(f"__{role.name}_"))


@every_role
def test_readme_table_lists_every_variable(role: Path) -> None:
    listed = set(re.findall(r"^\| *`(\w+)`", text_of(role / "README.md"), flags=re.MULTILINE))
    assert listed == set(specified(role))


@every_role
def test_every_option_is_described(role: Path) -> None:
    assert not sorted(name for name, option in specified(role).items() if not option.get("description"))


def test_entry_points_are_named_without_extension() -> None:
    """With the extension Ansible silently skips the argument spec."""
    wrong = [
        str(path.relative_to(ROOT))
        for path in project_files()
        if path.suffix in (".yml", ".yaml") and re.search(r"tasks_from: *[\"']?[\w/.-]+\.ya?ml", text_of(path))
    ]
    assert not wrong


@pytest.mark.parametrize("playbook", PLAYBOOKS, ids=lambda path: path.name)
def test_playbooks_only_order(playbook: Path) -> None:
    for play in load(playbook):
        assert set(play) <= PLAY_KEYWORDS, f"{sorted(set(play) - PLAY_KEYWORDS)} belong into a role"
