# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every task in a module's EXAMPLES would be accepted: its options are documented, given, and of the right type.

The integration targets run tasks that do the same; this keeps the published text from growing apart from the options.
"""

from __future__ import annotations

import importlib
import typing as t

import pytest
import yaml
from ansible.module_utils import basic
from ansible.module_utils.common.arg_spec import ModuleArgumentSpecValidator

from architecture.documentation import documentation, module_names

PREFIX = "blockops.qemu."


class Captured(BaseException):
    """The arguments of AnsibleModule()."""

    def __init__(self, arguments: dict[str, t.Any]) -> None:
        super().__init__()
        self.arguments = arguments


def arguments_of(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, t.Any]:
    def capture(_self: object, argument_spec: dict[str, t.Any], **more: t.Any) -> None:
        raise Captured({"argument_spec": argument_spec, **more})

    monkeypatch.setattr(basic.AnsibleModule, "__init__", capture)
    module = importlib.import_module(f"ansible_collections.blockops.qemu.plugins.modules.{name}")
    with pytest.raises(Captured) as caught:
        module.main()
    return caught.value.arguments


def tasks() -> list[tuple[str, dict[str, t.Any]]]:
    """Module and options of every task of ours in all EXAMPLES."""
    found = []
    for owner in module_names():
        for task in yaml.safe_load(documentation()[owner].get("examples") or "") or []:
            found += [(key[len(PREFIX) :], value) for key, value in task.items() if key.startswith(PREFIX)]
    return found


def plain(value: t.Any, spec: t.Mapping[str, t.Any]) -> t.Any:
    """Whatever a template would give: a value that the option takes."""
    if isinstance(value, str) and "{{" in value:
        empty = {"list": [], "dict": {}, "int": 0, "float": 0.0, "bool": True}
        return empty.get(spec.get("type", "str"), "x")
    return value


@pytest.mark.parametrize(("name", "options"), tasks())
def test_examples_are_accepted(name: str, options: dict[str, t.Any], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(name, monkeypatch)
    spec = arguments["argument_spec"]
    rules = ("mutually_exclusive", "required_together", "required_one_of", "required_if", "required_by")
    validator = ModuleArgumentSpecValidator(spec, **{rule: arguments.get(rule) for rule in rules})
    given = {key: plain(value, spec.get(key, {})) for key, value in options.items()}
    assert not validator.validate(given).error_messages
