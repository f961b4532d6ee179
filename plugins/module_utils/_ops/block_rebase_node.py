# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Which node above an image can be given another backing image, and with which options: blockdev-reopen of QEMU.

QEMU sets options that blockdev-reopen does not name back to their defaults (measured with 7.2: detect-zeroes; but not
discard), tells nobody what the sizes of caches and the like are, and refuses nodes without a name of their own, as
those of -drive and those that it opens because a header names them. So a node is reopened only when all its options
are known: it was attached by this collection, or is on QEMU's command line.
"""

from __future__ import annotations

import json
import os
import typing as t

from .._block.graph import Drive, Layer
from .._block.names import of_snapshot
from .._block.startup import option_pairs, split_options
from .._qmp.session import Session

Options = dict[str, t.Any]
_PLAIN = frozenset({"driver", "node-name", "discard", "detect-zeroes"})
_FLAGS = frozenset({"read-only", "auto-read-only", "force-share", "cache.direct", "cache.no-flush"})
_WORDS = {"on": True, "off": False, "yes": True, "no": False, "true": True, "false": False}


def read_command_line(pid: int) -> dict[str, Options | None] | None:
    """The nodes of -blockdev, by name; ``None`` for one whose options are not understood, or when all is unknown."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            argv = [os.fsdecode(part) for part in stream.read().split(b"\0")[:-1]]
    except OSError:
        return None
    return parse_blockdevs(argv)


def parse_blockdevs(argv: t.Sequence[str]) -> dict[str, Options | None]:
    """As they are to be given in JSON; without those of their children, which stay what they are."""
    found: dict[str, Options | None] = {}
    for name, value in option_pairs(argv):
        if name == "blockdev":
            node, options = _json(value) if value.startswith("{") else _dotted(value)
            found[node] = options
    return found


def _json(text: str) -> tuple[str, Options | None]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        return "", None
    return str(options.get("node-name", "")), {key: value for key, value in options.items() if key != "file"}


def _dotted(text: str) -> tuple[str, Options | None]:
    options: Options = {}
    given = split_options(text, "driver")
    node = given.get("node-name", "")
    for key, value in given.items():
        if key == "file" or key.startswith("file."):
            continue
        if key in _FLAGS and value in _WORDS:
            *parents, last = key.split(".")
            place = options.setdefault(parents[0], {}) if parents else options
            place[last] = _WORDS[value]
        elif key in _PLAIN:
            options[key] = value
        else:
            return node, None
    return node, options


def find_holder(drive: Drive, index: int, nodes: dict[str, Options | None] | None) -> tuple[Layer, Options] | str:
    """The nearest layer above that can be reopened, with its options; or why there is none."""
    layer = next((layer for layer in reversed(drive.layers[:index]) if not layer.node.startswith("#")), None)
    if layer is None:
        return "no node above it has a name of its own, and QEMU reopens no other"
    if layer.driver != "qcow2":
        return f"{layer.file} above it is no qcow2 image"
    given = None if nodes is None else nodes.get(layer.node)
    if given is None and (not of_snapshot(layer.node) or layer.node in (nodes or {})):
        return f"the options that node {layer.node} above it was attached with are not known, and would be lost"
    if given is not None and "backing" in given:
        return f"QEMU's command line says what is below node {layer.node}, so the next start would go wrong"
    if given is not None and _deviates(layer, given):
        return f"node {layer.node} is no longer what QEMU's command line says, so its options are not known"
    own: Options = {"discard": "unmap"} if given is None else given
    cache = {"direct": layer.direct, "no-flush": layer.no_flush}
    about = {"driver": "qcow2", "node-name": layer.node, "read-only": layer.read_only, "cache": cache}
    return layer, {**own, **about, "detect-zeroes": layer.detect_zeroes}


def _deviates(layer: Layer, given: Options) -> bool:
    cache = given.get("cache") if isinstance(given.get("cache"), dict) else {}
    said = (given.get("driver"), given.get("detect-zeroes", "off"), *(_flag(cache, key) for key in _CACHE))
    return said != (layer.driver, layer.detect_zeroes, layer.direct, layer.no_flush)


_CACHE = ("direct", "no-flush")


def _flag(cache: t.Any, key: str) -> bool:
    return bool((cache or {}).get(key, False))


async def read_children(session: Session) -> dict[str, tuple[str | None, str | None]]:
    """By node: the nodes of its file and of its backing image."""
    found: dict[str, tuple[str | None, str | None]] = {}
    todo = list(await session.command("query-blockstats"))
    while todo:
        stats = todo.pop()
        below = [stats[child] for child in ("parent", "backing") if child in stats]
        file, backing = (stats.get(child, {}).get("node-name") for child in ("parent", "backing"))
        if stats.get("node-name"):
            found[stats["node-name"]] = (file, backing)
        todo += below
    return found


def unbroken(drive: Drive, first: int, last: int, children: t.Mapping[str, tuple[str | None, str | None]]) -> bool:
    """Whether each of these layers lies right on the next one, without a filter in between."""
    pairs = zip(drive.layers[first:last], drive.layers[first + 1 : last + 1])
    return all(children.get(upper.node, (None, None))[1] == lower.node for upper, lower in pairs)
