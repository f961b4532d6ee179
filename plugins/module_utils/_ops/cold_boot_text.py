# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Exchanging the paths of images in the text of a start-up file: whole paths only, all at once, or not at all. Pure."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import typing as t
from dataclasses import dataclass

from .._block.startup import parse_startup
from .cold_boot_tokens import CUT_OFF, Node, Word, in_comment, node_at, nodes_on

# A path begins after one of these and ends before one of those; anything else makes it part of a longer one.
_BEFORE = r"(?:^|(?<=[\s\"'=,(\[<>;|&`])|(?<=file:))(?<!,,)"
# A name without any slash may be anything, so it has to stand where QEMU takes a file.
_BEFORE_BARE = (
    r"(?:(?<=\bfile=)|(?<=\bfilename=)|(?<=\bfile=[\"'])|(?<=\bfilename=[\"'])|(?<=-hd[a-d] )"
    r"|(?<=\"filename\":\")|(?<=\"filename\": \")|(?<=\\\"filename\\\":\\\"))"
)
_AFTER = r"(?=$|[\s\"')\]<>;|&`]|\\(?:\r?\n|[\"'])|,(?!,)(?:[a-z][a-z0-9_.-]*=|readonly\b|\$|\s|[\"']|$)|:\s)"
_SHORT_OPTION = re.compile(r"-hd[a-d]\s+[\"']?$")
_ORDINARY = re.compile(r"[\w./@+:~-]")


class Unsure(Exception):
    """A move cannot be made in this text for sure. Becomes a named error where the file is known."""

    def __init__(self, move: Move, reason: str) -> None:
        self.move = move
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Move:
    """Where ``drive`` was to start from any of ``old``, it is to start from ``new``. Several for one drive are fine.

    ``explicit_backing``: QEMU was given the backing image of the old one by name, even if the text does not show it.
    """

    drive: str
    old: tuple[str, ...]
    new: str
    old_format: str
    new_format: str
    explicit_backing: bool = False

    @property
    def same_format(self) -> bool:
        return self.old_format == self.new_format


@dataclass(frozen=True)
class _Spelling:
    move: Move
    encode: t.Callable[[str], str]


def rewrite(text: str, moves: t.Sequence[Move]) -> tuple[str, frozenset[str]]:
    """The text with every move made, and the drives of which it names an old or the new image.

    :raise Unsure: one of them cannot be made.
    """
    pending = _pending(text, moves)
    words: dict[tuple[int, int], Word] = {}
    mentioned = {move.drive for move in moves if _names_new(text, move)}
    spellings = _spellings(pending)
    for match in _found(text, spellings):
        spelling = spellings[match.group()]
        if not in_comment(text, match.start()):
            mentioned.add(spelling.move.drive)
        for word in _exchanged(text, match, spelling):
            words[(word.start, word.end)] = word
    for word in sorted(words.values(), key=lambda word: word.start, reverse=True):
        text = text[: word.start] + word.text + text[word.end :]
    return text, frozenset(mentioned)


def _names_new(text: str, move: Move) -> bool:
    """A comment starts no VM, so it does not count."""
    return any(not in_comment(text, match.start()) for match in _found(text, {code(move.new) for code in _ENCODINGS}))


def _pending(text: str, moves: t.Sequence[Move]) -> list[Move]:
    """The moves that are not made yet.

    As a rule the old path is in the text or is not. Where the new image of one drive is the old one of another (two
    that swapped places), the path alone tells nothing: which drive it is given to decides.
    """
    moves = [dataclasses.replace(move, old=tuple(old for old in move.old if old != move.new)) for move in moves]
    tangled = [m for m in moves if any(m.drive != n.drive and (m.new in n.old or n.new in m.old) for n in moves)]
    if not tangled:
        return moves
    now = {key: image.spelled for image in parse_startup(["", *_arguments(text)]) for key in image.keys}
    states = {m.drive: "new" if now.get(m.drive) == m.new else "other" for m in tangled}
    states.update({m.drive: "old" for m in tangled if now.get(m.drive) in m.old})
    if set(states.values()) == {"new"}:
        return [move for move in moves if move not in tangled]
    if set(states.values()) == {"old"}:
        return moves
    raise Unsure(tangled[0], "the new image of one drive is the old one of another, and which is which is not clear")


def _arguments(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return []


def _spellings(moves: t.Sequence[Move]) -> dict[str, _Spelling]:
    """Every way to write an old path, with the way to write the new one there."""
    found: dict[str, _Spelling] = {}
    for move in moves:
        for old in move.old:
            for encode in _ENCODINGS:
                known = found.setdefault(encode(old), _Spelling(move, encode))
                if known.move.new != move.new:
                    raise Unsure(move, f"{old} is the image of drive {known.move.drive} as well")
    return found


def _found(text: str, paths: t.Iterable[str]) -> t.Iterator[re.Match[str]]:
    """Where one of the paths stands as a whole."""
    ordered = sorted(paths, key=len, reverse=True)
    rooted = "|".join(re.escape(path) for path in ordered if "/" in path)
    bare = "|".join(re.escape(path) for path in ordered if "/" not in path)
    parts = [f"{_BEFORE}(?:{rooted})" if rooted else "", f"{_BEFORE_BARE}(?:{bare})" if bare else ""]
    if not any(parts):
        return
    for match in re.finditer(f"(?:{'|'.join(part for part in parts if part)}){_AFTER}", text, re.MULTILINE):
        quote = text[match.start() - 1 : match.start()]
        # Directly after a quote the path has to end with it: what follows a blank or comma may belong to it.
        if quote not in ('"', "'") or text[match.end() :].lstrip("\\").startswith(quote):
            yield match


def _exchanged(text: str, match: re.Match[str], spelling: _Spelling) -> t.Iterator[Word]:
    """The path, and the word for its format."""
    move = spelling.move
    if in_comment(text, match.start()):
        yield Word(match.start(), match.end(), spelling.encode(move.new))
        return
    node = node_at(text, match.start(), match.end())
    yield Word(match.start(), match.end(), _written(move, match.group(), spelling, node.language))
    above = nodes_on(text, node.apart) if node.apart else []
    for owner in above or [node]:
        obstacle = CUT_OFF if move.explicit_backing else owner.obstacle(move.same_format)
        if obstacle:
            raise Unsure(move, obstacle)
    if not move.same_format:
        probed = _SHORT_OPTION.search(text, 0, match.start()) and move.old_format == "raw"
        if not (probed and node.language == "plain"):
            yield _format_word(move, node, above)


def _format_word(move: Move, node: Node, above: t.Sequence[Node]) -> Word:
    if node.apart is not None and len(above) != 1:
        raise Unsure(move, "the node that gives its format is not found there" if not above else "several nodes use it")
    formats = (above[0] if node.apart is not None else node).formats
    matching = [word for word in formats if word.text == move.old_format]
    if len(matching) != 1 or len(formats) != 1:
        said = ", ".join(sorted({word.text for word in formats})) or "nothing"
        raise Unsure(move, f"the format has to change with the path, and what is said of it there is {said}")
    return Word(matching[0].start, matching[0].end, move.new_format)


def _written(move: Move, old: str, spelling: _Spelling, language: str) -> str:
    """The new path as it has to be written in place of ``old``."""
    strange = {char for char in move.new if not _ORDINARY.match(char)}
    added = {char for char in strange if char not in old}
    if not added:
        return spelling.encode(move.new)
    if added != {","} or language == "plain":
        raise Unsure(move, f"the new path has characters ({''.join(sorted(added))}) that may mean something else there")
    encoded = spelling.encode(move.new)
    return _doubled(encoded) if language == "list" else encoded


def _plain(path: str) -> str:
    return path


def _doubled(path: str) -> str:
    return path.replace(",", ",,")


def _json(path: str) -> str:
    return json.dumps(path)[1:-1]


def _json_wide(path: str) -> str:
    return json.dumps(path, ensure_ascii=False)[1:-1]


def _json_in_quotes(path: str) -> str:
    return _json_wide(path).replace("\\", "\\\\").replace('"', '\\"')


def _json_twice(path: str) -> str:
    return _json(_json(path))


def _shell(path: str) -> str:
    return re.sub(r"([^\w./@%+:,~-])", r"\\\1", path)


def _shell_doubled(path: str) -> str:
    return _doubled(_shell(path))


_ENCODINGS = (_plain, _doubled, _json, _json_wide, _json_in_quotes, _json_twice, _shell, _shell_doubled)
