"""Peak memory of a command, over that of an interpreter that has loaded torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

# VmHWM and not ru_maxrss: a new process starts with its parent's ru_maxrss.
SCRIPT = (
    "import re, sys, torch\n"
    "def peak():\n"
    "    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
    "before = peak()\n"
    "from offprin_kernels.cli import main\n"
    "code = main(sys.argv[1:])\n"
    "print(peak() - before)\n"
    "sys.exit(code)\n"
)


def growth(arguments: Sequence[object]) -> int:
    """Bytes by which the peak grows while ``offprin`` runs with these arguments."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])
