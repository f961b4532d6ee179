# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Reads the collection's own source: files, imports, code lines."""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
import typing as t
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
DOCUMENTATION_BLOCKS = {"DOCUMENTATION", "EXAMPLES", "RETURN"}
NO_CODE = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
Function = t.Union[ast.FunctionDef, ast.AsyncFunctionDef]


@cache
def project_files() -> tuple[Path, ...]:
    """What git tracks or would track; all files where there is no git."""
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        names = sorted(set(listed.stdout.split("\0")) - {""})
        return tuple(path for path in (ROOT / name for name in names) if path.is_file())
    return tuple(path for path in sorted(ROOT.rglob("*")) if path.is_file())


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class Import:
    """One imported file of the collection, or the dotted name of something else."""

    line: int
    target: Path | None
    name: str


@dataclass(frozen=True)
class Source:
    """One Python file below plugins/."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(PLUGINS).as_posix()

    @property
    def layer(self) -> str:
        return layer_of(self.path)

    @property
    def tree(self) -> ast.Module:
        return parsed(self.path)

    def functions(self) -> t.Iterator[Function]:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node

    def imports(self) -> t.Iterator[Import]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(node.lineno, None, alias.name)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                for alias in node.names:
                    yield Import(node.lineno, None, f"{node.module}.{alias.name}")
            elif isinstance(node, ast.ImportFrom):
                yield from self._relative(node)

    def _relative(self, node: ast.ImportFrom) -> t.Iterator[Import]:
        base = self.path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            candidates = (base / f"{alias.name}.py", base.with_suffix(".py"), base / "__init__.py")
            target = next((path for path in candidates if path.is_file()), candidates[1])
            yield Import(node.lineno, target, f"{'.' * node.level}{node.module or ''}.{alias.name}")

    def code_lines(self, part: ast.AST | None = None) -> int:
        """Lines with code on them: no blank lines, comments, docstrings, and documentation blocks."""
        lines = code_line_numbers(self.path)
        if part is None:
            return len(lines)
        first, last = t.cast(Function, part).lineno, t.cast(Function, part).end_lineno or 0
        return sum(1 for line in lines if first <= line <= last)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(text_of(path), filename=str(path))


def layer_of(path: Path) -> str:
    """The directory below plugins/ or, in module_utils, the package or private file below that."""
    parts = path.relative_to(PLUGINS).with_suffix("").parts
    return parts[1] if parts[0] == "module_utils" and len(parts) > 1 else parts[0]


@cache
def code_line_numbers(path: Path) -> frozenset[int]:
    numbers: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text_of(path)).readline):
        if token.type not in NO_CODE:
            numbers.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(parsed(path)):
        for text in texts_in(node):
            numbers.difference_update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return frozenset(numbers)


def texts_in(node: ast.AST) -> t.Iterator[ast.stmt]:
    """The docstring of a node, and Ansible's documentation blocks."""
    body = getattr(node, "body", None)
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
        yield t.cast("list[ast.stmt]", body)[0]
    if isinstance(node, ast.Assign):
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        if names & DOCUMENTATION_BLOCKS:
            yield node


def sources(*directories: str) -> list[Source]:
    found = [path for directory in directories for path in sorted((PLUGINS / directory).rglob("*.py"))]
    return [Source(path) for path in found]
