# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t
from datetime import datetime, timedelta, timezone

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import InputInvalid
from ansible_collections.blockops.qemu.plugins.module_utils._repository import names

MOMENT = datetime(2026, 11, 23, 6, 45, 0, 123456, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("web1", "web1"),
        ("Web_1-a.b", "Web_1-a.b"),
        ("a b", "a%20b"),
        ("a/b", "a%2Fb"),
        ("..", "%2E."),
        (".hidden", "%2Ehidden"),
        ("ä", "%C3%A4"),
        ("100%", "100%25"),
        ("a~b", "a%7Eb"),
        ('"quoted"', "%22quoted%22"),
        ("repository.json", "%72epository.json"),
        ("-o", "-o"),
    ],
)
def test_encode(name: str, encoded: str) -> None:
    assert names.encode_name(name) == encoded
    assert names.decode_name(encoded) == name
    assert names.is_encoded_name(encoded)


def test_long_names_stay_apart() -> None:
    one, two = names.encode_name("x" * 300 + "1"), names.encode_name("x" * 300 + "2")
    assert one != two
    assert len(one) == 177
    assert one.startswith("x" * 160 + "~")
    assert names.decode_name(one) is None
    assert names.is_encoded_name(one)
    assert names.encode_name("x" * 180) == "x" * 180


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "a\x00", "\x85", "\u2028", "\ud800"])
def test_impossible_names(name: str) -> None:
    with pytest.raises(InputInvalid):
        names.encode_name(name)


@pytest.mark.parametrize("text", ["lost+found", ".x", "", "a%2fb", "%41", "%FF", "a b", "x" * 181, "repository.json"])
def test_foreign_names(text: str) -> None:
    assert not names.is_encoded_name(text)


@pytest.mark.parametrize("text", ["disk0.qcow2", "a%20b.qcow2", "x~0123.qcow2", "a..b.qcow2"])
def test_image_file(text: str) -> None:
    assert names.is_image_file(text)


@pytest.mark.parametrize(
    "text", ["", ".qcow2", ".a.qcow2", "a/b.qcow2", "../a.qcow2", "a.raw", "json:{}.qcow2", "a\n.qcow2", "a.qcow2\n"]
)
def test_not_an_image_file(text: str) -> None:
    assert not names.is_image_file(text)


def test_backup_id() -> None:
    assert names.new_backup_id(MOMENT, "1f3c9a2e") == "20261123T054500Z-1f3c9a2e"
    assert names.is_backup_id("20261123T054500Z-1f3c9a2e")
    for text in ("", "20261123T054500Z-1F3C9A2E", "20261123T054500Z-1f3c9a2e\n", "20261123T054500Z", "../x"):
        assert not names.is_backup_id(text)
    with pytest.raises(ValueError):
        names.new_backup_id(MOMENT, "xyz")


def test_timestamp() -> None:
    assert names.timestamp(MOMENT) == "2026-11-23T05:45:00.123456Z"
    assert names.parse_timestamp("2026-11-23T05:45:00.123456Z") == MOMENT
    for text in ("2026-11-23T05:45:00Z", "2026-11-23T05:45:00.123456", "2026-13-23T05:45:00.123456Z", "now"):
        with pytest.raises(ValueError):
            names.parse_timestamp(text)


@pytest.mark.parametrize(
    ("text", "hour", "minute", "second"),
    [
        ("2026-11-23", 0, 0, 0),
        ("2026-11-23T06:00Z", 6, 0, 0),
        ("2026-11-23 06:00:07", 6, 0, 7),
        ("2026-11-23T06:00:00+01:00", 5, 0, 0),
        ("2026-11-23T06:00:00-0130", 7, 30, 0),
    ],
)
def test_moment(text: str, hour: int, minute: int, second: int) -> None:
    assert names.parse_moment(text) == datetime(2026, 11, 23, hour, minute, second, tzinfo=timezone.utc)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "2026-11-23T25:00", "2026-11-23T06:61", "23.11.2026"])
def test_no_moment(text: str) -> None:
    with pytest.raises(InputInvalid):
        names.parse_moment(text)


@pytest.mark.parametrize(
    ("age", "seconds"),
    [(90, 90), ("90", 90), ("45s", 45), ("15m", 900), ("36h", 129600), ("7d", 604800), ("2w", 1209600), (0, 0)],
)
def test_age(age: str | int, seconds: int) -> None:
    assert names.parse_age(age) == seconds


@pytest.mark.parametrize("age", ["", "-1", -1, "1.5h", "1y", "h", "1 h", True, None, 1.5])
def test_no_age(age: t.Any) -> None:
    with pytest.raises(InputInvalid):
        names.parse_age(age)
