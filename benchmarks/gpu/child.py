"""``python -m benchmarks.gpu.child MODULE ARGUMENT OUT LIMIT``: one slice; what it found, or why not, goes into OUT."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from pathlib import Path

from offprin_kernels.checkpoint.write import atomic_write_bytes
from offprin_kernels.output import dump, strict

from . import timing
from .runner import Skipped

LAST_WORDS = 10  # seconds before the limit, to write what has been measured by then


def outcome(module: str, argument: str) -> dict:
    """A slice may itself say that it failed, beside what it found; of one that is cut short, rows are kept."""
    try:
        work = importlib.import_module(module).run
        return {"status": "ok", **(work(argument) if argument else work())}
    except Skipped as reason:
        return {"status": "skipped", "error": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "error": f"{type(error).__name__}: {error}", "rows": timing.MADE}


def late(*_: object) -> None:
    raise TimeoutError("out of time; what is missing was not measured")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, late)
    signal.alarm(max(1, int(sys.argv[4]) - LAST_WORDS))
    found = outcome(sys.argv[1], sys.argv[2])
    signal.alarm(0)
    atomic_write_bytes(Path(sys.argv[3]), dump(strict(found)))
