"""What an analysis costs, from shapes alone: bytes to read, floating-point operations, seconds at given rates.

The operations are those that the methods of ``topk_svd`` and ``geometry`` do on a spectrum as pretrained layers have
it, and their speeds were measured; docs/scale.md has both beside whole analyses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .plan import Options, Unit

# products of m x n with a block of 1.5 k columns: cold until certified, warm from the base's factors
COLD, WARM = 12, 5
# an fp64 operation counts for two, and LAPACK's symmetric eigensolver reaches a fifth of the speed of products
FP64, EIGENSOLVER = 2.0, 5.0
# Share of the speed of large products that these reach, with what lies between products (orthogonalisation, small
# eigenproblems, certificates). Measured on 1024 x 3072 to 11008 x 4096 weights: 0.21-0.34, 0.21-0.25, 0.38-0.5, 0.29.
COLD_SPEED, WARM_SPEED, SKETCH_SPEED, ENERGY_SPEED = 0.3, 0.24, 0.45, 0.3
# Passes over a weight, in operations whose time they take: masks and their counts, nulls of rounding, the update.
MASK_PASSES, ENERGY_PASSES, UPDATE_PASSES = 2400, 1200, 800
# Seconds for the nulls of a matrix and run, and its tables: one core's work whatever the device.
NULLS = 0.03


@dataclass(frozen=True)
class Rates:
    """What one process of a machine can do.

    The defaults are of a 2-core server CPU with AVX-512, one process with both cores; docs/scale.md says how measured.
    """

    read: float = 8e9  # bytes per second from files
    flops: float = 400e9  # fp32 operations per second of large matrix products


class Term(NamedTuple):
    """fp32 operations (fp64 ones counted as two), and what share of the speed of large products they reach."""

    operations: float
    speed: float


def terms(unit: Unit, options: Options) -> list[Term]:
    """What the geometry of one unit takes, all its runs together."""
    if not options.metrics or not unit.linear:
        return []
    m, n, runs = unit.rows, unit.columns, len(unit.partners)
    p, size = min(m, n), float(unit.total)
    k = min(options.k, p)
    product = 2 * size * 1.5 * k
    # not more than a Gram matrix and all its vectors in fp64
    whole = FP64 * (1.25 * size * p + EIGENSOLVER * 4 * p**3)
    found = [fastest(Term(COLD * product, COLD_SPEED), Term(whole, 1.0))]
    if "spectrum" in options.metrics:
        # seven products of k + 16 columns, or the Gram matrix of a small update
        sketch = min(1.25 * size * p + EIGENSOLVER * 4 / 3 * p**3, 7 * product / 1.5)
        warm = fastest(Term(WARM * product, WARM_SPEED), Term(whole, 1.0))
        found += [warm._replace(operations=runs * warm.operations), Term(runs * sketch, SKETCH_SPEED)]
        if options.nss == "full":
            full = FP64 * (1.25 * size * p + EIGENSOLVER * 4 / 3 * p**3)
            found.append(Term((1 + runs) * full, 1.0))
    if "energy" in options.metrics:
        found.append(Term(runs * 2 * product / 1.5, ENERGY_SPEED))
    if "masks" in options.metrics:
        found.append(Term(2 * size * k, ENERGY_SPEED))
    return found


def fastest(*ways: Term) -> Term:
    return min(ways, key=lambda way: way.operations / way.speed)


def flops(unit: Unit, options: Options) -> float:
    """fp32 operations (fp64 ones as two) of the products and eigenproblems of one unit, all its runs together."""
    return sum(term.operations for term in terms(unit, options))


def seconds(unit: Unit, options: Options, rates: Rates | None = None) -> float:
    """Time of one unit in one process: reading and computing overlap only in part, so they are added."""
    rates = rates or Rates()
    found = terms(unit, options)
    if not found:
        return unit.nbytes / rates.read
    runs = len(unit.partners)
    passes = runs * UPDATE_PASSES + (runs * ENERGY_PASSES) * ("energy" in options.metrics)
    passes += MASK_PASSES * ("masks" in options.metrics)
    operations = sum(term.operations / term.speed for term in found) + passes * unit.total
    return unit.nbytes / rates.read + operations / rates.flops + runs * NULLS
