# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: select
author:
  - blockops.qemu contributors (@blockops)
version_added: 0.1.0
short_description: Pick VMs, drives, and backups with a JMESPath expression
description:
  - Evaluates a L(JMESPath,https://jmespath.org/) expression over any data, on the controller.
  - Made for what stands between two tasks, such as picking from the answer of M(blockops.qemu.qmp_vm_info)
    the VMs that M(blockops.qemu.qmp_drive_backup) shall work on.
  - An expression that cannot be evaluated fails the task with a message that shows the expression and the place in it.
requirements:
  - L(jmespath,https://pypi.org/project/jmespath/) 1.0.0 or later on the controller
options:
  _input:
    description: The data to pick from.
    type: raw
    required: true
  expression:
    description:
      - The JMESPath expression.
      - Names that are more than letters, digits, and underscores need double quotes,
        literal strings single quotes, numbers and booleans backticks.
    type: str
    required: true
positional: expression
notes:
  - Strings that Ansible must not evaluate as templates stay protected in the result.
"""

EXAMPLES = r"""
- name: Describe the VMs of this hypervisor
  blockops.qemu.qmp_vm_info:
    vms:
      - socket: /run/vms/*.qmp
  register: found

- name: Back up those that run
  blockops.qemu.qmp_drive_backup:
    vms: "{{ found.vms | blockops.qemu.select(\"[?status=='running']\") }}"
    repository: /srv/backup

- name: Show which images are larger than 1 GiB
  ansible.builtin.debug:
    msg: "{{ found.vms | blockops.qemu.select('[].drives[].chain[?size > `1073741824`].file[]') }}"
"""

RETURN = r"""
_value:
  description:
    - What the expression selects; V(null) when it selects nothing.
  type: raw
"""

import re
import typing as t
from collections.abc import Iterable, Mapping

from ansible.errors import AnsibleFilterError
from ansible.utils.unsafe_proxy import wrap_var

try:
    import jmespath
    from jmespath import exceptions as jmespath_errors
except ImportError as exc:
    JMESPATH_ERROR: ImportError | None = exc
else:
    JMESPATH_ERROR = None

LONGEST_ARGUMENT = 100  # of a failed call in an error message


def to_plain(value: t.Any) -> t.Any:
    """Only what JSON knows, of exactly these types: jmespath goes by the type's name, not by isinstance."""
    if getattr(value, "__ENCRYPTED__", False):
        return to_plain(str(value))
    if isinstance(value, Mapping):
        return {to_plain(key): to_plain(value[key]) for key in value}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [to_plain(item) for item in value]
    return plain_scalar(value)


def plain_scalar(value: t.Any) -> t.Any:
    """The base class's own conversion, because that of Ansible's subclasses may hand out the subclass again."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return value


def holds_unsafe(value: t.Any) -> bool:
    """Whether ansible-core before 2.19 marked any string in there as never to be templated."""
    if isinstance(value, (str, bytes)):
        return bool(getattr(value, "__UNSAFE__", False))
    if isinstance(value, Mapping):
        return any(holds_unsafe(key) or holds_unsafe(value[key]) for key in value)
    if isinstance(value, (list, tuple)):
        return any(holds_unsafe(item) for item in value)
    return False


def place(expression: str, position: int | None) -> str:
    """The expression, with a caret below the character where jmespath stumbled."""
    if position is None:
        return f"  {expression}"
    before = expression[:position]
    line = before.count("\n")
    lines = expression.split("\n")
    lines.insert(line + 1, " " * (position - before.rfind("\n") - 1) + "^")
    return "\n".join(f"  {text}" for text in lines)


def position_of(error: Exception, expression: str) -> int | None:
    """Where in the expression: syntax errors know it, failed calls know at most the function's name."""
    position = getattr(error, "lex_position", None)
    if isinstance(position, int):
        return position
    named = re.search(r"(\w+)\(\)", reason_of(error))
    calls = [found.start() for found in re.finditer(rf"\b{named[1]}\s*\(", expression)] if named else []
    return calls[0] if len(calls) == 1 else None


def short(value: t.Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_ARGUMENT else text[:LONGEST_ARGUMENT] + " ..."


def reason_of(error: Exception) -> str:
    """What is wrong, without the copy of the expression that some of jmespath's messages carry."""
    if isinstance(error, jmespath_errors.JMESPathTypeError):
        expected = " or ".join(error.expected_types)
        return f"{error.function_name}() wants {expected}, but got {error.actual_type}: {short(error.current_value)}"
    if isinstance(error, jmespath_errors.IncompleteExpressionError):
        return "the expression ends too early"
    if isinstance(error, jmespath_errors.LexerError):
        return str(error.message)
    if isinstance(error, jmespath_errors.ParseError) and not isinstance(error, jmespath_errors.ArityError):
        return str(error.msg)
    return str(error)


def select(data: t.Any, expression: str) -> t.Any:
    """The filter blockops.qemu.select."""
    if JMESPATH_ERROR is not None:
        raise AnsibleFilterError(
            "blockops.qemu.select needs the Python library jmespath on the controller, in the Python that runs "
            f"Ansible (pip install jmespath): {JMESPATH_ERROR}"
        )
    if not isinstance(expression, str):
        raise AnsibleFilterError(
            f"blockops.qemu.select wants a JMESPath expression as a string, but got {type(expression).__name__}"
        )
    plain_expression = to_plain(expression)
    try:
        result = jmespath.search(plain_expression, to_plain(data))
    except jmespath_errors.JMESPathError as error:
        where = place(plain_expression, position_of(error, plain_expression))
        # Not "from error": ansible-core 2.19 adds the text of the cause, which is the same again with another caret.
        raise AnsibleFilterError(f"blockops.qemu.select: {reason_of(error)}\n{where}".rstrip()) from None
    return wrap_var(result) if holds_unsafe(data) else result


class FilterModule:
    """Tells Ansible which filters this file holds."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"select": select}
