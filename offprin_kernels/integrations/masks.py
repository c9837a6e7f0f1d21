"""Masks for optimizers that somebody else builds, from parameters without names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..bitmask import BitMask
from ..optim.local import bare


class MasksOf:
    """``masks=`` of MaskedAdamW for the parameters of a model: found by what they are when the optimizer is built.

    Names are looked up then, so that wrapping or sharding the model in between does no harm.

    Args:
        model: whose names the masks have.
        masks: from names to masks, or a file written by ``BitMask.save``.

    Raises ValueError for masks whose parameter the model does not have, or has in another shape; all are listed.
    """

    def __init__(self, model: torch.nn.Module, masks: Mapping[str, BitMask] | str | Path) -> None:
        self.model = model
        self.masks = dict(BitMask.load(masks) if isinstance(masks, str | Path) else masks)
        shapes = {bare(name): param.shape for name, param in model.named_parameters()}
        wrong = [
            f"{name}: the mask is {tuple(mask.shape)}, the parameter {tuple(shapes[name])}"
            if name in shapes
            else f"{name}: the model has no such parameter"
            for name, mask in self.masks.items()
            if shapes.get(name) != mask.shape
        ]
        if wrong:
            raise ValueError("masks do not fit the model:\n  " + "\n  ".join(wrong))

    def __call__(self, name: str, param: torch.Tensor) -> BitMask | None:
        for known, candidate in self.model.named_parameters():
            if candidate is param:
                return self.masks.get(bare(known))
        return self.masks.get(bare(name))
