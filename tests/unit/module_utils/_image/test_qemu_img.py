# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import asyncio
import os
import subprocess
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import ImageInUse, ImageToolFailed, ImageToolMissing
from ansible_collections.blockops.qemu.plugins.module_utils._image import qemu_img
from ansible_collections.blockops.qemu.plugins.module_utils._image.qemu_img import Image
from support.fabricate import identical, tool

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a,b:c.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, "16M")
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 3M", path)
    return path


def new(path: Path) -> str:
    path.touch()
    return str(path)


def test_info_and_check(image: Path) -> None:
    assert asyncio.run(qemu_img.info(str(image)))["virtual-size"] == 16 * MIB
    assert asyncio.run(qemu_img.check(str(image)))["check-errors"] == 0


def test_check_does_not_open_what_lies_below(image: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    asyncio.run(qemu_img.create(str(overlay), "qcow2", backing=Image(str(image), "qcow2")))
    image.unlink()
    assert asyncio.run(qemu_img.check(str(overlay)))["check-errors"] == 0


def test_check_of_a_damaged_image(image: Path) -> None:
    with image.open("r+b") as stream:
        stream.seek(4 << 16)
        stream.write(b"\xff" * 65536)
    with pytest.raises(ImageToolFailed) as caught:
        asyncio.run(qemu_img.check(str(image)))
    assert caught.value.data["image"] == str(image)


@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
def test_convert_compare_measure(image: Path, tmp_path: Path, target_format: str) -> None:
    target = new(tmp_path / "json:{},x")
    source = Image(str(image), "qcow2")
    asyncio.run(qemu_img.convert(source, target, target_format))
    assert identical(image, "qcow2", Path(target), target_format)
    assert os.stat(target).st_blocks * 512 < 5 * MIB
    assert asyncio.run(qemu_img.compare(source, Image(target, target_format)))
    tool("qemu-io", "-f", target_format, "-c", "write -P 6 15M 512", f"file:{target}")
    assert not asyncio.run(qemu_img.compare(source, Image(target, target_format)))
    assert 3 * MIB < asyncio.run(qemu_img.measure(source, "qcow2")) < 5 * MIB
    assert asyncio.run(qemu_img.measure(source, "qcow2", {"preallocation": "falloc"})) > 16 * MIB


def test_another_backing_than_the_header_names(image: Path, tmp_path: Path) -> None:
    top = tmp_path / "top"
    asyncio.run(qemu_img.create(str(top), "qcow2", 16 * MIB))
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", top)
    target = new(tmp_path / "target")
    asyncio.run(qemu_img.convert(Image(str(top), "qcow2", Image(str(image), "qcow2")), target, "qcow2"))
    tool("qemu-io", "-f", "qcow2", "-c", "read -P 7 0 64k", "-c", "read -P 5 1M 3M", "-c", "read -P 0 4M 12M", target)


def test_create_with_backing(image: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    asyncio.run(qemu_img.create(str(overlay), "qcow2", backing=Image(str(image), "qcow2")))
    assert identical(overlay, "qcow2", image, "qcow2")


def test_relative_and_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-f", "nbd:x", "json:{}"):
        asyncio.run(qemu_img.create(name, "qcow2", MIB, options={"cluster_size": "4096"}))
        assert asyncio.run(qemu_img.info(name))["cluster-size"] == 4096
    assert sorted(os.listdir(tmp_path)) == ["-f", "json:{}", "nbd:x"]


def test_in_use(image: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        if holder.stdout is None:
            raise RuntimeError
        holder.stdout.read(len("qemu-io> "))
        assert qemu_img.open_for_writing(str(image))
        calls: list[t.Callable[[], t.Coroutine[t.Any, t.Any, t.Any]]] = [
            lambda: qemu_img.info(str(image)),
            lambda: qemu_img.check(str(image)),
            lambda: qemu_img.convert(Image(str(image), "qcow2"), new(tmp_path / "t"), "raw"),
            lambda: qemu_img.compare(Image(str(image), "qcow2"), Image(str(image), "qcow2")),
        ]
        for call in calls:
            with pytest.raises(ImageInUse) as caught:
                asyncio.run(call())
            assert caught.value.data["image"] == str(image)
    finally:
        holder.kill()
        holder.communicate()
    assert not qemu_img.open_for_writing(str(image))
    assert not qemu_img.in_use(str(image))


def test_readers_do_not_count_as_in_use(image: Path) -> None:
    holder = subprocess.Popen(
        ["qemu-io", "-r", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        if holder.stdout is None:
            raise RuntimeError
        holder.stdout.read(len("qemu-io> "))
        assert not qemu_img.open_for_writing(str(image))
        assert qemu_img.in_use(str(image))
        assert asyncio.run(qemu_img.info(str(image)))
    finally:
        holder.kill()
        holder.communicate()


def test_failures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageToolFailed) as caught:
        asyncio.run(qemu_img.info(str(tmp_path / "missing")))
    assert "No such file" in caught.value.data["said"]
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ImageToolMissing):
        asyncio.run(qemu_img.info("x"))


def test_cancelling_ends_the_child(image: Path, tmp_path: Path) -> None:
    fake = tmp_path / "qemu-img"
    fake.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    fake.chmod(0o755)

    async def body() -> None:
        os.environ["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        task = asyncio.ensure_future(qemu_img.info(str(image)))
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    path = os.environ["PATH"]
    began = time.monotonic()
    try:
        asyncio.run(body())
    finally:
        os.environ["PATH"] = path
    assert time.monotonic() - began < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
