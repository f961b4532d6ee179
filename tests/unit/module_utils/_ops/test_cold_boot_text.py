# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Paths and formats exchanged in start-up files of many languages: exactly those, or nothing at all."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._block.startup import parse_startup
from ansible_collections.blockops.qemu.plugins.module_utils._ops.cold_boot_text import Move, Unsure, rewrite

SAME = Move("vda", ("/vms/a.qcow2",), "/vms/a.s1.qcow2", "qcow2", "qcow2")
RAW = Move("vda", ("/vms/a.raw",), "/vms/a.s1.qcow2", "raw", "qcow2")
BACK = Move("vda", ("/vms/a.s1.qcow2",), "/vms/a.raw", "qcow2", "raw")


def node(path: str, driver: str = "qcow2", **more: object) -> str:
    return json.dumps({"driver": driver, "node-name": "n", "file": {"driver": "file", "filename": path}, **more})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("-hda /vms/a.qcow2", "-hda /vms/a.s1.qcow2"),
        ("DISK=/vms/a.qcow2\n", "DISK=/vms/a.s1.qcow2\n"),
        ('DISK="/vms/a.qcow2"\r\n', 'DISK="/vms/a.s1.qcow2"\r\n'),
        ("-drive file=/vms/a.qcow2,if=virtio", "-drive file=/vms/a.s1.qcow2,if=virtio"),
        ("-drive if=virtio,file=/vms/a.qcow2,readonly", "-drive if=virtio,file=/vms/a.s1.qcow2,readonly"),
        ("file=/vms/a.qcow2,$COMMON", "file=/vms/a.s1.qcow2,$COMMON"),
        ("file=/vms/a.qcow2\\\n -m 1", "file=/vms/a.s1.qcow2\\\n -m 1"),
        ("disk: /vms/a.qcow2 # first", "disk: /vms/a.s1.qcow2 # first"),
        ("file=file:/vms/a.qcow2", "file=file:/vms/a.s1.qcow2"),
        ("disks=(/vms/a.qcow2 /vms/b)", "disks=(/vms/a.s1.qcow2 /vms/b)"),
        ("['-hda', '/vms/a.qcow2']", "['-hda', '/vms/a.s1.qcow2']"),
        (node("/vms/a.qcow2"), node("/vms/a.s1.qcow2")),
        (json.dumps([node("/vms/a.qcow2")]), json.dumps([node("/vms/a.s1.qcow2")])),
        ("start() {\n -drive file=/vms/a.qcow2,id=${ID}\n}", "start() {\n -drive file=/vms/a.s1.qcow2,id=${ID}\n}"),
        ("\udcff -hda /vms/a.qcow2 \udc80", "\udcff -hda /vms/a.s1.qcow2 \udc80"),
    ],
)
def test_a_path_is_exchanged_wherever_it_stands(before: str, after: str) -> None:
    assert rewrite(before, [SAME]) == (after, frozenset({"vda"}))
    assert rewrite(after, [SAME]) == (after, frozenset({"vda"}))


@pytest.mark.parametrize(
    "text",
    [
        "/vms/a.qcow2.bak",
        "/srv/vms/a.qcow2",
        "./vms/a.qcow2",
        "/vms/a.qcow2/x",
        "/vms/a.qcow2-old",
        "/vms/a.qcow2_",
        "/vms/a.qcow2é",
        "/vms/a.qcow2\udcc3",
        "file=/vms/a.qcow2,,b",
        "file=/x,,/vms/a.qcow2",
        '"/vms/a.qcow2,b.img"',
        '"/vms/a.qcow2 2"',
        "/vms/a.qcow2\\ 2",
        "$DIR/vms/a.qcow2",
        "${DIR}/vms/a.qcow2",
        "/vms/a.qcow2$N",
        "/vms/a.qcow2${N}",
        "host:/vms/a.qcow2",
        "/vms/a.qcow2*",
        "/vms/b.qcow2",
        "",
    ],
)
def test_a_longer_path_is_another_one(text: str) -> None:
    assert rewrite(text, [SAME]) == (text, frozenset())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("-drive file=/vms/a.raw,format=raw,if=virtio", "-drive file=/vms/a.s1.qcow2,format=qcow2,if=virtio"),
        ("-drive format=raw,file=/vms/a.raw", "-drive format=qcow2,file=/vms/a.s1.qcow2"),
        ('-drive "format=raw,file=/vms/a.raw"', '-drive "format=qcow2,file=/vms/a.s1.qcow2"'),
        ("-drive 'file=/vms/a.raw,format=raw'", "-drive 'file=/vms/a.s1.qcow2,format=qcow2'"),
        ('-drive file="/vms/a.raw",format=raw', '-drive file="/vms/a.s1.qcow2",format=qcow2'),
        (
            "-blockdev driver=raw,file.driver=file,node-name=raw,file.filename=/vms/a.raw",
            "-blockdev driver=qcow2,file.driver=file,node-name=raw,file.filename=/vms/a.s1.qcow2",
        ),
        (
            "-blockdev raw,node-name=n,file.driver=file,file.filename=/vms/a.raw",
            "-blockdev qcow2,node-name=n,file.driver=file,file.filename=/vms/a.s1.qcow2",
        ),
        (
            "driver=throttle,file.driver=raw,file.file.driver=file,file.file.filename=/vms/a.raw",
            "driver=throttle,file.driver=qcow2,file.file.driver=file,file.file.filename=/vms/a.s1.qcow2",
        ),
        (
            "-blockdev driver=file,node-name=f,filename=/vms/a.raw -blockdev driver=raw,node-name=n,file=f",
            "-blockdev driver=file,node-name=f,filename=/vms/a.s1.qcow2 -blockdev driver=qcow2,node-name=n,file=f",
        ),
        (
            """'{"driver":"file","node-name":"f","filename":"/vms/a.raw"}' '{"driver":"raw","file":"f"}'""",
            """'{"driver":"file","node-name":"f","filename":"/vms/a.s1.qcow2"}' '{"driver":"qcow2","file":"f"}'""",
        ),
        (
            """'{"driver":"file","node-name":"f","filename":"/vms/a.raw"}' raw,file=f\n# ,file=f""",
            """'{"driver":"file","node-name":"f","filename":"/vms/a.s1.qcow2"}' qcow2,file=f\n# ,file=f""",
        ),
        (node("/vms/a.raw", "raw"), node("/vms/a.s1.qcow2")),
        (json.dumps([node("/vms/a.raw", "raw")]), json.dumps([node("/vms/a.s1.qcow2")])),
        ("f() {\n" + node("/vms/a.raw", "raw") + "}", "f() {\n" + node("/vms/a.s1.qcow2") + "}"),
        ("-hda /vms/a.raw", "-hda /vms/a.s1.qcow2"),
        ("D=/vms/a.raw,format=raw", "D=/vms/a.s1.qcow2,format=qcow2"),
    ],
)
def test_the_format_goes_with_the_path(before: str, after: str) -> None:
    assert rewrite(before, [RAW]) == (after, frozenset({"vda"}))
    assert rewrite(after, [RAW]) == (after, frozenset({"vda"}))
    if "-hda" not in before:
        assert rewrite(after, [BACK])[0] == before


@pytest.mark.parametrize(
    ("text", "move"),
    [
        ("DISK=/vms/a.raw", RAW),
        ("-drive file=/vms/a.raw,if=virtio", RAW),
        ("-drive file=/vms/a.raw,$COMMON", RAW),
        ("-drive file=/vms/a.raw,format=qcow2", RAW),
        ("-drive file=/vms/a.raw,format=raw,driver=raw", RAW),
        ("-drive file=/vms/a.raw,format=raw,offset=512", RAW),
        ("-drive file=/vms/a.s1.qcow2,format=qcow2,l2-cache-size=1M", BACK),
        ("-hda /vms/a.s1.qcow2", BACK),
        ("-blockdev driver=file,node-name=n,filename=/vms/a.raw", RAW),
        ("driver=file,node-name=f,filename=/vms/a.raw\ndriver=raw,file=f\ndriver=raw,file=f", RAW),
        (node("/vms/a.raw", "vpc"), RAW),
        (node("/vms/a.raw", "raw").replace("n", "$N"), RAW),
        ('{"disk":"/vms/a.raw","format":"raw"}', RAW),
        (node("/vms/a.qcow2", backing=None), SAME),
        (node("/vms/a.qcow2", backing="b"), SAME),
        (json.dumps([node("/vms/a.qcow2", backing="b")]), SAME),
        (node("/vms/a.qcow2").replace('"n"', '$N, "backing": "b"'), SAME),
        ("qcow2,node-name=n,file.filename=/vms/a.qcow2,backing=b", SAME),
        ("file=/vms/a.qcow2,backing.file.filename=/vms/b", SAME),
        ("file=/vms/a.qcow2,encrypt.key-secret=s", SAME),
        ("DISK=/vms/a.qcow2", dataclasses.replace(SAME, explicit_backing=True)),
        (node("/vms/a.qcow2", **{"data-file": "d"}), SAME),
        ("""{"driver":"file","node-name":"f","filename":"/vms/a.qcow2"} {"backing":null,"file":"f"}""", SAME),
        ("filename=/vms/a.qcow2,driver=file,node-name=f\nqcow2,file=f,backing=b", SAME),
    ],
)
def test_what_cannot_be_done_for_sure_is_not_done(text: str, move: Move) -> None:
    with pytest.raises(Unsure):
        rewrite(text, [move])


def test_special_characters_stay_written_as_they_were() -> None:
    move = Move("vda", ("/my vms,x/a.qcow2",), "/my vms,x/b.qcow2", "qcow2", "qcow2")
    for written in ("/my vms,,x/{}.qcow2", "/my\\ vms,x/{}.qcow2", "/my\\ vms,,x/{}.qcow2"):
        assert rewrite(f"file={written.format('a')} ", [move])[0] == f"file={written.format('b')} "
    quoted = Move("vda", ('/a"é/a.qcow2',), '/a"é/b.qcow2', "qcow2", "qcow2")
    for wide in (True, False):
        text = json.dumps({"filename": quoted.old[0]}, ensure_ascii=wide)
        assert rewrite(text, [quoted])[0] == text.replace("a.qcow2", "b.qcow2")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("-drive file=/a,id=x", "-drive file=/b,,c,id=x"),
        ('{"driver":"qcow2","file":{"filename":"/a"}}', '{"driver":"qcow2","file":{"filename":"/b,c"}}'),
        ("DISK=/a", None),
    ],
)
def test_a_new_comma(before: str, after: str | None) -> None:
    move = Move("vda", ("/a",), "/b,c", "qcow2", "qcow2")
    if after is None:
        with pytest.raises(Unsure, match="characters"):
            rewrite(before, [move])
    else:
        assert rewrite(before, [move])[0] == after


def test_a_name_without_a_slash_stands_only_where_a_file_does() -> None:
    move = Move("disk", ("/vms/disk", "disk"), "/vms/s1", "qcow2", "qcow2")
    text = '-drive file=disk,id=disk,serial=disk -hda disk # disk\n{"filename":"disk","node-name":"disk"}'
    after = '-drive file=/vms/s1,id=disk,serial=disk -hda /vms/s1 # disk\n{"filename":"/vms/s1","node-name":"disk"}'
    assert rewrite(text, [move])[0] == after


def test_whichever_image_of_the_drive_is_named() -> None:
    moves = [
        Move("vda", ("/a.raw",), "/a.s2", "raw", "qcow2"),
        Move("vda", ("/a.s1",), "/a.s2", "qcow2", "qcow2"),
    ]
    for before in ("-drive file=/a.raw,format=raw", "-drive file=/a.s1,format=qcow2"):
        assert rewrite(before, moves)[0] == "-drive file=/a.s2,format=qcow2"


def test_two_drives_that_swap_their_images() -> None:
    moves = [Move("vda", ("/a",), "/b", "raw", "qcow2"), Move("vdb", ("/b",), "/a", "qcow2", "raw")]
    before = "exec qemu -drive file=/a,format=raw,id=vda \\\n -drive file=/b,format=qcow2,id=vdb # /a and /b\n"
    after = "exec qemu -drive file=/b,format=qcow2,id=vda \\\n -drive file=/a,format=raw,id=vdb # /b and /a\n"
    assert rewrite(before, moves) == (after, frozenset({"vda", "vdb"}))
    assert rewrite(after, moves) == (after, frozenset({"vda", "vdb"}))
    with pytest.raises(Unsure, match="which is which"):
        rewrite("A=/a\nB=/b\n", moves)
    with pytest.raises(Unsure):
        rewrite(after.replace("file=/b", "file=/a"), moves)


def test_two_drives_of_one_image() -> None:
    moves = [Move("vda", ("/a",), "/b", "raw", "raw"), Move("vdb", ("/a",), "/c", "raw", "raw")]
    with pytest.raises(Unsure, match="as well"):
        rewrite("-hda /a", moves)


def test_comments_are_kept_right_but_start_nothing() -> None:
    before = "# was -drive file=/vms/a.raw, and\nX='/vms/a.raw.old'  # /vms/a.raw\n"
    after = "# was -drive file=/vms/a.s1.qcow2, and\nX='/vms/a.raw.old'  # /vms/a.s1.qcow2\n"
    assert rewrite(before, [RAW]) == (after, frozenset())
    assert rewrite(after, [RAW]) == (after, frozenset())
    with pytest.raises(Unsure):
        rewrite("X='a # /vms/a.raw'", [RAW])


def test_only_what_is_mentioned_counts() -> None:
    moves = [SAME, Move("vdb", ("/vms/b",), "/vms/b1", "qcow2", "qcow2")]
    assert rewrite("-hda /vms/a.qcow2", moves)[1] == {"vda"}
    assert rewrite("-hdb /vms/b1", moves) == ("-hdb /vms/b1", frozenset({"vdb"}))


def _argument(dice: random.Random, number: int, file: str, fmt: str) -> str:
    """One drive in one of the ways to write it, its options in any order."""
    name, comma = f"d{number}", file.replace(",", ",,")
    plain = {"driver": fmt, "node-name": name, "file": {"driver": "file", "filename": file}}
    lists = {
        "-drive ": [f"file={comma}", f"format={fmt}", f"id={name}", "if=none", "cache=none"],
        "-blockdev ": [f"driver={fmt}", f"node-name={name}", f"file.filename={comma}", "file.driver=file"],
    }
    kind = dice.choice([*lists, "json", "apart"])
    if kind in lists:
        dice.shuffle(lists[kind])
        return kind + shlex.quote(",".join(lists[kind]))
    if kind == "apart":
        storage = {"driver": "file", "node-name": f"f{number}", "filename": file}
        parts = [storage, {"driver": fmt, "node-name": name, "file": f"f{number}"}]
        dice.shuffle(parts)
        return " ".join(f"-blockdev {shlex.quote(json.dumps(dict(dice.sample([*p.items()], len(p)))))}" for p in parts)
    text = json.dumps(dict(dice.sample([*plain.items()], len(plain))))
    return "-blockdev " + dice.choice([shlex.quote(text), json.dumps(text)])


@pytest.mark.parametrize("seed", range(200))
def test_exactly_the_moved_drives_start_from_something_else(seed: int) -> None:
    """Judged by what a shell and QEMU's own rules make of the text before and after."""
    dice = random.Random(seed)
    directory = dice.choice(["/vms", "/my vms", "/a,b", "/é"])
    names = [f"{directory}/d{n}{dice.choice(['', '.x', '-d1', '.d2'])}" for n in range(4)]
    disks = [(name, dice.choice(["raw", "qcow2"])) for name in names]
    words = [_argument(dice, number, *disk) for number, disk in enumerate(disks)]
    text = "#!/bin/sh\nexec qemu -m 1 " + dice.choice([" ", " \\\n  "]).join(words) + dice.choice(["\n", " # end\n"])
    chosen = dice.sample(range(4), dice.randint(1, 4))
    new = {n: (f"{disks[n][0]}.s1", dice.choice(["raw", "qcow2"])) for n in chosen}
    moves = [Move(f"d{n}", (disks[n][0],), new[n][0], disks[n][1], new[n][1]) for n in chosen]
    after, mentioned = rewrite(text, moves)
    assert mentioned == {f"d{n}" for n in chosen}

    def images(script: str) -> dict[str, tuple[str, str | None]]:
        found = parse_startup(["", *shlex.split(script, comments=True)[1:]])
        return {image.keys[0]: (image.file, image.format) for image in found if image.keys[0].startswith("d")}

    assert images(text) == {f"d{n}": disk for n, disk in enumerate(disks)}
    assert images(after) == {f"d{n}": new.get(n, disk) for n, disk in enumerate(disks)}
    assert rewrite(after, moves) == (after, mentioned)
    back = [Move(m.drive, (m.new,), m.old[0], m.new_format, m.old_format) for m in moves]
    assert rewrite(after, back)[0] == text
