"""``python -m benchmarks.gpu.child MODULE ARGUMENT FOLDER LIMIT``: one slice; what it found, or why not, goes into
FOLDER. Where the runner has said there which result file it fills, every row goes into that as soon as it is made."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import traceback
from pathlib import Path

from offprin_kernels.checkpoint.write import atomic_write_bytes
from offprin_kernels.output import dump, strict

from . import process, timing
from .results import Results
from .runner import OUTCOME, TOLD, Skipped, Told, stamped

LAST_WORDS = 10  # seconds before the limit, to write what has been measured by then


class Late(Exception):
    pass


def outcome(module: str, argument: str) -> dict:
    """A slice may itself say that it failed, beside what it found; of one that is cut short, rows are kept."""
    try:
        work = importlib.import_module(module).run
        return {"status": "ok", **(work(argument) if argument else work())}
    except Skipped as reason:
        return {"status": "skipped", "error": str(reason)}
    except Late as reason:
        traceback.print_exc()
        return {"status": "partial", "error": str(reason), "rows": timing.MADE}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "error": f"{type(error).__name__}: {error}", "rows": timing.MADE}


def late(*_: object) -> None:
    raise Late("out of time; what is missing was not measured")


def keep_rows(told: Told) -> None:
    """From now on every row stands in the result file, whatever becomes of this process and of the runner.

    What an earlier attempt left there is replaced once this one has as many rows.
    """
    results = Results.told(told)
    before = results.slices().get(told["name"], {})
    had = len(before.get("rows", [])) if before.get("sources") == told["sources"] else 0

    def keep() -> None:
        if len(timing.MADE) >= had:
            found = {"status": "partial", "error": "stopped before its end", "rows": timing.MADE}
            # a signal between here and the rename must not end the process with a stray file beside the results
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            try:
                results.add(told["name"], stamped(found, told["sources"], told["begun"]))
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])

    timing.LISTENERS.append(keep)


def main(module: str, argument: str, folder: Path, limit: float) -> None:
    process.ends_in(limit)
    if (folder / TOLD).exists():
        keep_rows(json.loads((folder / TOLD).read_text()))
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, limit - LAST_WORDS))
    found = outcome(module, argument)
    signal.setitimer(signal.ITIMER_REAL, 0)
    atomic_write_bytes(folder / OUTCOME, dump(strict(found)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
