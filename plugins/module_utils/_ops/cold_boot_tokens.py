# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Where a path stands in a start-up file, and what is said of its node there. Pure.

Nobody knows the language of such a file (shell, unit, environment, YAML), but QEMU's two ways to describe a node are
the same in all of them: a list with commas, and JSON, as it is or with escaped quotes. Both are found around a position
of the text, so that a single word can be exchanged and all else stays.
"""

from __future__ import annotations

import json
import re
import typing as t
from dataclasses import dataclass

CUT_OFF = "its node names the backing image itself, so the new image would be cut off from its chain"
# What another image in the same place would not have, or would have differently.
_ALWAYS_OWN = frozenset({"data-file", "encrypt"})
_FORMAT_OWN = frozenset({
    "offset", "size", "lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other",
    "overlap-check", "cache-size", "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size",
    "cache-clean-interval", "discard-no-unref",
})  # fmt: skip
_SEPARATORS = "\"'`"
_JSON_VALUE = re.compile(r'"\s*:\s*\\*"(?:file:)?$')
_JSON_START = re.compile(r'\{\s*\\*"')
_NEAR = 100
_DRIVER = re.compile(r"[a-z][a-z0-9_-]*")
_COMMENT = re.compile(r"[ \t]*[#;]|[^\n]*?[ \t]#")


@dataclass(frozen=True)
class Word:
    """A part of the text that can be exchanged."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Node:
    """What is said of an image where its path stands.

    ``formats``: the words that give its format. ``options``: names of the other options of the node with the format.
    ``apart``: the path belongs to a node of its own, of this name; the node with the format is elsewhere.
    """

    language: str  # list, json, or plain: just a path
    formats: tuple[Word, ...] = ()
    options: frozenset[str] = frozenset()
    apart: str | None = None

    def obstacle(self, same_format: bool) -> str | None:
        """Why another image cannot simply take the place of this one."""
        if "backing" in self.options:
            return CUT_OFF
        own = sorted(self.options & (_ALWAYS_OWN if same_format else _ALWAYS_OWN | _FORMAT_OWN))
        return f"its node has options that are about the old image only ({', '.join(own)})" if own else None


@dataclass(frozen=True)
class _Segment:
    key: str
    value: Word


def node_at(text: str, start: int, end: int) -> Node:
    """The node whose path is ``text[start:end]``."""
    return _json_node(text, start, end) or _list_node(text, start, end)


def in_comment(text: str, position: int) -> bool:
    """Whether it stands in a comment, as all the likely languages have them: a whole line, or the end of one."""
    before = _COMMENT.match(text, text.rfind("\n", 0, position) + 1, position)
    # An odd number of quotes: the sign is a part of some text.
    return before is not None and not any(before.group().count(quote) % 2 for quote in "\"'")


def nodes_on(text: str, name: str) -> list[Node]:
    """The nodes that stand on the node ``name``, as their file."""
    word = re.escape(name)
    found = [
        _list_owner(_segments(text, match.start(1), match.end(1)), match.group(1)[: -len(f"file={name}")])
        for match in re.finditer(rf"(?<![\w.-])((?:[\w-]+\.)*file={word})(?=[,\s\"'\\]|$)", text)
        if not in_comment(text, match.start())
    ]
    for match in re.finditer(rf'\\*"file\\*"\s*:\s*\\*"{word}\\*"', text):
        if in_comment(text, match.start()):
            continue
        around = next(_objects(text, match.start(), match.end()), None)
        found.append(_json_owner(text, *around) if around else Node("json"))
    return found


# -- lists with commas -------------------------------------------------------------------------------------------------


def _list_node(text: str, start: int, end: int) -> Node:
    segments = _segments(text, start, end)
    segment = next((part for part in segments if part.value.start <= start < part.value.end), None)
    if segment is None:
        return Node("plain")
    key = segment.key
    if key == "filename":
        return Node("list", apart=next((part.value.text for part in segments if part.key == "node-name"), ""))
    if key.endswith("file.filename"):
        return _list_owner(segments, key[: -len("file.filename")])
    owner = _list_owner(segments, "")
    # NAME=/path in a script or an environment file is a list only when more follows.
    return owner if key == "file" or owner.formats else Node("plain")


def _segments(text: str, start: int, end: int) -> list[_Segment]:
    """The options of the list around ``text[start:end]``. A blank ends it, but for those of the path itself."""
    first, last = start, end
    while first > 0 and not text[first - 1].isspace():
        first -= 1
    while last < len(text) and not text[last].isspace():
        last += 1
    segments, position = [], first
    for number, part in enumerate(re.split(r"(?<!,),(?!,)", text[first:last])):
        key, sign, value = part.partition("=")
        begin = position + len(key) + len(sign)
        plain = value.rstrip(f"\\{_SEPARATORS}")
        begin += len(plain) - len(plain.lstrip(_SEPARATORS))
        plain = plain.lstrip(_SEPARATORS)
        if sign:
            segments.append(_Segment(key.lstrip(f"\\{_SEPARATORS}"), Word(begin, begin + len(plain), plain)))
        elif number == 0 and _DRIVER.fullmatch(part.strip(_SEPARATORS)):  # -blockdev qcow2,node-name=...
            begin = position + len(part) - len(part.lstrip(_SEPARATORS))
            driver = part.strip(_SEPARATORS)
            segments.append(_Segment("driver", Word(begin, begin + len(driver), driver)))
        position += len(part) + 1
    return segments


def _list_owner(segments: t.Sequence[_Segment], prefix: str) -> Node:
    """The node whose options begin with ``prefix`` (``file.`` when there is a filter above it)."""
    own = [(part.key[len(prefix) :], part.value) for part in segments if part.key.startswith(prefix)]
    names = ("driver",) if prefix else ("driver", "format")
    formats = tuple(value for key, value in own if key in names)
    return Node("list", formats, frozenset(key.split(".")[0] for key, _value in own))


# -- JSON --------------------------------------------------------------------------------------------------------------


def _json_node(text: str, start: int, end: int) -> Node | None:
    if not _JSON_VALUE.search(text[max(0, start - _NEAR) : start]):
        return None
    around = _objects(text, start, end)
    storage = next(around, None)
    if storage is None:
        return None
    content = _load(text, *storage)
    if content is None:
        return _json_owner(text, *storage)
    if "filename" not in content:
        return None
    image = next(around, None)
    if image is not None and _JSON_START.match(text, *image):
        above = _load(text, *image)
        if above is None or above.get("file") == content:
            return _json_owner(text, *image)
    return Node("json", apart=str(content.get("node-name", "")))


def _json_owner(text: str, start: int, end: int) -> Node:
    content = _load(text, start, end)
    if content is None:  # put together by a script: what it names is all there is to know
        return Node("json", options=frozenset({"backing"} if '"backing' in text[start:end].replace("\\", "") else ()))
    driver = re.escape(str(content.get("driver")))
    words = re.finditer(rf'\\*"driver\\*"\s*:\s*\\*"({driver})\\*"', text[start:end])
    formats = tuple(Word(start + word.start(1), start + word.end(1), word.group(1)) for word in words)
    return Node("json", formats, frozenset(content))


def _objects(text: str, start: int, end: int) -> t.Iterator[tuple[int, int]]:
    """The pairs of braces around ``text[start:end]``, the innermost first."""
    depth, position = 0, start
    while position > 0:
        position -= 1
        if text[position] == "}":
            depth += 1
        elif text[position] == "{" and depth:
            depth -= 1
        elif text[position] == "{" and (position == 0 or text[position - 1] != "$"):
            closing = _closing(text, end)
            if closing is None:
                return
            end = closing + 1
            yield position, end


def _closing(text: str, position: int) -> int | None:
    depth = 0
    for number in range(position, len(text)):
        if text[number] == "{":
            depth += 1
        elif text[number] == "}" and depth:
            depth -= 1
        elif text[number] == "}":
            return number
    return None


def _load(text: str, start: int, end: int) -> dict[str, t.Any] | None:
    """The object, also one with escaped quotes. Whatever else braces may hold is ``None``."""
    part = text[start:end]
    for candidate in (part, part.replace('\\"', '"').replace("\\\\", "\\")):
        try:
            content = json.loads(candidate)
        except ValueError:
            continue
        return content if isinstance(content, dict) else None
    return None
