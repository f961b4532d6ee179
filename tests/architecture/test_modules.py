# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a module documents is what it is: options, return values, attributes, action group, integration target."""

from __future__ import annotations

import importlib
import typing as t
from pathlib import Path

import pytest
import yaml
from ansible.module_utils import basic

from architecture.documentation import documentation, module_names

ROOT = Path(__file__).resolve().parents[2]
ATTRIBUTES = ("check_mode", "diff_mode", "idempotent")
OPTION_FACTS = ("type", "elements", "required", "default", "choices", "aliases")
Options = t.Mapping[str, t.Mapping[str, t.Any]]

every_module = pytest.mark.parametrize("name", module_names())


class Captured(BaseException):
    """The arguments of AnsibleModule(); not an Exception, so that no handler of the module swallows it."""

    def __init__(self, arguments: dict[str, t.Any]) -> None:
        super().__init__()
        self.arguments = arguments


def arguments_of(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, t.Any]:
    """What the module gives to AnsibleModule(), found by running it up to there."""

    def capture(_self: object, argument_spec: Options, **more: t.Any) -> None:
        raise Captured({"argument_spec": argument_spec, **more})

    monkeypatch.setattr(basic.AnsibleModule, "__init__", capture)
    module = importlib.import_module(f"ansible_collections.blockops.qemu.plugins.modules.{name}")
    with pytest.raises(Captured) as caught:
        module.main()
    return caught.value.arguments


def fact(option: t.Mapping[str, t.Any], name: str) -> t.Any:
    value = option.get(name)
    if name == "type":
        return value or "str"
    if name == "required":
        return bool(value)
    if name in ("choices", "aliases"):
        return sorted(value or (), key=str)
    return value


def differences(documented: Options, specified: Options, where: str = "") -> list[str]:
    found = [f"{where}{name}: not documented" for name in sorted(set(specified) - set(documented))]
    found += [f"{where}{name}: not in the argument spec" for name in sorted(set(documented) - set(specified))]
    for name in sorted(set(documented) & set(specified)):
        said, is_so = documented[name], specified[name]
        for key in OPTION_FACTS:
            if fact(said, key) != fact(is_so, key):
                found.append(f"{where}{name}: {key} is {fact(is_so, key)!r}, documented as {fact(said, key)!r}")
        found += differences(said.get("suboptions") or {}, is_so.get("options") or {}, f"{where}{name}.")
    return found


def incomplete(returns: t.Mapping[str, t.Mapping[str, t.Any]], needed: set[str], where: str = "") -> list[str]:
    found: list[str] = []
    for key, value in returns.items():
        found += [f"{where}{key} has no {word}" for word in sorted(needed - set(value))]
        if value.get("type") == "list" and "elements" not in value:
            found.append(f"{where}{key} has no elements")
        found += incomplete(value.get("contains") or {}, {"description", "type"}, f"{where}{key}.")
    return found


@every_module
def test_options_are_the_argument_spec(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(name, monkeypatch)
    assert not differences(documentation()[name]["doc"].get("options") or {}, arguments["argument_spec"])


@every_module
def test_attributes_are_stated(name: str) -> None:
    attributes = documentation()[name]["doc"].get("attributes") or {}
    assert not [word for word in ATTRIBUTES if word not in attributes]
    vague = [
        word for word, value in attributes.items() if value.get("support") == "partial" and not value.get("details")
    ]
    assert not vague, "partial support needs details"


@every_module
def test_check_mode_attribute_is_true(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stated = documentation()[name]["doc"]["attributes"]["check_mode"]["support"] != "none"
    assert stated == bool(arguments_of(name, monkeypatch).get("supports_check_mode"))


@every_module
def test_return_values_are_described(name: str) -> None:
    returns = documentation()[name].get("return") or {}
    assert returns, "RETURN is empty"
    assert not incomplete(returns, {"description", "returned", "type"})


@every_module
def test_examples_use_the_full_name(name: str) -> None:
    assert f"blockops.qemu.{name}:" in (documentation()[name].get("examples") or "")


@every_module
def test_has_an_integration_target(name: str) -> None:
    target = ROOT / "tests" / "integration" / "targets" / name
    assert (target / "tasks" / "main.yml").is_file() or (target / "runme.sh").is_file()


def test_action_group_lists_every_module() -> None:
    runtime = yaml.safe_load((ROOT / "meta" / "runtime.yml").read_text())
    listed = {entry for entry in runtime["action_groups"]["qemu"] if isinstance(entry, str)}
    assert not set(module_names()) - listed
