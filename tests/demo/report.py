# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""The table at the end, read from the repository's manifests with nothing but json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

HEADINGS = ("VM", "backup", "level", "consistency", "bytes copied", "bytes stored", "seconds", "frozen ms")


def manifests(repository: Path) -> list[dict[str, Any]]:
    """All backups of a repository, by VM and in their order."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in repository.glob("*/[!.]*/manifest.json")]
    return sorted(found, key=lambda manifest: (manifest["vm"]["name"], manifest["sequence"]))


def row(manifest: dict[str, Any]) -> tuple[str, ...]:
    began, ended = (datetime.strptime(manifest[key], "%Y-%m-%dT%H:%M:%S.%fZ") for key in ("started", "finished"))
    return (
        manifest["vm"]["name"],
        manifest["id"],
        manifest["level"],
        manifest["consistency"],
        f"{sum(drive['copied'] for drive in manifest['drives']):,}",
        f"{sum(drive['size'] for drive in manifest['drives']):,}",
        f"{(ended - began).total_seconds():.2f}",
        "-" if manifest["freeze_ms"] is None else f"{manifest['freeze_ms']:.1f}",
    )


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as they must be; numbers to the right."""
    lines = [HEADINGS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    texts = [
        "  ".join(
            f"{cell:<{width}}" if column < 4 else f"{cell:>{width}}" for column, (cell, width) in enumerate(pairs)
        )
        for pairs in (list(zip(line, widths)) for line in lines)
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])
