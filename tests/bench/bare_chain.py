# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The reference: a whole chain made one image by the barest asyncio script. No checks, no records, no bitmaps.

    python bare_chain.py <JOB.json

Run by path: needs nothing but qemu.qmp. The job: ``socket``, ``node`` (the active one) and ``how``: ``commit`` (all
into the lowest image, with pivot) or ``stream`` (all into the active one). With ``flush`` a stream is flushed to the
disk before its end; QEMU does that itself for a commit. Prints the seconds from the connection to the end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any

from qemu.qmp import QMPClient


async def _commit(client: QMPClient, job: dict[str, Any]) -> None:
    with client.listener("JOB_STATUS_CHANGE") as listener:
        await client.execute("block-commit", {"job-id": "bare", "device": job["node"]})
        while (await listener.get())["data"] != {"id": "bare", "status": "ready"}:
            pass
        await client.execute("job-complete", {"id": "bare"})
        while (await listener.get())["data"] != {"id": "bare", "status": "null"}:
            pass


async def _stream(client: QMPClient, job: dict[str, Any]) -> None:
    with client.listener("JOB_STATUS_CHANGE") as listener:
        stream = {"job-id": "bare", "device": job["node"], "auto-finalize": False}
        await client.execute("block-stream", stream)
        while (await listener.get())["data"] != {"id": "bare", "status": "pending"}:
            pass
        if job["flush"]:
            line = f"qemu-io {job['node']} flush"
            await client.execute("human-monitor-command", {"command-line": line})
        await client.execute("job-finalize", {"id": "bare"})
        while (await listener.get())["data"] != {"id": "bare", "status": "null"}:
            pass


async def _all(job: dict[str, Any]) -> float:
    begin = time.monotonic()
    client = QMPClient("bare")
    await client.connect(job["socket"])
    try:
        await (_commit if job["how"] == "commit" else _stream)(client, job)
    finally:
        await client.disconnect()
    return time.monotonic() - begin


if __name__ == "__main__":
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    print(json.dumps({"seconds": asyncio.run(_all(json.load(sys.stdin)))}))
