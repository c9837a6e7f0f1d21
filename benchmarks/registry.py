"""Shapes of real layers, and the bytes that each op must move: declared once, used by CPU and GPU benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from offprin_kernels import packing
from offprin_kernels.ops.update_scan import Output

# rows x columns of linear layers that people compare
SHAPES = {
    "qwen3-8b.down_proj": (4096, 12288),
    "llama3-70b.gate_proj": (28672, 8192),
    "512MiB": (16384, 16384),
    "4GB": (32768, 65536),
}


@dataclass(frozen=True)
class Traffic:
    """Bytes that cannot be avoided: every input read once, every output written once."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def update_scan_traffic(rows: int, columns: int, outputs: Output, itemsize: int = 2) -> Traffic:
    written = 0
    if Output.MASK in outputs:
        written += rows * packing.row_bytes(columns)
    if Output.ROWS in outputs:
        written += 8 * rows
    if Output.COLUMNS in outputs:
        written += 8 * columns
    return Traffic(2 * rows * columns * itemsize, written)


def pair_counts_traffic(rows: int, columns: int, masks: int) -> Traffic:
    return Traffic(masks * rows * packing.row_bytes(columns), 0)


def masked_step_traffic(weights: int, share: float | None, itemsize: int, *, extra: int = 0, line: int = 32) -> Traffic:
    """Bytes of a masked AdamW step with fp32 moments: whole sectors of parameters and gradients, compact state.

    ``share`` of the weights, at random places, is in the mask; None is all of them, without mask bits. ``extra`` bytes
    are kept per masked weight beside the moments. ``line``: bytes that memory moves at once: sectors of 32, the least
    that a GPU can, are what bars are set on; GPU rows record the floor of 64 beside it.
    """
    masked = 1.0 if share is None else share
    touched = 1.0 if share is None else 1 - (1 - share) ** (line // itemsize)
    state = masked * (8 + extra)
    read = touched * 2 * itemsize + state + (0 if share is None else 1 / 8)
    return Traffic(round(weights * read), round(weights * (touched * itemsize + state)))


def masked_rows_traffic(weights: int, share: float, itemsize: int, *, extra: int = 0) -> Traffic:
    """Bytes of a masked AdamW step whose mask is whole rows: only they are touched, but the mask is read for all."""
    state = share * (8 + extra)
    return Traffic(round(weights * (share * 2 * itemsize + state + 1 / 8)), round(weights * (share * itemsize + state)))


def project_traffic(rows: int, columns: int, k: int, side: str, itemsize: int) -> Traffic:
    """Bytes of a projection in place. From the left, or both sides, no row can be written before all have been read,
    so that a matrix larger than the caches is read twice."""
    size = rows * columns * itemsize
    factors = 4 * k * {"left": rows, "right": columns, "both": rows + columns}[side]
    return Traffic(size * (1 if side == "right" else 2) + factors, size)


def project_operations(rows: int, columns: int, k: int, side: str) -> float:
    """Multiplications and additions: two thin products with the matrix; for both sides, two with k x k between."""
    between = 4.0 * rows * k * k if side == "both" else 0.0
    return 4.0 * rows * columns * k + between


# fp32 operations of a step of one weight, as ops/masked_adamw/triton_coordinates.py does them: sign, decay, first
# moment (a subtraction, a fused multiply-add), second (two products, a fused one), root, division, addition, product
# with the step size, division, subtraction; a fused one counts as two
STEP_OPERATIONS = 15
