"""The one exception of this sub-package."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or trusted: one sentence naming file, tensor and remedy."""

    def __init__(self, message: str) -> None:
        # Names of files and tensors may hold what no terminal can print.
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))
