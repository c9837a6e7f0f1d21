"""LoRA and PiSSA on the linear layers, through peft; PiSSA's factors come from ``topk_svd``.

Sources: LoRA, arXiv 2106.09685; PiSSA, arXiv 2404.02948.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..ops.subspace import topk_svd
from .model import linear_weights


def attach(model: torch.nn.Module, kind: str, rank: int, alpha: float, seed: int) -> torch.nn.Module:
    """The model with adapters ``alpha / rank * B A`` on its linear layers, which alone train.

    ``lora`` starts with B = 0. ``pissa`` starts with the top singular triplets of the weight in A and B, and the rest
    in the weight. Both leave the function unchanged.

    Raises:
        ValueError: peft is missing, or the rank exceeds a layer's smaller side.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise ValueError("adapters need peft; pip install peft") from None
    weights = linear_weights(model)
    smallest = min(min(weight.shape) for weight in weights.values())
    if rank > smallest:
        raise ValueError(f"rank {rank} exceeds {smallest}, the smallest side of a linear layer")
    names = [name.removesuffix(".weight") for name in weights]
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)  # type: ignore[arg-type]
    adapted = get_peft_model(model, config)
    if kind == "pissa":
        for module in layers(adapted):
            principal_start(module)
    return adapted


def layers(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]


@torch.no_grad()
def principal_start(layer: Any) -> None:
    """A and B take the top triplets, the square root of a singular value each; the weight keeps the rest."""
    a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    weight = layer.base_layer.weight
    factors = topk_svd(weight.float(), a.shape[0])
    root = (factors.S / scaling).sqrt()
    a.copy_(root[:, None] * factors.Vh)
    b.copy_(factors.U * root)
    weight.sub_(scaling * (b @ a))


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """The model without adapters: itself, or a copy whose weights have taken them in."""
    if not hasattr(model, "merge_and_unload"):
        return model
    adapted: Any = copy.deepcopy(model)
    return adapted.merge_and_unload()
