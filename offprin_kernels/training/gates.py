"""The three gates as a run passes them: divergence is in ``objectives``; this is what the weights say.

Gate II: how much of the update lies in the base's principal subspaces. Gate III: how much of it bf16 shows.
Source: arXiv 2511.08567, sections 3 and 4.
"""

from __future__ import annotations

import math

import torch

from ..geometry import update_energy
from ..ops.subspace import TopK, topk_svd
from ..updates import update_scan
from .model import linear_weights


class Gates:
    """Compares a model that trains with the weights it began from.

    Args:
        model: at its start; a copy of its linear layers is kept.
        k: of the principal subspaces, at most half of a layer's smaller side.

    Raises:
        ValueError: k out of range.
    """

    def __init__(self, model: torch.nn.Module, k: int) -> None:
        self.base = {name: weight.detach().clone() for name, weight in linear_weights(model).items()}
        sides = [min(weight.shape) for weight in self.base.values()]
        if not 1 <= k <= min(sides) // 2:
            raise ValueError(f"k must be between 1 and {min(sides) // 2}, half of the smallest layer's side; got {k}")
        self.factors: dict[str, TopK] = {name: topk_svd(weight.float(), k) for name, weight in self.base.items()}

    def measure(self, model: torch.nn.Module) -> dict[str, float]:
        """Of the update so far, over all linear layers:

        * ``visible_fraction``: share of weights whose bf16 value differs from the base's;
        * ``update_norm``: Frobenius norm over the base's;
        * ``energy``: share of the squared norm inside both top-k subspaces, the mean over layers, beside
          ``energy_isotropic``, which a random update would have; None before there is an update.
        """
        changed = total = 0
        squares = base_squares = 0.0
        inside, chance = [], []
        for name, weight in linear_weights(model).items():
            base, now = self.base[name], weight.detach()
            scan = update_scan(base.bfloat16(), now.bfloat16(), outputs=())
            changed, total = changed + scan.changed, total + scan.total
            update = now.float() - base.float()
            squares += float(update.double().square().sum())
            base_squares += float(base.double().square().sum())
            energy = update_energy(self.factors[name], update)
            if not math.isnan(energy.both):
                inside.append(energy.both)
                chance.append(energy.isotropic_both)
        found = {"visible_fraction": changed / total, "update_norm": math.sqrt(squares / base_squares)}
        if inside:
            found |= {"energy": sum(inside) / len(inside), "energy_isotropic": sum(chance) / len(chance)}
        return found
