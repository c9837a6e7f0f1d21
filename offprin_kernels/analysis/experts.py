"""Experts that are stored as one tensor, taken apart: each of their matrices is compared by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..checkpoint import Checkpoint, Pairing, TensorPair, TensorRef, is_linear
from ..checkpoint.experts import FUSED


def matrices(base: Checkpoint, pairings: Sequence[Pairing]) -> Iterator[tuple[int, TensorPair]]:
    """Every pair with its run; where the base stacks its experts, a pair for each matrix, the same for every run."""
    heights: dict[str, int] = {}
    for pairing in pairings:
        for found in pairing.pairs:
            if len(found.base.shape) == 3 and is_linear(found.base.name, found.base.shape):
                # a run that has them one by one says how they are cut
                height = min(found.base.rows, matrix_rows(base, found.base))
                heights[found.base.name] = min(height, heights.get(found.base.name, height))
    for run, pairing in enumerate(pairings):
        for found in pairing.pairs:
            height = heights.get(found.base.name, 0)
            for start in range(0, found.base.rows, height) if height else ():
                yield run, expert_pair(found, start, height)
            if not height:
                yield run, found


def matrix_rows(base: Checkpoint, ref: TensorRef) -> int:
    """Rows of one matrix in a tensor of stacked experts; gate and up, fused with the gate's rows first, are two.

    Their shape beside that of ``down_proj`` [experts, hidden, intermediate] tells this layout from a transposed one.
    """
    rows, columns = ref.shape[-2:]
    found = FUSED.fullmatch(ref.name)
    if found is None or found["part"] != "gate_up_proj" or f"{ref.name}_bias" in base.tensors:
        return rows
    down = base.tensors.get(ref.name.replace("gate_up_proj", "down_proj"))
    straight = down is not None and len(down.shape) == 3 and (rows, columns) == (2 * down.shape[2], down.shape[1])
    return rows // 2 if straight else rows


def expert_pair(found: TensorPair, start: int, rows: int) -> TensorPair:
    """Rows [start, start + rows) of a pair: one matrix, named as where each expert is stored by itself."""
    first = found.base.start_row + start
    each = found.base.shape[-2] // rows
    expert, part = divmod(first // rows, each)
    stem, _, kind = found.base.name.removesuffix(".weight").rpartition("experts.")
    if each == 2:
        kind = kind.replace("gate_up", ("gate", "up")[part])
    base, tuned = (replace(ref, start_row=ref.start_row + start, rows=rows) for ref in (found.base, found.tuned))
    note = found.note
    if rows < found.base.rows:
        held = f"{found.base.name} holds all experts on both sides; compared one by one"
        note = f"{held}; {note}" if note else held
    return replace(found, name=f"{stem}experts.{expert}.{kind}.weight", base=base, tuned=tuned, note=note)
