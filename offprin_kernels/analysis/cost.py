"""What an analysis costs, from shapes alone: bytes to read, floating-point operations, seconds at given rates.

The operations are those that the methods of ``topk_svd`` and ``geometry`` do on a spectrum as pretrained layers have
it; docs/scale.md has the formulas beside measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Options, Unit

# products of m x n with a block of 1.5 k columns: cold until certified, warm from the base's factors
COLD, WARM = 12, 5
# an fp64 operation counts for two, and LAPACK's symmetric eigensolver reaches a fifth of the speed of products
FP64, EIGENSOLVER = 2.0, 5.0


@dataclass(frozen=True)
class Rates:
    """What one process of a machine can do.

    The defaults are of a 2-core server CPU with AVX-512, one process with both cores; docs/scale.md says how measured.
    """

    read: float = 8e9  # bytes per second from files
    flops: float = 150e9  # fp32 operations per second of large matrix products


def flops(unit: Unit, options: Options) -> float:
    """fp32 operations (fp64 ones counted as two) that the geometry of one unit takes, all its runs together."""
    if not options.metrics or not unit.linear:
        return 0.0
    m, n, runs = unit.rows, unit.columns, len(unit.partners)
    p, size = min(m, n), float(unit.total)
    block = 1.5 * min(options.k, p)
    product = 2 * size * block
    # not more than a Gram matrix and all its vectors in fp64
    whole = FP64 * (1.25 * size * p + EIGENSOLVER * 4 * p**3)
    total = min(COLD * product, whole)
    if "spectrum" in options.metrics:
        full = FP64 * (1.25 * size * p + EIGENSOLVER * 4 / 3 * p**3) if options.nss == "full" else 0.0
        # seven products of k + 16 columns, or the Gram matrix of a small update
        sketch = min(1.25 * size * p + EIGENSOLVER * 4 / 3 * p**3, 7 * product / 1.5)
        total += full + runs * (min(WARM * product, whole) + full + sketch)
    if "energy" in options.metrics:
        total += runs * 2 * product / 1.5
    if "masks" in options.metrics:
        total += 2 * size * options.k
    return total


def seconds(unit: Unit, options: Options, rates: Rates | None = None) -> float:
    """Time of one unit in one process: reading and computing overlap only in part, so they are added."""
    rates = rates or Rates()
    return unit.nbytes / rates.read + flops(unit, options) / rates.flops
