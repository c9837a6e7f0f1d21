"""The one exception of this sub-package."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or trusted: one sentence naming file, tensor and remedy."""
