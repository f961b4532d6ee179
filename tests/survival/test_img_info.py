# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qemu_img_info on sound images, images in use, and images made to harm whoever opens them."""

from __future__ import annotations

import json
import os
import subprocess
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.module import Result, run_module
from support.points import MIB, Drive, disk

KEYS = {
    "path", "format", "virtual_size", "allocated", "cluster_size", "compat", "encrypted", "dirty", "corrupt", "chain",
    "snapshots", "bitmaps", "problems", "in_use", "open_for_writing", "holders", "check", "check_skipped",
}  # fmt: skip


def info(*paths: Path | str, **params: t.Any) -> Result:
    return run_module("qemu_img_info", {"images": [{"path": str(path)} for path in paths], **params})


def one(path: Path, **params: t.Any) -> dict[str, t.Any]:
    (answer,) = info(path, **params).ok().data["images"]
    assert set(answer) == KEYS
    return dict(answer)


@pytest.fixture
def watched(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A qemu-img that writes down how it is called, in front of the real one."""
    log, directory = workdir / "calls", workdir / "bin"
    directory.mkdir()
    script = directory / "qemu-img"
    real = subprocess.run(["which", "qemu-img"], capture_output=True, text=True, check=True).stdout.strip()
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {real} "$@"\n')
    script.chmod(0o755)
    log.touch()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return log


def test_a_chain_with_everything(workdir: Path) -> None:
    base = disk(workdir, "base", 8 * MIB)
    top = images.create(workdir / "top.qcow2", backing="base.qcow2")
    text = {
        "format": 1, "name": "pre-patch", "drive": "vda", "overlay": str(top), "image": str(base),
        "image_format": "qcow2", "created": "2026-11-23T05:45:00Z", "state": "present", "consistency": "crash",
    }  # fmt: skip
    Path(f"{top}.snapshot.json").write_text(json.dumps(text))
    images.run_tool("qemu-img", "snapshot", "-c", "s1", top)
    images.run_tool("qemu-img", "bitmap", "--add", "-g", "128k", top, "b1")
    images.run_tool("qemu-img", "bitmap", "--add", "--disable", top, "b2")
    found = one(top, check=True)
    truth = images.info(top)
    assert (found["format"], found["compat"], found["encrypted"], found["dirty"]) == ("qcow2", "1.1", False, False)
    assert (found["virtual_size"], found["cluster_size"]) == (truth["virtual-size"], truth["cluster-size"])
    assert [link["path"] for link in found["chain"]] == images.chain(top)
    assert [link["snapshot"] for link in found["chain"]] == ["pre-patch", None]
    assert (found["chain"][0]["backing_file"], found["chain"][0]["backing_format"]) == ("base.qcow2", "qcow2")
    (snapshot,) = found["snapshots"]
    assert (snapshot["id"], snapshot["name"], snapshot["vm_state_size"]) == ("1", "s1", 0)
    assert snapshot["date"].startswith("20") and snapshot["date"].endswith("Z")
    assert found["bitmaps"] == [
        {"name": "b1", "granularity": 131072, "recording": True, "inconsistent": False},
        {"name": "b2", "granularity": 65536, "recording": False, "inconsistent": False},
    ]
    assert found["check"] == {"corruptions": 0, "leaks": 0, "errors": 0, "sound": True}
    assert (found["in_use"], found["open_for_writing"], found["holders"]) == (False, False, [])


def test_raw_and_order_and_one_that_fails(workdir: Path) -> None:
    raw = disk(workdir, "raw", 8 * MIB, "raw")
    entries = [{"path": str(raw), "format": "raw"}, {"path": str(workdir / "missing")}, {"path": str(raw)}]
    result = run_module("qemu_img_info", {"images": entries, "check": True})
    assert result.data["error"]["kind"] == "ImagesFailed"
    first, second, third = result.data["images"]
    assert first["virtual_size"] == 8 * MIB and "raw" in first["check_skipped"] and "error" not in first
    assert second["problems"][0]["kind"] == "Unreadable" and second["error"]["kind"] == "ImageUnsafe"
    assert third["problems"][0]["kind"] == "FormatUnknown"


def test_in_use(workdir: Path, qemu_factory: QemuFactory) -> None:
    image = disk(workdir, "vda")
    vm = qemu_factory("vm", [Drive("vda", image)])
    node = vm.active_node("vda")
    vm.command("block-dirty-bitmap-add", node=node, name="b1", persistent=True)
    found = one(image, check=True)
    assert found["in_use"] and found["open_for_writing"]
    assert [holder["pid"] for holder in found["holders"]] == [vm.pid]
    assert found["holders"][0]["command"].startswith("qemu")
    assert found["check"] is None and "writing" in found["check_skipped"]
    vm.quit()
    assert one(image)["bitmaps"][0]["inconsistent"] is False
    vm.start()
    assert one(image)["bitmaps"][0]["inconsistent"] is False
    vm.kill9()
    found = one(image)
    assert found["bitmaps"][0]["inconsistent"] is True and not found["in_use"]


def test_damage_is_reported(workdir: Path) -> None:
    image = disk(workdir, "vda")
    with image.open("r+b") as stream:
        stream.seek(4 << 16)
        stream.write(b"\xff" * 65536)
    found = one(image, check=True)["check"]
    assert not found["sound"] and found["corruptions"] + found["errors"] > 0


def secret(directory: Path) -> Path:
    path = directory / "secret"
    path.write_bytes(b"secret" * 1000)
    return path


@pytest.mark.parametrize(
    ("backing", "fmt", "kind"),
    [
        ("{secret}", "raw", "Outside"),
        ("../secret", "raw", "Outside"),
        ('json:{{"driver":"file","filename":"{secret}"}}', "raw", "BackingNotFile"),
        ("nbd+unix:///x?socket={secret}.socket", "raw", "BackingNotFile"),
        ("http://127.0.0.1:1/x", "raw", "BackingNotFile"),
        ("/dev/zero", "raw", "Outside"),
        ("top.qcow2", "qcow2", "Loop"),
        ("link", "raw", "Outside"),
    ],
)
def test_hostile_chains_never_reach_qemu_img(workdir: Path, watched: Path, backing: str, fmt: str, kind: str) -> None:
    directory = workdir / "incoming"
    directory.mkdir()
    (directory / "link").symlink_to(secret(workdir))
    top = directory / "top.qcow2"
    name = backing.format(secret=workdir / "secret")
    images.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", fmt, top, "1M")
    middle = images.create(directory / "middle.qcow2", "1M")
    images.run_tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", middle)
    watched.write_text("")
    for image in (top, middle):  # also below a plain overlay
        result = info(image, check=True)
        assert result.data["error"]["kind"] == "ImageUnsafe"
        (answer,) = result.data["images"]
        assert set(answer) == KEYS | {"error"}
        assert [problem["kind"] for problem in answer["problems"]] == [kind]
        assert answer["problems"][0]["path"] in result.msg
    assert watched.read_text() == ""


def test_absurd_sizes_and_depths(workdir: Path, watched: Path) -> None:
    huge = images.create(workdir / "huge.qcow2", "1P")
    chain = [images.create(workdir / "0.qcow2", "1M")]
    for number in range(1, 5):
        chain.append(images.create(workdir / f"{number}.qcow2", backing=chain[-1].name))
    watched.write_text("")
    assert info(huge).data["images"][0]["problems"][0]["kind"] == "TooLarge"
    assert info(chain[-1], max_depth=4).data["images"][0]["problems"][0]["kind"] == "TooDeep"
    assert watched.read_text() == ""
    assert one(huge, max_virtual_size="2P")["virtual_size"] == 1 << 50
    assert len(one(chain[-1], max_depth=5)["chain"]) == 5


def test_qemu_img_that_never_ends_or_eats_memory(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = disk(workdir, "vda")
    fake = workdir / "bin" / "qemu-img"
    fake.parent.mkdir()
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    for text in ("exec sleep 60", "exec python3 -c 'while True: pass'"):
        fake.write_text(f"#!/bin/sh\n{text}\n")
        fake.chmod(0o755)
        error = info(image, timeout=1).data["error"]
        assert error["kind"] == "ImageToolFailed" and "1 s" in error["message"]
    fake.write_text("#!/bin/sh\nsleep 1\nexec python3 -c 'print(len(bytearray(5 << 30)))'\n")
    error = info(image).data["error"]
    assert error["kind"] == "ImageToolFailed" and "Memory" in error["message"]


@pytest.mark.parametrize(
    "params", [{"timeout": 0}, {"max_depth": 0}, {"max_virtual_size": "0"}, {"allowed_directories": ["vms"]}]
)
def test_bad_input(workdir: Path, params: dict[str, t.Any]) -> None:
    assert info(workdir / "x", **params).data["error"]["kind"] == "InputInvalid"
