"""MaskedAdamW for transformers' Trainer and those built on it (TRL's), and a callback that logs what moved.

# where the trainer builds the optimizer (Trainer, SFTTrainer)
Trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, args, masks, rounding="master"))
# where it only takes one (GRPOTrainer)
GRPOTrainer(model, reward, args, optimizers=(masked_optimizer(model, args, masks, rounding="master"), None))
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..bitmask import BitMask
from ..geometry import update_energy
from ..ops.subspace import TopK, topk_svd
from ..optim import MaskedAdamW
from .masks import MasksOf, bare

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


class UpdateLogger(TrainerCallback):
    """Adds to the trainer's logs what the optimizer moved since the last log.

    * ``visible_fraction``: share of all weights whose value in bf16 changed (an optimizer with ``track_visible=True``);
    * ``masked_weights``: how many weights the masks let move;
    * ``energy/<name>/left``, ``right``, ``both``: of the layers asked for, the share of the update since training began
      that lies in the base's top-k subspaces (arXiv 2511.08567, section 4.1), beside ``.../isotropic_*``.

    Args:
        energies: parameter names to log energies of; each keeps a copy of the base weight. k: of their subspaces.
        tol_degrees: to which those subspaces are certified.

    Pass it in ``callbacks=``. Reporting integrations (wandb and others) run before a user's callbacks and would miss
    it: ``install(trainer)`` puts it before them instead.

    Raises KeyError, when training begins, for a name that the model does not have.
    """

    def __init__(self, energies: tuple[str, ...] | list[str] = (), k: int = 32, tol_degrees: float = 0.05) -> None:
        self.energies, self.k, self.tol_degrees = tuple(energies), k, tol_degrees
        self.base: dict[str, tuple[torch.Tensor, TopK]] = {}
        self.masked_weights = 0

    def install(self, trainer: Any) -> None:
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        weights = {bare(name): param for name, param in kwargs["model"].named_parameters()}
        missing = [name for name in self.energies if name not in weights]
        if missing:
            raise KeyError(f"the model has no parameter named {', '.join(missing)}")
        for name in self.energies:
            weight = weights[name].detach().clone()
            k = min(self.k, *weight.shape)
            self.base[name] = weight, topk_svd(weight, k, tol_degrees=self.tol_degrees)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        found = self.measure(kwargs["model"], unwrapped(kwargs.get("optimizer")))
        if logs is not None:
            logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def measure(self, model: torch.nn.Module, optimizer: MaskedAdamW | None) -> dict[str, float]:
        found: dict[str, float] = {}
        if optimizer is not None:
            found["masked_weights"] = sum(entry.count for entry in optimizer.entries.values())
            if optimizer.track_visible:
                found["visible_fraction"] = optimizer.visible_fraction()
                optimizer.reset_visible()
        weights = {bare(name): param for name, param in model.named_parameters()} if self.base else {}
        for name, (before, factors) in self.base.items():
            energy = update_energy(factors, weights[name].detach().float() - before.float())
            for side in ("left", "right", "both"):
                found[f"energy/{name}/{side}"] = getattr(energy, side)
                found[f"energy/{name}/isotropic_{side}"] = getattr(energy, f"isotropic_{side}")
        return found


def unwrapped(optimizer: Any) -> MaskedAdamW | None:
    """The MaskedAdamW inside what accelerate makes of it, or None."""
    while optimizer is not None and not isinstance(optimizer, MaskedAdamW):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
