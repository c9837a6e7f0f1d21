"""MaskedAdamW for transformers' Trainer and those built on it (TRL's), and callbacks that log what moved.

# where the trainer builds the optimizer (Trainer, SFTTrainer)
Trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, args, masks, rounding="master"))
# where it only takes one (GRPOTrainer)
GRPOTrainer(model, reward, args, optimizers=(masked_optimizer(model, args, masks, rounding="master"), None))
# with any optimizer, in any of them: what changed so far, every ten steps
UpdateWatchCallback(every=10, energies="linear").install(trainer)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..bitmask import BitMask
from ..optim import MaskedAdamW
from .callbacks import UpdateLogger, UpdateWatchCallback
from .masks import MasksOf

__all__ = [
    "UpdateLogger",
    "UpdateWatchCallback",
    "hyperparameters",
    "masked_optimizer",
    "optimizer_cls_and_kwargs",
]

Given = Mapping[str, BitMask] | str | Path | None


def hyperparameters(args: TrainingArguments) -> dict[str, Any]:
    """What a trainer's arguments say of AdamW."""
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }


def optimizer_cls_and_kwargs(
    model: torch.nn.Module, args: TrainingArguments, masks: Given = None, **options: Any
) -> tuple[type[MaskedAdamW], dict[str, Any]]:
    """For a trainer's argument of that name: MaskedAdamW with the trainer's hyperparameters and parameter groups.

    Args:
        model: the model to be trained.
        args: the trainer's arguments, for learning rate, betas, eps and weight decay.
        masks: from parameter names to masks, or a file written by ``BitMask.save``; other parameters move as a whole.
        options: of MaskedAdamW, such as ``rounding`` and ``track_visible``; they win over ``args``.

    Raises ValueError for masks that do not fit the model.
    """
    given = {} if masks is None else {"masks": MasksOf(model, masks)}
    return MaskedAdamW, {**hyperparameters(args), **given, **options}


def masked_optimizer(
    model: torch.nn.Module, args: TrainingArguments, masks: Given = None, **options: Any
) -> MaskedAdamW:
    """A MaskedAdamW for a trainer's ``optimizers=(optimizer, None)``: named parameters, decay as the Trainer has it.

    Takes and raises what ``optimizer_cls_and_kwargs`` does. Biases and the weights of norms are not decayed. For a
    trainer that shards the model itself, prefer ``optimizer_cls_and_kwargs``: it sees the sharded parameters.
    """
    kind, settings = optimizer_cls_and_kwargs(model, args, masks, **options)
    decay = settings.pop("weight_decay")
    norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    groups: dict[float, list[tuple[str, torch.Tensor]]] = {decay: [], 0.0: []}
    for name, param in model.named_parameters():
        if param.requires_grad:
            plain = name in norms or name.endswith("bias")
            groups[0.0 if plain else decay].append((name, param))
    return kind([{"params": named, "weight_decay": d} for d, named in groups.items() if named], **settings)
