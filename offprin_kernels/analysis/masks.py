"""Saved update masks: one safetensors file per run, written slab by slab, readable by ``BitMask.load``."""

from __future__ import annotations

import json
from pathlib import Path

from .. import packing
from ..bitmask import FORMAT
from ..checkpoint.write import SafetensorsWriter
from .plan import Plan


def mask_writers(plan: Plan, root: Path) -> list[SafetensorsWriter]:
    """A resumable writer per run under ``root/masks``, laid out for every unit of that run."""
    (root / "masks").mkdir(exist_ok=True)
    writers = []
    for run, name in enumerate(plan.names):
        units = [unit for unit in plan.units if any(r == run for r, _ in unit.partners)]
        layout = {unit.name: ("U8", (unit.rows, packing.row_bytes(unit.columns))) for unit in units}
        shapes = {unit.name: mask_shape(unit) for unit in units}
        metadata = {"format": FORMAT, "shapes": json.dumps(shapes), "rule": str(plan.options.rules[0])}
        writers.append(SafetensorsWriter(root / "masks" / f"{name}.safetensors", layout, metadata, resume=True))
    return writers


def mask_shape(unit) -> list[int]:
    """The weight's own shape, or rows x columns where only some of its rows were compared."""
    whole = packing.matrix_shape(unit.base.shape)[0] == unit.rows
    return list(unit.base.shape) if whole else [unit.rows, unit.columns]
