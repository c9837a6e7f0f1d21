"""Saved update masks: a safetensors file per run, of a part while at work and of everything at the end.

``BitMask.load`` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .. import packing
from ..bitmask import FORMAT
from ..checkpoint.write import SafetensorsWriter
from .parts import mask_file
from .plan import Plan, Unit


def mask_layout(plan: Plan, run: int, units: Sequence[Unit]) -> tuple[dict, dict[str, str]]:
    """Layout and metadata of a file that holds the masks of these units of one run."""
    units = [unit for unit in units if any(r == run for r, _ in unit.partners)]
    layout = {unit.name: ("U8", (unit.rows, packing.row_bytes(unit.columns))) for unit in units}
    shapes = {unit.name: mask_shape(unit) for unit in units}
    return layout, {"format": FORMAT, "shapes": json.dumps(shapes), "rule": str(plan.options.rules[0])}


def part_writers(plan: Plan, units: Sequence[Unit], folder: Path) -> list[SafetensorsWriter]:
    """A writer per run for the masks of one part."""
    return [
        SafetensorsWriter(folder / mask_file(run), *mask_layout(plan, run, units)) for run in range(len(plan.names))
    ]


def mask_shape(unit: Unit) -> list[int]:
    """The weight's own shape, or rows x columns where only some of its rows were compared."""
    whole = packing.matrix_shape(unit.base.shape)[0] == unit.rows
    return list(unit.base.shape) if whole else [unit.rows, unit.columns]
