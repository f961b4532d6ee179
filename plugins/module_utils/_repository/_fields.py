# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Reading hostile JSON: every value by type and bounds, every refusal with the place it was found at. Pure."""

from __future__ import annotations

import re
import typing as t

from .._errors import ManifestInvalid
from .names import has_control_characters

MAX_SIZE = 1 << 60  # bytes; far above any image, far below what overflows an off_t
MAX_TEXT = 1 << 16
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MODE = re.compile(r"[0-7]{4}")


def clean(text: str) -> str:
    """A sentence or path from elsewhere as one printable line of bounded length."""
    return "".join(" " if has_control_characters(c) else c for c in text)[: MAX_TEXT // 4]


class Fields:
    """One JSON object of the file ``path``; ``where`` is its place in there, for messages."""

    def __init__(self, data: t.Any, path: str, where: str) -> None:
        self._path = path
        self._where = where
        if not isinstance(data, dict):
            raise ManifestInvalid(path=path, reason=f"{where or 'the whole'} is not an object")
        self._data: dict[str, t.Any] = data

    def wrong(self, key: str, reason: str) -> ManifestInvalid:
        """The error for ``key``, to be raised by the caller."""
        return ManifestInvalid(path=self._path, reason=f"{self._where}{key}: {reason}")

    def _get(self, key: str) -> t.Any:
        if key not in self._data:
            raise self.wrong(key, "it is missing")
        return self._data[key]

    def text(self, key: str, *, empty: bool = False) -> str:
        return self._text(key, self._get(key), empty=empty)

    def _text(self, key: str, value: t.Any, *, empty: bool = False) -> str:
        if not isinstance(value, str) or len(value) > MAX_TEXT or (not value and not empty):
            raise self.wrong(key, "it is not a text of sensible length")
        if has_control_characters(value):
            raise self.wrong(key, "it has control characters")
        return value

    def optional_text(self, key: str) -> str | None:
        value = self._data.get(key)
        return None if value is None else self._text(key, value, empty=True)

    def texts(self, key: str) -> tuple[str, ...]:
        return tuple(self._text(key, value) for value in self._list(key))

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in choices:
            raise self.wrong(key, f"{value!r} is none of {', '.join(choices)}")
        return value

    def matching(self, key: str, test: t.Callable[[str], bool], what: str) -> str:
        value = self.text(key)
        if not test(value):
            raise self.wrong(key, f"{value!r} is not {what}")
        return value

    def optional_matching(self, key: str, test: t.Callable[[str], bool], what: str) -> str | None:
        return None if self._data.get(key) is None else self.matching(key, test, what)

    def sha256(self, key: str) -> str:
        return self.matching(key, lambda text: _SHA256.fullmatch(text) is not None, "a SHA-256 in lower case")

    def optional_sha256(self, key: str) -> str | None:
        return None if self._data.get(key) is None else self.sha256(key)

    def mode(self, key: str) -> int:
        """Permissions written as four octal digits."""
        return int(self.matching(key, lambda text: _MODE.fullmatch(text) is not None, "four octal digits"), 8)

    def integer(self, key: str, lowest: int, highest: int) -> int:
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise self.wrong(key, f"it is not an integer from {lowest} to {highest}")
        return value

    def size(self, key: str) -> int:
        return self.integer(key, 0, MAX_SIZE)

    def boolean(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "it is neither true nor false")
        return value

    def optional_number(self, key: str) -> float | None:
        value = self._data.get(key)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= MAX_SIZE:
            raise self.wrong(key, "it is not a number from 0")
        return value

    def object(self, key: str) -> Fields:
        return Fields(self._get(key), self._path, f"{self._where}{key}.")

    def objects(self, key: str) -> list[Fields]:
        return [Fields(item, self._path, f"{self._where}{key}[{n}].") for n, item in enumerate(self._list(key))]

    def _list(self, key: str) -> list[t.Any]:
        value = self._get(key)
        if not isinstance(value, list):
            raise self.wrong(key, "it is not a list")
        return value
