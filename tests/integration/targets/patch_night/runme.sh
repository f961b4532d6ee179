#!/usr/bin/env bash
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Patch nights of real guests, by the playbooks a user runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHONPATH="$(cd ../../.. && pwd)" exec python files/nights.py "$@"
