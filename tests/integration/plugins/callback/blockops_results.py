# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: blockops_results
type: notification
short_description: Write down what the collection's modules answer
description:
  - Appends one line of JSON per answer to the file that the environment variable E(BLOCKOPS_RESULTS) names.
  - For the tests, which compare the answers with the modules' documentation.
author:
  - blockops.qemu contributors (@blockops)
"""

import json
import os
import typing as t

from ansible.plugins.callback import CallbackBase

PREFIX = "blockops.qemu."


class CallbackModule(CallbackBase):
    """Listens to every end of a task or loop item, good or bad."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "blockops_results"

    def _write_down(self, result: t.Any) -> None:
        task = getattr(result, "task", None) or result._task
        answer = getattr(result, "result", None) or result._result
        action = str(getattr(task, "resolved_action", None) or task.action)
        path = os.environ.get("BLOCKOPS_RESULTS")
        if path and action.startswith(PREFIX) and "results" not in answer:
            line = json.dumps({"module": action[len(PREFIX) :], "answer": answer}, default=str)
            with open(path, "a", encoding="utf-8") as log:
                log.write(line + "\n")

    def v2_runner_on_ok(self, result: t.Any, **_kwargs: t.Any) -> None:
        self._write_down(result)

    def v2_runner_on_failed(self, result: t.Any, **_kwargs: t.Any) -> None:
        self._write_down(result)

    def v2_runner_item_on_ok(self, result: t.Any, **_kwargs: t.Any) -> None:
        self._write_down(result)

    def v2_runner_item_on_failed(self, result: t.Any, **_kwargs: t.Any) -> None:
        self._write_down(result)
