# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""guest.py AGENT_SOCKET LINE...: run shell lines in a guest of the lab, and end as they end."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.agent import Agent

NO_ANSWER = 100


def main() -> int:
    try:
        with Agent(sys.argv[1], timeout=5.0) as agent:
            code, out, err = agent.run(["/bin/sh", "-c", " ; ".join(sys.argv[2:])])
    except (OSError, EOFError) as exc:
        print(f"no answer on {sys.argv[1]}: {exc}", file=sys.stderr)
        return NO_ANSWER
    sys.stdout.write(out.decode(errors="replace"))
    sys.stderr.write(err.decode(errors="replace"))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
