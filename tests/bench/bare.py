# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The reference: the same QMP commands in the barest asyncio script. No checks, no recovery, no manifest.

    python bare.py <JOB.json

Run by path: needs nothing but qemu.qmp. The job: ``parallel``, ``direct`` (target past the page cache) and ``vms``,
each with ``socket`` and ``drives``: ``node``, ``target`` (path), ``size``, ``add`` (bitmap to begin), and for an
incremental ``bitmap`` and ``backing``. With ``agent`` (socket) the guest is frozen around the transaction. Prints the
seconds from the first connection to the last, and the freeze windows in milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any

from qemu.qmp import QMPClient


async def _attach(client: QMPClient, drive: dict[str, Any], number: int, direct: bool) -> dict[str, Any]:
    """Make one target, attach it, and answer the transaction's actions for its drive."""
    file, image = f"bare-file{number}", f"bare-image{number}"
    cache = {"direct": direct}
    await _create(client, {"driver": "file", "filename": drive["target"], "size": 0})
    add = {"driver": "file", "node-name": file, "filename": drive["target"], "cache": cache}
    await client.execute("blockdev-add", add)
    options = {"driver": "qcow2", "file": file, "size": drive["size"]}
    if drive.get("backing"):
        options.update({"backing-file": drive["backing"], "backing-fmt": "qcow2"})
    await _create(client, options)
    top = {"driver": "qcow2", "node-name": image, "file": file, "backing": None, "cache": cache}
    await client.execute("blockdev-add", top)
    backup = {"job-id": f"bare{number}", "device": drive["node"], "target": image, "sync": "full"}
    if drive.get("bitmap"):
        backup.update({"sync": "incremental", "bitmap": drive["bitmap"]})
    return {"type": "blockdev-backup", "data": backup}


async def _create(client: QMPClient, options: dict[str, Any]) -> None:
    with client.listener("JOB_STATUS_CHANGE") as listener:
        await client.execute("blockdev-create", {"job-id": "bare-create", "options": options})
        while (await listener.get())["data"] != {"id": "bare-create", "status": "concluded"}:
            pass
    jobs: Any = await client.execute("query-jobs")
    failed = [job["error"] for job in jobs if job["id"] == "bare-create" and "error" in job]
    if failed:
        raise RuntimeError(failed[0])
    await client.execute("job-dismiss", {"id": "bare-create"})


async def _point(client: QMPClient, vm: dict[str, Any], actions: list[dict[str, Any]]) -> float | None:
    """The transaction; answers the freeze window in milliseconds when there is an agent."""
    if not vm.get("agent"):
        await client.execute("transaction", {"actions": actions})
        return None
    reader, writer = await asyncio.open_unix_connection(vm["agent"])
    try:
        await _ask(reader, writer, "guest-sync", {"id": 4711})
        begin = time.monotonic()
        await _ask(reader, writer, "guest-fsfreeze-freeze")
        try:
            await client.execute("transaction", {"actions": actions})
        finally:
            await _ask(reader, writer, "guest-fsfreeze-thaw")
        return (time.monotonic() - begin) * 1000
    finally:
        writer.close()


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: str, arguments: dict[str, Any] | None = None
) -> None:
    writer.write(json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n")
    answer = json.loads(await reader.readline())
    if "error" in answer:
        raise RuntimeError(f"{command}: {answer['error']}")


async def _back_up(vm: dict[str, Any], direct: bool) -> float | None:
    client = QMPClient("bare")
    await client.connect(vm["socket"])
    try:
        actions: list[dict[str, Any]] = []
        for number, drive in enumerate(vm["drives"]):
            if drive.get("add"):
                bitmap = {"node": drive["node"], "name": drive["add"], "persistent": True}
                actions.append({"type": "block-dirty-bitmap-add", "data": bitmap})
            actions.append(await _attach(client, drive, number, direct))
        with client.listener("BLOCK_JOB_COMPLETED") as listener:
            window = await _point(client, vm, actions)
            for _drive in vm["drives"]:
                event: Any = await listener.get()
                if "error" in event["data"]:
                    raise RuntimeError(event["data"]["error"])
        for number in range(len(vm["drives"])):
            await client.execute("blockdev-del", {"node-name": f"bare-image{number}"})
            await client.execute("blockdev-del", {"node-name": f"bare-file{number}"})
        return window
    finally:
        await client.disconnect()


async def _all(job: dict[str, Any]) -> dict[str, Any]:
    gate = asyncio.Semaphore(job["parallel"])

    async def one(vm: dict[str, Any]) -> float | None:
        async with gate:
            return await _back_up(vm, job["direct"])

    begin = time.monotonic()
    windows = await asyncio.gather(*(one(vm) for vm in job["vms"]))
    return {"seconds": time.monotonic() - begin, "windows": [window for window in windows if window is not None]}


if __name__ == "__main__":
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    print(json.dumps(asyncio.run(_all(json.load(sys.stdin)))))
