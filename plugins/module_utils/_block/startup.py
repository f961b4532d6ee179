# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Which image each drive was started with, read from the command line of a QEMU. Pure.

It follows QEMU's own rules: -drive lists, where a doubled comma stands for one, -blockdev in JSON and in dotted keys,
the names QEMU gives to drives without an id, and devices that point at either.
"""

from __future__ import annotations

import json
import posixpath
import re
import typing as t
from dataclasses import dataclass

from .graph import FILTERS, Drive

_Node = dict[str, t.Any]

# Options without a value. All others take one, which may look like anything.
_FLAGS = frozenset({
    "h", "help", "version", "S", "s", "snapshot", "daemonize", "enable-kvm", "nographic", "nodefaults",
    "no-reboot", "no-shutdown", "full-screen", "alt-grab", "ctrl-grab", "no-quit", "win2k-hack", "no-fd-bootchk",
    "no-acpi", "no-hpet", "singlestep", "only-migratable", "no-user-config", "nouserconfig", "usb", "preconfig",
    "rtc-td-hack", "xen-attach", "xen-domid-restrict", "mem-prealloc", "enable-sync-profile", "old-param",
    "portrait", "semihosting", "perfmap", "jitdump", "enable-fips", "sdl", "curses", "no-frame", "no-kvm",
})  # fmt: skip
# Shortcuts for -drive: what they add to the file.
_SHORT = {
    **{f"hd{letter}": {"index": str(number)} for number, letter in enumerate("abcd")},
    "cdrom": {"index": "2", "media": "cdrom"},
    "fda": {"if": "floppy", "index": "0"},
    "fdb": {"if": "floppy", "index": "1"},
    "pflash": {"if": "pflash"},
    "sd": {"if": "sd"},
    "mtdblock": {"if": "mtd"},
}
_NOT_FOLLOWED = {
    "readconfig": "options were read from the file {value}",
    "set": "an option was changed with -set {value}",
}
_PROTOCOL = re.compile(r"[^/]*:")  # QEMU: a colon before the first slash names a protocol
_POINTERS = ("file", "backing")


@dataclass(frozen=True)
class StartupImage:
    """An image of the command line. ``file`` is absolute where it is a path, ``spelled`` as it is written there.

    ``qdev``, ``device`` and ``nodes`` are what the drive may be called: the id of its device, of its -drive (given or
    made by QEMU), of its nodes. ``explicit_backing``: its node names its backing image itself, so another file in its
    place would be cut off from its own chain. ``temporary``: QEMU put an overlay of its own above (snapshot=on).
    """

    file: str
    spelled: str
    format: str | None
    qdev: str | None = None
    device: str | None = None
    nodes: tuple[str, ...] = ()
    explicit_backing: bool = False
    temporary: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for key in (self.qdev, self.device, *self.nodes) if key)


@dataclass
class _Found:
    """What reading the arguments one after the other gathers."""

    directory: str | None
    drives: list[dict[str, str]]
    nodes: list[_Node]
    devices: dict[str, str]
    machine: str = ""
    snapshot: bool = False


def parse_startup(argv: t.Sequence[str], directory: str | None = None) -> tuple[StartupImage, ...]:
    """The images of a command line (``argv[0]`` is the program), those of -blockdev first, as QEMU opens them.

    ``directory`` is QEMU's working directory.
    """
    found = _Found(directory, [], [], {})
    for name, value in option_pairs(argv):
        _take(found, name, value)
    return (*_blockdevs(found), *_drives(found))


def startup_gaps(argv: t.Sequence[str]) -> tuple[str, ...]:
    """Why the command line does not show all that was given, as sentences without a full stop."""
    options = list(option_pairs(argv))
    gaps = [_NOT_FOLLOWED[name].format(value=value) for name, value in options if name in _NOT_FOLLOWED]
    # QEMU goes to / then, after it has opened what is relative (measured: it goes on to report the relative name).
    if ("daemonize", "") in options:
        relative = [image.spelled for image in parse_startup(argv) if not image.file.startswith("/")]
        gaps += [f"{file} is relative to a directory that -daemonize left" for file in relative if ":" not in file]
    return tuple(gaps)


def started_with(drive: Drive, images: t.Sequence[StartupImage]) -> StartupImage | None:
    """The image that the drive was started with, by the names of its device, its -drive, and its nodes."""
    parts = (drive.qdev or "").split("/")
    devices = {drive.qdev, parts[3] if len(parts) > 3 and parts[1:3] == ["machine", "peripheral"] else None} - {None}
    for image in images:
        if image.qdev in devices or (drive.device and image.device == drive.device):
            return image
    # A device without an id: one of the nodes below was there from the start.
    for node in (*drive.filters, *(layer.node for layer in drive.layers)):
        for image in images:
            if node in image.nodes:
                return image
    return None


def looks_like_qemu(argv: t.Sequence[str]) -> bool:
    """Whether this is the command line of a QEMU, and not of whoever made the socket for it (systemd, a manager)."""
    telling = {"blockdev", "chardev", "device", "drive", "hda", "machine", "M", "mon", "qmp", "readconfig"}
    return any(part.startswith("-") and part.lstrip("-").partition("=")[0] in telling for part in argv[1:])


def option_pairs(argv: t.Sequence[str]) -> t.Iterator[tuple[str, str]]:
    """Options with their values. What is no option is the image of the first disk, as for -hda."""
    rest = iter(argv[1:])
    for argument in rest:
        if not argument.startswith("-") or argument == "-":
            yield "hda", argument
            continue
        name = argument[2:] if argument.startswith("--") else argument[1:]
        if "=" in name and argument.startswith("--"):  # qemu-storage-daemon reads options as getopt_long does
            name, _sign, value = name.partition("=")
            yield name, value
        else:
            yield name, "" if name in _FLAGS else next(rest, "")


def _take(found: _Found, name: str, value: str) -> None:
    if name == "drive":
        found.drives.append(split_options(value))
    elif name in _SHORT:
        found.drives.append({"file": value, **_SHORT[name]})
    elif name == "blockdev":
        found.nodes.append(_structure(value, "driver"))
    elif name == "device":
        device = _structure(value, "driver")
        if isinstance(device.get("drive"), str):
            found.devices.setdefault(device["drive"], str(device.get("id") or ""))
    elif name in ("machine", "M"):
        machine = _structure(value, "type")
        found.machine = str(machine.get("type") or found.machine)
        for key, node in machine.items():
            if key.startswith("pflash") and isinstance(node, str):
                found.devices.setdefault(node, "")
    elif name == "snapshot":
        found.snapshot = True


def split_options(text: str, implied: str | None = None) -> dict[str, str]:
    """``a=1,b=2,,3`` as QEMU reads it; the first one may leave out its key, which then is ``implied``."""
    options: dict[str, str] = {}
    for number, part in enumerate(_split_commas(text)):
        key, sign, value = part.partition("=")
        if not sign and number == 0 and implied is not None:
            key, value = implied, part
        elif not sign:
            key, value = part, "on"
        options[key] = value.replace(",,", ",")
    return options


def _split_commas(text: str) -> list[str]:
    """At single commas; doubled ones stay."""
    return [part.replace("\0", ",,") for part in text.replace(",,", "\0").split(",") if part]


def _structure(text: str, implied: str) -> _Node:
    """A value in JSON, or in dotted keys: ``file.driver=file`` is a driver inside of ``file``."""
    if text.startswith("{"):
        try:
            parsed = json.loads(text)
        except ValueError:
            return {}
        return parsed if isinstance(parsed, dict) else {}
    return _nested(split_options(text, implied))


def _nested(options: t.Mapping[str, str]) -> _Node:
    root: _Node = {}
    for dotted, value in options.items():
        *parents, last = dotted.split(".")
        place = root
        for parent in parents:
            below = place.setdefault(parent, {})
            if not isinstance(below, dict):
                below = place[parent] = {}
            place = below
        place[last] = value
    return root


def _blockdevs(found: _Found) -> t.Iterator[StartupImage]:
    """One image for each node that no other node stands on."""
    named = {node["node-name"]: node for node in found.nodes if isinstance(node.get("node-name"), str)}
    below = {node[key] for node in _all_nodes(found.nodes) for key in _POINTERS if isinstance(node.get(key), str)}
    for name, node in named.items():
        if name in below and name not in found.devices:
            continue
        image = _image_of(node, named, found.directory)
        if image is not None:
            nodes = tuple(part["node-name"] for part in _upper(node, named) if isinstance(part.get("node-name"), str))
            yield StartupImage(
                **image,
                qdev=found.devices.get(name) or None,
                nodes=nodes,
                explicit_backing="backing" in _upper(node, named)[-1],
            )


def _all_nodes(nodes: t.Iterable[_Node]) -> t.Iterator[_Node]:
    for node in nodes:
        yield node
        yield from _all_nodes(node[key] for key in _POINTERS if isinstance(node.get(key), dict))


def _upper(node: _Node, named: t.Mapping[str, _Node]) -> list[_Node]:
    """The node, what it filters, and so on down to the image, which is the last."""
    parts = [node]
    while parts[-1].get("driver") in FILTERS and len(parts) <= len(named) + 1:
        below = _child(parts[-1], named)
        if below is None:
            break
        parts.append(below)
    return parts


def _child(node: _Node, named: t.Mapping[str, _Node]) -> _Node | None:
    for key in ("file", "image"):
        child = node.get(key)
        if isinstance(child, str):
            child = named.get(child)
        if isinstance(child, dict):
            return child
    return None


def _image_of(node: _Node, named: t.Mapping[str, _Node], directory: str | None) -> dict[str, t.Any] | None:
    """File, spelling and format of what the node reads; ``None`` when that is not a file (nbd, null-co)."""
    image = _upper(node, named)[-1]
    storage = _child(image, named) or image
    spelled = storage.get("filename")
    if not isinstance(spelled, str):
        return None
    driver = image.get("driver")
    return {"file": absolute(spelled, directory), "spelled": spelled, "format": str(driver) if driver else None}


def absolute(file: str, directory: str | None) -> str:
    """A path as the block graph tells it; what names a protocol (``nbd:``, ``json:``) stays as it is."""
    if file.startswith("file:"):
        file = file[len("file:") :]
    elif _PROTOCOL.match(file):
        return file
    return posixpath.normpath(posixpath.join(directory or "", file))


def _drives(found: _Found) -> t.Iterator[StartupImage]:
    """-drive and its shortcuts, with the names QEMU gives them (blockdev.c, drive_new)."""
    taken: set[tuple[str, int, int]] = set()
    for options in found.drives:
        device = options.get("id") or _made_name(options, found.machine, taken)
        image = _drive_image(options, found.directory)
        if image is None:
            continue
        yield StartupImage(
            **image,
            qdev=found.devices.get(device) or None,
            device=device,
            nodes=(options["node-name"],) if "node-name" in options else (),
            explicit_backing=any(key.split(".")[0] == "backing" for key in options),
            temporary=options.get("snapshot", "on" if found.snapshot else "off") in ("on", "yes", "true", "y"),
        )


def _drive_image(options: t.Mapping[str, str], directory: str | None) -> dict[str, t.Any] | None:
    nested = _nested({key: value for key, value in options.items() if key != "file"})
    driver = options.get("format") or options.get("driver")
    spelled = options.get("file", "")
    if spelled.startswith("json:"):
        image = _image_of(_structure(spelled[len("json:") :], "driver"), {}, directory)
        return {**image, "format": driver or image["format"]} if image else None
    if not spelled:
        return _image_of({**nested, "driver": driver}, {}, directory)
    return {"file": absolute(spelled, directory), "spelled": spelled, "format": driver}


def _made_name(options: t.Mapping[str, str], machine: str, taken: set[tuple[str, int, int]]) -> str:
    """``virtio0``, ``ide1-hd0``, ``none0``: the interface, its bus where it has several, and the place on it."""
    interface = options.get("if") or ("virtio" if machine.startswith("virt") else "ide")
    per_bus = {"ide": 1 if "q35" in machine else 2, "scsi": 7}.get(interface, 0)
    bus, unit = _place(options, per_bus, lambda bus, unit: (interface, bus, unit) in taken)
    taken.add((interface, bus, unit))
    medium = "" if interface not in ("ide", "scsi") else "-cd" if options.get("media") == "cdrom" else "-hd"
    return f"{interface}{bus if per_bus else ''}{medium}{unit}"


def _place(options: t.Mapping[str, str], per_bus: int, occupied: t.Callable[[int, int], bool]) -> tuple[int, int]:
    numbers = {key: int(options[key]) for key in ("index", "bus", "unit") if options.get(key, "").isdigit()}
    if "index" in numbers:
        return divmod(numbers["index"], per_bus) if per_bus else (0, numbers["index"])
    bus, unit = numbers.get("bus", 0), numbers.get("unit")
    if unit is not None:
        return bus, unit
    unit = 0
    while occupied(bus, unit):
        unit += 1
        if per_bus and unit >= per_bus:
            bus, unit = bus + 1, 0
    return bus, unit
