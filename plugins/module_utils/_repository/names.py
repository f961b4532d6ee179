# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Names, ids and times as docs/repository_format.md spells them. Pure: no clock, no randomness, no file system."""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from datetime import date, datetime, timedelta, timezone

from .._errors import InputInvalid

MANIFEST = "manifest.json"
INTENT = "intent.json"
IDENTITY = "repository.json"
LOCK = "lock"
DEFINITION = "definition"
IMAGE_SUFFIX = ".qcow2"

_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.")
_LONGEST = 180  # bytes: with the suffix, the dot and ".partial" well below the 255 of every file system
_CUT = 160
_BACKUP_ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")
_REPOSITORY_ID = re.compile(r"[0-9a-f]{8}")
_ENCODED = re.compile(r"(?:[A-Za-z0-9_-]|%[0-9A-F]{2})(?:[A-Za-z0-9_.-]|%[0-9A-F]{2}){0,179}")
_SHORTENED = re.compile(r"[A-Za-z0-9_%-][A-Za-z0-9_.%-]{159}~[0-9a-f]{16}")
_FILE = re.compile(r"[A-Za-z0-9_%~-][A-Za-z0-9_.%~-]{0,199}")
_TIMESTAMP = "%Y-%m-%dT%H:%M:%S.%fZ"
_TIMESTAMP_SHAPE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_MOMENT = re.compile(
    r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ](?P<clock>[0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,6})?)?)(?P<zone>Z|[+-][0-9]{2}:?[0-9]{2})?)?"
)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
_AGE = re.compile(r"([0-9]{1,12})([smhdw]?)")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def has_control_characters(text: str) -> bool:
    """True for characters that would let a name break a line, a log or a terminal (and for lone surrogates)."""
    return _CONTROL.search(text) is not None


def encode_name(name: str) -> str:
    """The file name of a VM or drive: percent-encoded, never hidden, at most 180 bytes, never ``repository.json``.

    :raise InputInvalid: the name is empty or has control characters.
    """
    if not name or has_control_characters(name):
        raise InputInvalid(
            message=f"{name!r} cannot be the name of a VM or drive: it is empty or has control characters."
        )
    raw = name.encode("utf-8")
    text = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in raw)
    if text[0] == "." or text == IDENTITY:
        text = f"%{ord(text[0]):02X}{text[1:]}"
    if len(text) > _LONGEST:
        text = f"{text[:_CUT]}~{hashlib.sha256(raw).hexdigest()[:16]}"
    return text


def decode_name(encoded: str) -> str | None:
    """The name that encodes to ``encoded``; ``None`` for a shortened one (its manifests know) and for foreign names."""
    if _ENCODED.fullmatch(encoded) is None:
        return None
    try:
        name = urllib.parse.unquote(encoded, errors="strict")
        return name if encode_name(name) == encoded else None
    except (UnicodeDecodeError, InputInvalid):
        return None


def is_encoded_name(text: str) -> bool:
    """True for what ``encode_name`` can have made; ``lost+found`` and the like are not ours."""
    return _SHORTENED.fullmatch(text) is not None or decode_name(text) is not None


def image_file(drive: str) -> str:
    """The file name of a drive's image inside a backup."""
    return encode_name(drive) + IMAGE_SUFFIX


def is_image_file(text: str) -> bool:
    """Rule 3: a plain name that cannot leave its directory nor stand for another of a backup's files."""
    return _FILE.fullmatch(text) is not None and text.endswith(IMAGE_SUFFIX) and text != IMAGE_SUFFIX


def new_backup_id(now: datetime, random_hex: str) -> str:
    """The id of a backup that begins at ``now`` (aware); ``random_hex`` is eight random hexadecimal digits."""
    backup_id = f"{now.astimezone(timezone.utc):%Y%m%dT%H%M%SZ}-{random_hex}"
    if not is_backup_id(backup_id):
        raise ValueError(f"not eight hexadecimal digits: {random_hex!r}")
    return backup_id


def is_backup_id(text: str) -> bool:
    return _BACKUP_ID.fullmatch(text) is not None


def is_repository_id(text: str) -> bool:
    return _REPOSITORY_ID.fullmatch(text) is not None


def timestamp(moment: datetime) -> str:
    """An aware ``moment`` as manifests spell it: UTC, microseconds, ``Z``."""
    return moment.astimezone(timezone.utc).strftime(_TIMESTAMP)


def parse_timestamp(text: str) -> datetime:
    """The inverse of :func:`timestamp`.

    :raise ValueError: any other shape (manifests have exactly this one).
    """
    if _TIMESTAMP_SHAPE.fullmatch(text) is None:
        raise ValueError(f"not a time stamp: {text!r}")
    return datetime.strptime(text, _TIMESTAMP).replace(tzinfo=timezone.utc)


def parse_moment(text: str) -> datetime:
    """A time as people write it: ``2026-11-23``, ``2026-11-23T06:00Z``, ``2026-11-23 06:00:00+01:00``; UTC if unsaid.

    :raise InputInvalid: it is none of these.
    """
    found = _MOMENT.fullmatch(text.strip())
    if found is None:
        raise InputInvalid(
            message=f"{text!r} is not a time: write 2026-11-23, or 2026-11-23T06:00:00Z (or with +01:00)."
        )
    try:
        day = date.fromisoformat(found["date"])
        moment = datetime(day.year, day.month, day.day, tzinfo=_zone(found["zone"]))
        return moment + _clock(found["clock"])
    except (ValueError, OverflowError) as exc:
        raise InputInvalid(message=f"{text!r} is not a time: {exc}.") from exc


def _clock(text: str | None) -> timedelta:
    hours, minutes, seconds = ((text or "00:00") + ":0").split(":")[:3]
    if int(hours) > 23 or int(minutes) > 59 or float(seconds) >= 60:
        raise ValueError(f"no such time of day: {text}")
    return timedelta(hours=int(hours), minutes=int(minutes), seconds=float(seconds))


def _zone(text: str | None) -> timezone:
    if text is None or text == "Z":
        return timezone.utc
    offset = timedelta(hours=int(text[1:3]), minutes=int(text[-2:]))
    return timezone(-offset if text[0] == "-" else offset)


def parse_age(age: str | int) -> int:
    """Seconds of an age: ``90`` or ``"90"`` (seconds), ``"15m"``, ``"36h"``, ``"7d"``, ``"2w"``.

    :raise InputInvalid: anything else.
    """
    found = _AGE.fullmatch(str(age).strip()) if isinstance(age, (str, int)) and not isinstance(age, bool) else None
    if found is None:
        raise InputInvalid(
            message=f"{age!r} is not an age: write seconds, or a number with s, m, h, d or w, such as 36h."
        )
    return int(found[1]) * _UNITS[found[2]]
