"""What an output directory rests on: one writer at a time, strict JSON, one sentence where something is wrong."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

LOCK = ".lock"


class OutputError(ValueError):
    """The output directory cannot be used; one sentence says why and what to do."""


def lock(root: Path, *, shared: bool = False) -> int | None:
    """A descriptor that keeps other processes out until it is closed, be it by a kill; None where there are no locks.

    A shared one keeps out only those that want the directory for themselves.

    Raises OutputError where another process is at work.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return None
    # The file stays: were it deleted, two processes could each hold the lock of their own.
    descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"another process is writing into {root}; wait for it or choose another --out") from None
    except OSError:
        pass  # some network file systems have no locks
    return descriptor


def strict(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON has no names for."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dump(value: dict) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({error}); {remedy}") from None
