"""JSON files that lie beside weights."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import CheckpointError


def load_json(path: Path) -> dict[str, object]:
    """A JSON object from a file; raises CheckpointError where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download or copy this file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; download or copy this file again")
    return value
