# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The one translator between operations and Ansible: the only place that calls exit_json, fail_json and warn.

It never does so inside a coroutine: the JSON would be printed before the clean-up of the coroutine runs.
"""

from __future__ import annotations

import asyncio
import traceback
import typing as t

from ansible.module_utils.basic import missing_required_lib

from .._errors import BlockOpsError, InputInvalid, Unexpected
from .._ops._outcome import Outcome

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

    Operation = t.Callable[[], t.Awaitable[Outcome]]
    VmOperation = t.Callable[[dict[str, t.Any]], t.Awaitable[Outcome]]
    Entries = list[dict[str, t.Any]]
    Pairs = list[tuple[dict[str, t.Any], Outcome]]


def run(module: AnsibleModule, operation: Operation) -> t.NoReturn:
    """Run an operation on one thing and end the module with its outcome."""

    async def guarded() -> Outcome:
        try:
            return await operation()
        except BlockOpsError as exc:
            return Outcome(changed=False, error=exc)

    outcome = asyncio.run(guarded())
    for warning in outcome.warnings:
        module.warn(warning)
    result = dict(outcome.result, changed=outcome.changed)
    if outcome.before is not None or outcome.after is not None:
        result["diff"] = {"before": outcome.before, "after": outcome.after}
    if outcome.error is not None:
        module.fail_json(msg=str(outcome.error), error=outcome.error.to_result(), **result)
    module.exit_json(**result)


def run_vms(
    module: AnsibleModule,
    prepare: t.Callable[[], VmOperation],
    *,
    entries: Entries | None = None,
    arrange: t.Callable[[Pairs], Pairs] | None = None,
    failing: bool = True,
    together: bool = False,
) -> t.NoReturn:
    """Prepare an operation, run it on every entry of ``vms``, at most ``max_parallel`` at a time, and end the module.

    One failing VM never stops the others; the module fails at the end and names those that failed, unless
    ``failing`` is false (readers report what they could not reach and go on). ``arrange`` may drop or reorder results.
    ``together``: the VMs wait for each other, so all of them run at a time.
    """
    entries = module.params["vms"] if entries is None else entries
    try:
        _check_entries(entries, module.params["max_parallel"])
        operation = prepare()
    except BlockOpsError as exc:
        module.fail_json(msg=str(exc), error=exc.to_result())
    parallel = len(entries) if together else module.params["max_parallel"]
    outcomes = asyncio.run(_all(entries, operation, max(1, parallel)))
    pairs = list(zip(entries, outcomes))
    _exit_vms(module, arrange(pairs) if arrange else pairs, failing=failing)


def fail_missing(module: AnsibleModule, package: str, error: ImportError) -> t.NoReturn:
    """End the module with Ansible's message for a Python package that is not there."""
    module.fail_json(msg=missing_required_lib(package), exception=str(error))


def _check_entries(entries: list[dict[str, t.Any]], max_parallel: int) -> None:
    """Two entries of one name would share a result and a directory in the repository."""
    if max_parallel < 1:
        raise InputInvalid(message=f"max_parallel must be at least 1, not {max_parallel}.")
    for key in ("name", "socket"):
        seen: set[str] = set()
        for entry in entries:
            value = entry.get(key)
            if value in seen:
                raise InputInvalid(message=f"Two entries of vms have the {key} {value!r}; each VM needs its own.")
            if value is not None:
                seen.add(value)


async def _all(entries: list[dict[str, t.Any]], operation: VmOperation, max_parallel: int) -> list[Outcome]:
    room = asyncio.Semaphore(max_parallel)

    async def one(entry: dict[str, t.Any]) -> Outcome:
        async with room:
            try:
                return await operation(entry)
            except BlockOpsError as exc:
                return Outcome(changed=False, error=exc)
            except Exception as exc:
                # A bug of ours. It ends the work on this VM, with the traceback, but must not cancel that on others:
                # one of them may be frozen at this moment.
                return Outcome(changed=False, error=Unexpected(what=repr(exc), traceback=traceback.format_exc()))

    return list(await asyncio.gather(*(one(entry) for entry in entries)))


def _exit_vms(module: AnsibleModule, pairs: Pairs, *, failing: bool) -> t.NoReturn:
    vms: list[dict[str, t.Any]] = []
    before: dict[str, t.Any] = {}
    after: dict[str, t.Any] = {}
    failed: list[str] = []
    for entry, outcome in pairs:
        vm = {"name": entry.get("name"), "socket": entry.get("socket"), **outcome.result, "changed": outcome.changed}
        name = vm["name"] or vm["socket"]
        if outcome.error is not None:
            vm["error"] = outcome.error.to_result()
            failed.append(f"{name}: {outcome.error}")
        for warning in outcome.warnings:
            module.warn(f"{name}: {warning}")
        if outcome.before is not None or outcome.after is not None:
            before[name], after[name] = outcome.before, outcome.after
        vms.append(vm)
    result: dict[str, t.Any] = {"vms": vms, "changed": any(vm["changed"] for vm in vms)}
    if before or after:
        result["diff"] = {"before": before, "after": after}
    if failed and failing:
        count = f"{len(failed)} of {len(vms)} VMs failed. " if len(vms) > 1 else ""
        module.fail_json(msg=count + " | ".join(failed), **result)
    module.exit_json(**result)
