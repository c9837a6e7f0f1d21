"""Commands with a time limit that leave nothing behind: no child outlives its parent, none its limit."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1  # of Linux' prctl
LINES = 40  # of output kept for a reader: a traceback of PyTorch and what came before it


_ends: list[float] = []  # when this process has to be done, where that is known


def ends_in(seconds: float) -> None:
    """What :func:`left` counts down from."""
    _ends[:] = [time.monotonic() + seconds]


def left() -> float:
    """Seconds that this process has left."""
    return _ends[0] - time.monotonic() if _ends else float("inf")


class Ended(NamedTuple):
    code: int | None  # None: stopped at its limit
    output: str  # standard output and error together

    @property
    def tail(self) -> str:
        return "\n".join(self.output.splitlines()[-LINES:])


def tied(command: Sequence[str]) -> list[str]:
    """The command, ended when this process is."""
    return [sys.executable, "-I", __file__, str(os.getpid()), *command]


def run(command: Sequence[str], limit: float, log: Path, env: Mapping[str, str] | None = None) -> Ended:
    """Run a command in the project's root for at most ``limit`` seconds, its output in ``log``.

    Its whole process group ends with it, and it ends with this process, however that is ended.
    """
    with log.open("wb") as sink:
        child = subprocess.Popen(
            tied(command),
            cwd=ROOT,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return Ended(code, log.read_text(errors="replace"))


if __name__ == "__main__":
    # A process killed with no chance to say so must not leave one behind that keeps the device busy. The setting stays
    # with whatever this one turns into.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(sys.argv[1]):
            sys.exit("the process that wanted this one is gone already")
    os.execvp(sys.argv[2], sys.argv[2:])
