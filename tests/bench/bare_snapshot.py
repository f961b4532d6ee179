# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The reference: the same QMP commands for snapshots in the barest asyncio script. No checks, no records, no recovery.

    python bare_snapshot.py <JOB.json

Run by path: needs nothing but qemu.qmp. The job: ``parallel`` and ``vms``, each with ``socket`` and ``drives``:
``node`` (the active one), ``overlay`` (path), ``below`` (path of the active image), ``size``. With ``agent`` (socket)
the guest is frozen around the transaction. With ``drop`` the overlays are committed and detached instead. Prints the
seconds from the first connection to the last, and the freeze windows in milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any

from bare import _create, _point  # type: ignore[import-not-found]  # beside this script
from qemu.qmp import QMPClient


async def _attach(client: QMPClient, drive: dict[str, Any]) -> dict[str, Any]:
    """Make one overlay, attach it, and answer the transaction's action for its drive."""
    path, node = drive["overlay"], f"over-{drive['node']}"
    await _create(client, {"driver": "file", "filename": path, "size": 0})
    file = {"driver": "file", "filename": path}
    await client.execute("blockdev-add", {**file, "node-name": "bare-file"})
    backing = {"backing-file": drive["below"], "backing-fmt": "qcow2"}
    await _create(client, {"driver": "qcow2", "file": "bare-file", "size": drive["size"], **backing})
    await client.execute("blockdev-del", {"node-name": "bare-file"})
    await client.execute("blockdev-add", {"driver": "qcow2", "node-name": node, "file": file, "backing": None})
    return {"type": "blockdev-snapshot", "data": {"node": drive["node"], "overlay": node}}


async def _drop(client: QMPClient, drive: dict[str, Any]) -> None:
    node = f"over-{drive['node']}"
    with client.listener("JOB_STATUS_CHANGE") as listener:
        commit = {"job-id": "bare", "device": node, "top-node": node, "base-node": drive["node"]}
        await client.execute("block-commit", commit)
        while (await listener.get())["data"] != {"id": "bare", "status": "ready"}:
            pass
        await client.execute("job-complete", {"id": "bare"})
        while (await listener.get())["data"] != {"id": "bare", "status": "null"}:
            pass
    await client.execute("blockdev-del", {"node-name": node})


async def _one(vm: dict[str, Any], drop: bool) -> float | None:
    client = QMPClient("bare")
    await client.connect(vm["socket"])
    try:
        if drop:
            for drive in vm["drives"]:
                await _drop(client, drive)
            return None
        return await _point(client, vm, [await _attach(client, drive) for drive in vm["drives"]])
    finally:
        await client.disconnect()


async def _all(job: dict[str, Any]) -> dict[str, Any]:
    gate = asyncio.Semaphore(job["parallel"])

    async def one(vm: dict[str, Any]) -> float | None:
        async with gate:
            return await _one(vm, bool(job.get("drop")))

    begin = time.monotonic()
    windows = await asyncio.gather(*(one(vm) for vm in job["vms"]))
    return {"seconds": time.monotonic() - begin, "windows": [window for window in windows if window is not None]}


if __name__ == "__main__":
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    print(json.dumps(asyncio.run(_all(json.load(sys.stdin)))))
