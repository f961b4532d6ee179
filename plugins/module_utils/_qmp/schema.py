# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What this QEMU can do, asked from its schema (query-qmp-schema) and never guessed from its version."""

from __future__ import annotations

import asyncio
import typing as t

from .session import Session

_Entities = dict[str, dict[str, t.Any]]

# The schema is a quarter of a megabyte and the same for every process of one build: read it once per build and run.
_read: dict[str, Schema] = {}
_reading: dict[str, asyncio.Lock] = {}


class Schema:
    """The introspected schema of one QEMU build."""

    def __init__(self, entities: _Entities) -> None:
        self._entities = entities

    def has_command(self, command: str) -> bool:
        return self._entities.get(command, {}).get("meta-type") == "command"

    def argument(self, command: str, argument: str) -> bool:
        """Whether the command takes the argument (in any branch of its arguments)."""
        entity = self._entities.get(command)
        if entity is None:
            return False
        return argument in self._members(self._entities[entity["arg-type"]])

    def transaction_action(self, action: str) -> bool:
        """Whether ``transaction`` knows the action (QAPI: TransactionAction)."""
        actions = self._entities.get("transaction")
        if actions is None:
            return False
        arguments = self._entities[actions["arg-type"]]
        element = next(member["type"] for member in arguments["members"] if member["name"] == "actions")
        union = self._entities[self._entities[element]["element-type"]]
        return any(variant["case"] == action for variant in union.get("variants", ()))

    def _members(self, entity: dict[str, t.Any]) -> set[str]:
        return {member["name"] for member in entity.get("members", ())}


async def read_schema(session: Session) -> Schema:
    """The schema of the QEMU behind the session. Raises what Session.command raises."""
    key = f"{session.version}"
    async with _reading.setdefault(key, asyncio.Lock()):
        if key not in _read:
            entities = await session.command("query-qmp-schema")
            _read[key] = Schema({entity["name"]: entity for entity in entities})
    return _read[key]
