from __future__ import annotations

import pytest

from .checkpoints import base_weights, save, tuned_weights


@pytest.fixture
def pair(tmp_path):
    """(base, two tuned runs) as weights and as directories."""
    base = base_weights()
    runs = [tuned_weights(base, seed) for seed in (1, 2)]
    paths = [save(tmp_path / "base", base), save(tmp_path / "one", runs[0]), save(tmp_path / "two", runs[1], shards=1)]
    return base, runs, [str(path) for path in paths]
