"""Random sets of lowrank_select: SplitMix64's smallest hashes, on every backend, exactly."""

from __future__ import annotations

import numpy as np
import pytest

from offprin_kernels.ops import lowrank_select as op

from .selections import SHAPES, counts, dense, smallest

BACKENDS = op.BACKENDS


def splitmix(seed: int, total: int) -> np.ndarray:
    """SplitMix64 from its published text, 32 bits of each output."""

    def mixed(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    gamma = np.uint64(0x9E3779B97F4A7C15)
    start = mixed(np.array([seed], dtype=np.uint64) + gamma)
    return mixed(start + np.arange(total, dtype=np.uint64) * gamma) >> np.uint64(32)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_is_the_smallest_hashes(backend, device, shape) -> None:
    for seed in (0, 1, (1 << 63) - 1):
        hashes = splitmix(seed, shape[0] * shape[1]).reshape(shape)
        for count in counts(hashes.size):
            words = op.select_random(*shape, count, seed, device=device, backend=backend)
            np.testing.assert_array_equal(dense(words, shape[1]), smallest(hashes, count))


def test_seeds_differ_as_chance_has_it(backend, device) -> None:
    m, n, count = 200, 300, 12_000
    masks = [dense(op.select_random(m, n, count, seed, device=device, backend=backend), n) for seed in range(4)]
    # Hypergeometric: the overlap of two sets of a fifth has mean 2,400 and standard deviation 39.2.
    for i, first in enumerate(masks):
        for second in masks[i + 1 :]:
            assert abs(int((first & second).sum()) - 2400) < 5 * 39.2
    assert max(abs(mask.sum(1) - 60).max() for mask in masks) < 6 * 6.93
