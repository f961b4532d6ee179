# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs a command and reports its peak resident set: python peak.py REPORT COMMAND...

The kernel hands a child the peak of the process that forked it, so this is a small process of its own. Standard
library only; run by path with ``-S -E``.
"""

import os
import sys

if __name__ == "__main__":
    pid = os.fork()
    if pid == 0:
        os.execvp(sys.argv[2], sys.argv[2:])
    _pid, status, usage = os.wait4(pid, 0)
    with open(sys.argv[1], "w", encoding="ascii") as report:
        report.write(f"{usage.ru_maxrss} {usage.ru_utime + usage.ru_stime}")
    sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)
