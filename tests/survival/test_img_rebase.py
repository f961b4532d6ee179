# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qemu_img_rebase: other backing files, none, trimming. qemu-img compare judges."""

from __future__ import annotations

import json
import os
import shutil
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.img_steps import KILLER
from support.module import Result, run_module, start_module
from support.points import KIB, MIB, Drive, disk

SIZE = 16 * MIB
SLOW = bool(os.environ.get("BLOCKOPS_SLOW"))


def rebase(path: Path, *, check: bool = False, **params: t.Any) -> Result:
    return run_module("qemu_img_rebase", {"path": str(path), **params}, check=check, diff=True)


def listing(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def own_clusters(path: Path) -> list[tuple[int, int, bool]]:
    """What the image itself holds: start, length, whether it is zeroes; as qemu-img tells."""
    done = images.run_tool("qemu-img", "map", "-f", "qcow2", "--output=json", path)
    return [
        (entry["start"], entry["length"], entry["zero"])
        for entry in json.loads(done.stdout)
        if entry["depth"] == 0 and entry.get("present", True)
    ]


def raw_of(path: Path, target: Path) -> Path:
    images.run_tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, target)
    return target


def record(overlay: Path, name: str, image: Path) -> None:
    text = {
        "format": 1, "name": name, "drive": "vda", "overlay": str(overlay), "image": str(image),
        "image_format": "qcow2", "created": "2026-11-23T05:45:00Z", "state": "present",
    }  # fmt: skip
    Path(f"{overlay}.snapshot.json").write_text(json.dumps({**text, "consistency": "crash"}))


def recorded(overlay: Path) -> dict[str, t.Any]:
    return dict(json.loads(Path(f"{overlay}.snapshot.json").read_text()))


@pytest.fixture
def chain(workdir: Path) -> list[Path]:
    """base <- s1 <- s2, with things to trim in s2: the same data again, zeroes over data, data that is zeroes."""
    base = images.create(workdir / "base.qcow2", SIZE)
    images.fill(base, [(0, 6 * MIB, 1), (10 * MIB, MIB, 2)])
    first = images.create(workdir / "s1.qcow2", backing=base.name)
    images.fill(first, [(2 * MIB, MIB, 3), (12 * MIB, MIB, 4)])
    second = images.create(workdir / "s2.qcow2", backing=first.name)
    images.fill(second, [(0, MIB, 1), (2 * MIB, MIB, 3), (4 * MIB, MIB, 5), (10 * MIB, MIB, 0), (14 * MIB, MIB, 0)])
    images.run_tool("qemu-io", "-f", "qcow2", "-c", f"write -z {5 * MIB} {MIB}", second)
    images.run_tool("qemu-io", "-f", "qcow2", "-c", f"write -z {15 * MIB} {MIB}", second)
    return [base, first, second]


@pytest.fixture
def old(chain: list[Path], workdir: Path) -> Path:
    """What the guest saw before."""
    return raw_of(chain[-1], workdir / "old.raw")


def expect_same(path: Path, old: Path) -> None:
    assert images.compare(path, old, "qcow2", "raw")
    assert images.info(path)["virtual-size"] == old.stat().st_size
    report = images.check(path)
    assert not report.get("corruptions") and not report.get("leaks"), report


def test_trim(chain: list[Path], old: Path) -> None:
    active = chain[-1]
    active.chmod(0o640)
    os.chown(active, 1234, 2345)
    below = [path.read_bytes() for path in chain[:-1]]
    predicted = rebase(active, trim=True, check=True).ok()
    assert predicted.changed and predicted.data["allocated"] is None
    result = rebase(active, trim=True).ok()
    assert result.changed and result.data["method"] == "build"
    assert result.data["diff"] == predicted.data["diff"]
    # Twice the same data, zeroes where zeroes are below (as data and as zeroes); and zeroes over data that were data.
    assert (result.data["dropped_bytes"], result.data["zeroed_bytes"]) == (4 * MIB, MIB)
    assert result.data["copied_bytes"] == 0
    expect_same(active, old)
    assert own_clusters(active) == [(4 * MIB, MIB, False), (5 * MIB, MIB, True), (10 * MIB, MIB, True)]
    assert active.stat().st_blocks * 512 < result.data["allocated_before"] - 3 * MIB
    assert (active.stat().st_mode & 0o7777, active.stat().st_uid, active.stat().st_gid) == (0o640, 1234, 2345)
    assert [path.read_bytes() for path in chain[:-1]] == below
    again = rebase(active, trim=True).ok()
    assert not again.changed and again.data["dropped_bytes"] == 0
    assert not [name for name in listing(active.parent) if name.startswith(".")]


@pytest.mark.parametrize("backing", ["base.qcow2", "", "s1.qcow2"])
@pytest.mark.parametrize("how", ["build", "trim", "in_place"])
def test_each_backing(chain: list[Path], old: Path, backing: str, how: str) -> None:
    active = chain[-1]
    params: dict[str, t.Any] = {"backing": backing, **({how: True} if how != "build" else {})}
    predicted = rebase(active, check=True, **params).ok()
    result = rebase(active, **params).ok()
    assert predicted.changed == result.changed == (backing != "s1.qcow2" or how == "trim")
    for key in ("dropped_bytes", "zeroed_bytes", "copied_bytes", "method", "backing_file", "diff"):
        assert result.data[key] == predicted.data[key], key
    expect_same(active, old)
    below = {"base.qcow2": [chain[0]], "": [], "s1.qcow2": [chain[1], chain[0]]}[backing]
    assert images.chain(active) == [str(path) for path in [active, *below]]
    assert images.info(active).get("backing-filename") == (backing or None)
    assert [entry["path"] for entry in result.data["chain"]] == images.chain(active)
    again = rebase(active, **params).ok()
    assert not again.changed, again.data


def test_a_new_template_of_another_size(chain: list[Path], old: Path, workdir: Path) -> None:
    """Shorter or longer, with other data everywhere: the guest sees no difference."""
    for size, name in ((8 * MIB, "short"), (32 * MIB, "long")):
        other = images.create(workdir / f"{name}.qcow2", size)
        images.fill(other, [(0, 3 * MIB, 1), (3 * MIB, 5 * MIB, 7)] + ([(16 * MIB, MIB, 9)] if name == "long" else []))
        result = rebase(chain[-1], backing=str(other)).ok()
        assert result.data["backing_file"] == other.name
        expect_same(chain[-1], old)


@pytest.mark.parametrize("options", [{"cluster_size": 4096}, {"cluster_size": 2 * MIB}, {"extended_l2": "on"},
                                     {"compat": "0.10"}, {"compression_type": "zstd"}])  # fmt: skip
def test_kinds_of_images(workdir: Path, options: dict[str, t.Any]) -> None:
    """Also of a size that is no multiple of a cluster, over a raw backing file that ends in between."""
    base = images.create(workdir / "base.raw", 5 * MIB + 512, "raw")
    images.fill(base, [(0, 3 * MIB, 1), (5 * MIB, 512, 2)], "raw")
    active = images.create(workdir / "a.qcow2", 9 * MIB + 1024, backing=base.name, backing_fmt="raw", **options)
    images.fill(active, [(MIB, MIB, 1), (3 * MIB, 8 * KIB, 4), (5 * MIB, 512, 2), (9 * MIB, 1024, 5)])
    old = raw_of(active, workdir / "old.raw")
    held = sum(length for _start, length, _zero in own_clusters(active))
    result = rebase(active, trim=True).ok()
    assert result.changed and result.data["dropped_bytes"] > 0
    assert sum(length for _start, length, _zero in own_clusters(active)) == held - result.data["dropped_bytes"]
    expect_same(active, old)
    before, after = images.info(active), result.data
    assert after["backing_format"] == "raw" and before["cluster-size"] == options.get("cluster_size", 64 * KIB)
    data = before["format-specific"]["data"]
    assert data["compat"] == options.get("compat", "1.1")
    assert data.get("compression-type", "zlib") == options.get("compression_type", "zlib")
    assert not rebase(active, trim=True).ok().changed
    assert rebase(active, backing="").ok().changed
    expect_same(active, old)


@pytest.mark.parametrize("where", ["below", "above", "both"])
def test_compressed(workdir: Path, where: str) -> None:
    """Clusters that lie nowhere as the guest sees them are asked from QEMU."""
    plain = disk(workdir, "plain", SIZE)
    base = workdir / "base.qcow2"
    compress = ["-c"] if where != "above" else []
    images.run_tool("qemu-img", "convert", *compress, "-f", "qcow2", "-O", "qcow2", plain, base)
    active = images.create(workdir / "a.qcow2", backing=base.name)
    flag = "-c " if where != "below" else ""
    images.run_tool(
        "qemu-io", "-f", "qcow2", "-c", f"write {flag}-P 1 0 64k", "-c", f"write {flag}-P 3 64k 64k", active
    )
    old = raw_of(active, workdir / "old.raw")
    assert rebase(active, trim=True).ok().data["dropped_bytes"] == 64 * KIB
    expect_same(active, old)
    assert own_clusters(active) == [(64 * KIB, 64 * KIB, False)]


def test_bitmaps_are_kept_exactly(chain: list[Path], workdir: Path) -> None:
    active, script = chain[-1], []
    for name, options in (("empty", []), ("stopped", ["--disable"]), ("fine", ["-g", "32768"])):
        images.run_tool("qemu-img", "bitmap", "--add", *options, "-f", "qcow2", active, name)
    script += ["-c", f"write -P 6 {7 * MIB} 64k"]
    images.run_tool("qemu-img", "bitmap", "--disable", "-f", "qcow2", active, "empty")
    images.run_tool("qemu-io", "-f", "qcow2", *script, active)
    old, flags = raw_of(active, workdir / "old.raw"), images.bitmaps(active)
    counts = dirty(active)
    result = rebase(active, trim=True, backing="base.qcow2").ok()
    assert sorted(result.data["bitmaps"]) == ["empty", "fine", "stopped"]
    expect_same(active, old)
    assert (images.bitmaps(active), dirty(active)) == (flags, counts)
    assert counts["fine"] == 64 * KIB and counts["stopped"] == counts["empty"] == 0


def dirty(path: Path) -> dict[str, int]:
    """Bytes in each bitmap, as a storage daemon tells."""
    from lab.daemon import StorageDaemon

    node = {"driver": "qcow2", "node-name": "n", "read-only": True, "file": {"driver": "file", "filename": str(path)}}
    with StorageDaemon("bitmaps", path.parent, [node]) as daemon:
        nodes = daemon.command("query-named-block-nodes", flat=True)
        (found,) = [node["dirty-bitmaps"] for node in nodes if node["node-name"] == "n"]
        return {entry["name"]: entry["count"] for entry in found}


def test_internal_snapshots(chain: list[Path]) -> None:
    active = chain[-1]
    images.run_tool("qemu-img", "snapshot", "-c", "inside", active)
    before = active.read_bytes()
    for params in ({"trim": True}, {"backing": "base.qcow2"}, {"backing": "", "in_place": True}):
        for check in (True, False):
            assert rebase(active, check=check, **params).data["error"]["kind"] == "RebaseUnsupported"
    assert active.read_bytes() == before
    chain[1].rename(chain[1].with_name("moved.qcow2"))
    rebase(active, backing="moved.qcow2", unsafe=True, acknowledge="contents_equal").ok()
    assert [entry["name"] for entry in images.info(active)["snapshots"]] == ["inside"]


# -- names only --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
def test_renamed_backing(chain: list[Path], old: Path, in_place: bool) -> None:
    active, moved = chain[-1], chain[1].with_name("moved.qcow2")
    chain[1].rename(moved)
    before = listing(active.parent)
    error = rebase(active, backing="moved.qcow2").data["error"]
    assert error["kind"] == "BackingMissing" and error["backing"] == str(chain[1])
    assert "acknowledge=contents_equal" in error["message"]
    assert rebase(active, backing="moved.qcow2", unsafe=True, proof="compare").data["error"]["kind"] == "BackingMissing"
    assert listing(active.parent) == before
    result = rebase(active, backing="moved.qcow2", unsafe=True, acknowledge="contents_equal", in_place=in_place).ok()
    assert result.changed and result.data["method"] == "header" and result.warnings
    expect_same(active, old)
    assert not rebase(active, backing="moved.qcow2").ok().changed


@pytest.mark.parametrize("in_place", [True, False])
def test_proof(chain: list[Path], old: Path, workdir: Path, in_place: bool) -> None:
    """A flat copy of what is below is the same, until a byte of it changes."""
    active, flat = chain[-1], workdir / "flat.qcow2"
    images.run_tool("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", chain[1], flat)
    options: dict[str, t.Any] = {"backing": "flat.qcow2", "unsafe": True, "proof": "compare", "in_place": in_place}
    images.fill(flat, [(4 * MIB + 512, 512, 9)])  # hidden by the overlay, and still not the same
    for check in (True, False):
        error = rebase(active, check=check, **options).data["error"]
        assert (error["kind"], error["offset"] // MIB) == ("ContentsDiffer", 4)
    images.fill(flat, [(4 * MIB, MIB, 1)])
    result = rebase(active, **options).ok()
    assert result.data["method"] == "header" and result.data["copied_bytes"] == 0
    expect_same(active, old)
    assert not rebase(active, **options).ok().changed


def test_proof_looks_beyond_the_end_of_the_shorter_one(workdir: Path) -> None:
    base, longer = disk(workdir, "base", 4 * MIB), disk(workdir, "longer", 16 * MIB)
    active = images.create(workdir / "a.qcow2", 16 * MIB, backing=base.name)
    images.fill(longer, [(12 * MIB, 512, 1)])
    error = rebase(active, backing="longer.qcow2", unsafe=True, proof="compare").data["error"]
    assert error["kind"] == "ContentsDiffer"


def test_spelling(chain: list[Path], old: Path, workdir: Path) -> None:
    active = chain[-1]
    before = own_clusters(active)
    assert not rebase(active, backing=str(chain[1])).ok().changed  # the same file
    result = rebase(active, backing=str(chain[1]), relative=False).ok()
    assert result.changed and result.data["method"] == "header"
    assert images.info(active)["backing-filename"] == str(chain[1])
    assert not rebase(active, relative=False).ok().changed
    assert rebase(active, relative=True).ok().changed
    assert images.info(active)["backing-filename"] == "s1.qcow2"
    assert own_clusters(active) == before
    expect_same(active, old)


def test_backing_in_another_directory(chain: list[Path], old: Path, workdir: Path) -> None:
    active, templates = chain[-1], workdir.with_name(f"{workdir.name}-templates")
    templates.mkdir()
    try:
        other = disk(templates, "other", SIZE)
        assert rebase(active, backing=str(other)).data["error"]["problem"] == "Outside"
        both = [str(workdir), str(templates)]
        result = rebase(active, backing=str(other), allowed_directories=both).ok()
        assert result.data["backing_file"] == str(other)
        expect_same(active, old)
        assert rebase(active, relative=True, allowed_directories=both).ok().changed
        assert images.info(active)["backing-filename"] == f"../{templates.name}/other.qcow2"
        expect_same(active, old)
    finally:
        shutil.rmtree(templates)


def test_backup(chain: list[Path], old: Path) -> None:
    active = chain[-1]
    before = active.read_bytes()
    result = rebase(active, backing="base.qcow2", backup=True).ok()
    kept = Path(result.data["kept_as"])
    assert kept.name.startswith("s2.qcow2.before-rebase-") and kept.read_bytes() == before
    assert images.compare(kept, old, "qcow2", "raw")
    assert rebase(active, backing="base.qcow2", backup=True).ok().data["kept_as"] is None


# -- records -----------------------------------------------------------------------------------------------------------


def test_records_follow(chain: list[Path], workdir: Path) -> None:
    base, first, active = chain
    record(first, "one", base)
    record(active, "two", first)
    moved = first.with_name("moved.qcow2")
    shutil.copy(first, moved)
    result = rebase(active, backing="moved.qcow2", unsafe=True, proof="compare").ok()
    assert result.data["chain"][0]["snapshot"] == "two"
    assert (recorded(active)["name"], recorded(active)["image"]) == ("two", str(moved))
    record(moved, "one", base)
    for check in (True, False):  # what is below then is the snapshot "one"
        result = rebase(active, backing="base.qcow2", check=check).ok()
        assert result.data["chain"][0]["snapshot"] == "one"
    assert (recorded(active)["name"], recorded(active)["image"]) == ("one", str(base))
    info = run_module("qemu_img_info", {"images": [{"path": str(active)}]}).ok()
    assert info.data["images"][0]["chain"] == result.data["chain"]
    result = rebase(active, backing="").ok()
    assert result.data["chain"][0]["snapshot"] is None
    assert Path(f"{active}.snapshot.json").exists()  # still made by us


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"backing": "base.qcow2", "unsafe": True},
        {"backing": "base.qcow2", "proof": "compare"},
        {"relative": True, "unsafe": True, "acknowledge": "contents_equal"},
        {"backing": "base.qcow2", "unsafe": True, "proof": "compare", "acknowledge": "contents_equal"},
        {"trim": True, "in_place": True},
        {"backing": "base.qcow2", "in_place": True, "backup": True},
        {"trim": True, "backing_format": "raw"},
        {"backing": "s3.qcow2"},
    ],
)
def test_bad_input(chain: list[Path], params: dict[str, t.Any]) -> None:
    images.create(chain[0].with_name("s3.qcow2"), backing=chain[-1].name)
    before = chain[-1].read_bytes()
    assert rebase(chain[-1], **params).data["error"]["kind"] == "InputInvalid"
    assert chain[-1].read_bytes() == before


def test_in_use(chain: list[Path], workdir: Path, qemu_factory: QemuFactory) -> None:
    """The image, or what it is or shall be based on; what is below may be read by others."""
    before = [path.read_bytes() for path in chain]
    vm = qemu_factory("vm", [Drive("vda", chain[-1])])
    for check in (True, False):
        error = rebase(chain[-1], trim=True, check=check).data["error"]
        assert error["kind"] == "ImageInUse" and [holder["pid"] for holder in error["holders"]] == [vm.pid]
    vm.quit()
    assert [path.read_bytes() for path in chain] == before
    other = disk(workdir, "other", SIZE)
    writer = qemu_factory("writer", [Drive("vda", other)])
    error = rebase(chain[-1], backing=str(other)).data["error"]
    assert (error["kind"], error["image"]) == ("ImageInUse", str(other))
    writer.quit()
    clone = images.create(workdir / "clone.qcow2", backing=chain[1].name)
    reader = qemu_factory("reader", [Drive("vda", clone)])
    assert rebase(chain[-1], trim=True).ok().changed
    reader.quit()


def test_hostile(chain: list[Path], workdir: Path) -> None:
    for name in ("nbd:localhost:1", "json:{}", "/etc/passwd"):
        evil = images.create(workdir / "evil.qcow2", SIZE)
        images.run_tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", name, evil)
        assert rebase(evil, trim=True).data["error"]["kind"] == "ImageUnsafe"
        assert rebase(chain[-1], backing="evil.qcow2").data["error"]["kind"] == "ImageUnsafe"


def test_killed_at_every_step(chain: list[Path], old: Path, workdir: Path) -> None:
    """Whatever a kill leaves shows what it showed, and the same task again ends right."""
    pristine = workdir / "pristine"
    pristine.mkdir()
    record(chain[1], "one", chain[0])
    record(chain[2], "two", chain[1])
    for path in [*chain, *(Path(f"{path}.snapshot.json") for path in chain[1:])]:
        shutil.move(path, pristine / path.name)
    images.run_tool("qemu-img", "bitmap", "--add", "-f", "qcow2", pristine / "s2.qcow2", "theirs")
    backings = set()
    for number in range(0, 100, 1 if SLOW else 3):
        site = workdir / f"site{number}"
        shutil.copytree(pristine, site)
        active = site / "s2.qcow2"
        arguments = {"path": str(active), "backing": "base.qcow2", "trim": True, "backup": True}
        killed = start_module("qemu_img_rebase", arguments, prelude=KILLER.format(number=number)).finish()
        if not killed.failed:
            break
        assert killed.rc == -9, killed
        expect_same(active, old)
        backings.add(images.info(active)["backing-filename"])
        rebase(active, backing="base.qcow2", trim=True).ok()
        expect_same(active, old)
        assert images.chain(active) == [str(active), str(site / "base.qcow2")]
        assert recorded(active)["name"] == "one"
        there = {name for name in listing(site) if ".before-rebase-" not in name}
        assert there == set(listing(pristine)), there
        shutil.rmtree(site)
    else:
        raise AssertionError("it never came to its end")
    assert number > 10
    assert backings == {"s1.qcow2", "base.qcow2"} or not SLOW


def test_no_space(chain: list[Path], workdir: Path) -> None:
    """Files that grow no more stand for a full disk: nothing happened, and nothing is left."""
    before, content = listing(workdir), chain[-1].read_bytes()
    for limit in (100, 400 << 10, 3 << 20):
        prelude = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        arguments = {"path": str(chain[-1]), "backing": ""}
        result = start_module("qemu_img_rebase", arguments, prelude=prelude).finish()
        assert result.data["error"]["kind"] in ("ImageToolFailed", "FileFailed", "SpaceExhausted"), result
        assert "Traceback" not in result.stderr
        assert listing(workdir) == before
        assert chain[-1].read_bytes() == content


def test_a_killed_module_leaves_no_server(chain: list[Path]) -> None:
    """Killed while qemu-nbd writes: it is gone too, and its lock with it."""
    arguments = {"path": str(chain[-1]), "backing": ""}
    prelude = KILLER.format(number=3)  # the server runs, and nothing is written yet
    assert start_module("qemu_img_rebase", arguments, prelude=prelude).finish().rc == -9
    (left,) = [path for path in chain[-1].parent.iterdir() if path.name.startswith(".s2.qcow2")]
    for _try in range(100):
        if run_module("qemu_img_info", {"images": [{"path": str(left)}]}).data["images"][0]["in_use"] is False:
            break
    else:
        raise AssertionError("a server is left")
    assert rebase(chain[-1], trim=True).ok().data["recovered"]
