# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The building stands as drawn in docs/architecture.md: layers, owners, sizes. Reads the source, runs nothing of it."""

from __future__ import annotations

import ast
import typing as t
from pathlib import Path

import pytest

from architecture.source import PLUGINS, Function, Source, layer_of, sources

# Imports go down this list only, or stay in their own package. Packages in one line do not know each other.
LAYERS: list[set[str]] = [
    {"modules"},
    {"_ansible"},
    {"_ops"},
    {"_qmp", "_guest", "_image", "_repository"},
    {"_block", "_unix"},
    {"_errors", "_types"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
CONTROLLER = {"action", "filter", "lookup", "callback", "plugin_utils", "doc_fragments"}
CONTROLLER_MAY_IMPORT = {"plugin_utils", "_block", "_errors", "_types"}

# One owner for each outside thing: dotted name -> the only file that imports it.
OWNERS = {
    "qemu": "module_utils/_qmp/session.py",
    "subprocess": "module_utils/_image/qemu_img.py",
}
# Calls that only these files make.
CALLERS: dict[str, tuple[str, ...]] = {
    "exit_json": ("module_utils/_ansible/runner.py",),
    "fail_json": ("module_utils/_ansible/runner.py",),
    "warn": ("module_utils/_ansible/runner.py",),
    # qemu-img has an owner of its own; a restore drill starts a QEMU, and the check its user wants.
    "create_subprocess_exec": ("module_utils/_image/qemu_img.py", "module_utils/_guest/program.py"),
    "create_subprocess_shell": ("module_utils/_image/qemu_img.py",),
    "run_command": ("module_utils/_image/qemu_img.py",),
}
# Where Ansible may be known at all.
ANSIBLE_KNOWN_TO = {"modules", "_ansible", *CONTROLLER}

MODULE_LINES = 100
UTIL_LINES = 300
FUNCTION_LINES = 40

EVERYTHING = sources("modules", "module_utils", *sorted(CONTROLLER))


def by_name(source: Source) -> str:
    return source.name


every_file = pytest.mark.parametrize("source", EVERYTHING, ids=by_name)


def allowed(source: str, target: str) -> bool:
    if target in (source, "_errors"):
        return True
    if source in CONTROLLER:
        return target in CONTROLLER_MAY_IMPORT
    return source in RANK and target in RANK and RANK[source] < RANK[target]


@every_file
def test_file_belongs_to_a_layer(source: Source) -> None:
    assert source.layer in RANK or source.layer in CONTROLLER, f"say in LAYERS where {source.layer} stands"


@every_file
def test_imports_go_down(source: Source) -> None:
    wrong = [
        f"line {found.line}: {source.layer} imports {found.name} of {layer_of(found.target)}"
        for found in source.imports()
        if found.target is not None and not allowed(source.layer, layer_of(found.target))
    ]
    assert not wrong


@every_file
def test_imports_inside_the_collection_are_relative(source: Source) -> None:
    wrong = [f"line {found.line}: {found.name}" for found in source.imports() if "ansible_collections" in found.name]
    assert not wrong


def test_no_import_cycles() -> None:
    graph = {
        source.path: {found.target for found in source.imports() if found.target is not None} for source in EVERYTHING
    }
    assert not [" -> ".join(path.relative_to(PLUGINS).as_posix() for path in cycle) for cycle in cycles(graph)]


def cycles(graph: t.Mapping[Path, set[Path]]) -> list[list[Path]]:
    found: list[list[Path]] = []
    done: set[Path] = set()

    def visit(path: Path, trail: list[Path]) -> None:
        if path in trail:
            found.append([*trail[trail.index(path) :], path])
        elif path not in done:
            for target in sorted(graph.get(path, ())):
                visit(target, [*trail, path])
            done.add(path)

    for start in sorted(graph):
        visit(start, [])
    return found


@every_file
def test_outside_things_have_one_owner(source: Source) -> None:
    wrong = [
        f"line {found.line}: {found.name} belongs to {owner}"
        for found in source.imports()
        for name, owner in OWNERS.items()
        if found.target is None and found.name.split(".")[0] == name and source.name != owner
    ]
    assert not wrong


@every_file
def test_calls_with_one_caller(source: Source) -> None:
    wrong = [
        f"line {node.lineno}: {node.func.attr}() belongs to {CALLERS[node.func.attr]}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and source.name not in CALLERS.get(node.func.attr, (source.name,))
    ]
    assert not wrong


def test_nothing_ends_the_module_inside_a_coroutine() -> None:
    """The JSON would be printed before the coroutine's clean-up runs."""
    wrong = [
        f"{source.name}, line {node.lineno}: {node.func.attr}() in async {function.name}()"
        for source in EVERYTHING
        for function in source.functions()
        if isinstance(function, ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("exit_json", "fail_json")
    ]
    assert not wrong


@every_file
def test_only_the_doors_know_ansible(source: Source) -> None:
    wrong = [f"line {found.line}: {found.name}" for found in source.imports() if found.name.split(".")[0] == "ansible"]
    assert source.layer in ANSIBLE_KNOWN_TO or not wrong


@every_file
def test_file_is_small(source: Source) -> None:
    limit = MODULE_LINES if source.layer == "modules" else UTIL_LINES
    assert source.code_lines() <= limit


@every_file
def test_functions_are_small(source: Source) -> None:
    def too_long(function: Function) -> bool:
        return source.code_lines(function) > FUNCTION_LINES

    assert not [f"{found.name}(): {source.code_lines(found)} lines" for found in source.functions() if too_long(found)]


@every_file
def test_no_assert_and_no_global(source: Source) -> None:
    wrong = [node.lineno for node in ast.walk(source.tree) if isinstance(node, (ast.Assert, ast.Global))]
    assert not wrong, "asserts vanish with -O; raise a named error"
