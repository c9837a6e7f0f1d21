"""Callbacks of transformers' Trainer, and of those built on it, that log what training moved."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim import MaskedAdamW
from ..optim.local import is_sharded
from ..watch import UpdateWatch
from ..watch.change import layer_energies


class Logged(TrainerCallback):
    """A callback that adds to the trainer's logs.

    Pass it in ``callbacks=``. Reporting integrations (wandb and others) run before a user's callbacks and would miss
    what it adds: ``install(trainer)`` puts it before them instead.
    """

    def install(self, trainer: Any) -> None:
        trainer.callback_handler.callbacks.insert(0, self)

    def found(self, **kwargs: Any) -> dict[str, float]:
        """What the next log is to have."""
        raise NotImplementedError  # each callback below has its own

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        found = self.found(**kwargs)
        if logs is not None:
            logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)


class UpdateWatchCallback(Logged):
    """Measures every N steps what training has moved since it began, and adds it to the next log.

    Keys are those of :meth:`UpdateWatch.measure` behind ``prefix``: ``update/visible_fraction``,
    ``update/linear/relative_update``, ``update/energy/NAME/both``, ... Works with any optimizer, and with models that
    FSDP2 shards, where all processes measure together; of replicas, process 0 measures alone.

    Args:
        every: optimizer steps between measurements; a multiple of ``logging_steps``, say.
        prefix: of the keys.
        options: of :class:`UpdateWatch`, such as ``energies``, ``k``, ``keep``, ``base`` and ``basis``.

    Raises, when training begins, what :class:`UpdateWatch` does, and ValueError for a run that is resumed without
    ``base=``: its weights are not those that training began from.
    """

    def __init__(self, every: int = 10, prefix: str = "update/", **options: Any) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every, self.prefix, self.options = every, prefix, options
        self.watch: UpdateWatch | None = None
        self.measured: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_base(state, self.options.get("base"))
        self.watch, self.measured = None, {}
        model: torch.nn.Module = kwargs["model"]
        if state.is_world_process_zero or any(is_sharded(param) for param in model.parameters()):
            self.watch = UpdateWatch(model, **self.options)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.watch is not None and state.global_step % self.every == 0:
            self.measured = {f"{self.prefix}{key}": value for key, value in self.watch.measure().items()}

    def found(self, **kwargs: Any) -> dict[str, float]:
        found, self.measured = self.measured, {}
        return found


class UpdateLogger(Logged):
    """Adds to the trainer's logs what the optimizer moved since the last log.

    * ``visible_fraction``: share of all weights whose value in bf16 changed (an optimizer with ``track_visible=True``);
    * ``masked_weights``: how many weights the masks let move;
    * ``energy/<name>/left``, ``right``, ``both``: of the layers asked for, the share of the update since training began
      that lies in the base's top-k subspaces (arXiv 2511.08567, section 4.1), beside ``.../isotropic_*``.

    What an optimizer of another kind moved, and the update since training began as a whole: UpdateWatchCallback.

    Args:
        energies: parameter names to log energies of; each keeps a copy of the base weight. k: of their subspaces.
        tol_degrees: to which those subspaces are certified.
        base: as of :class:`UpdateWatch`, where energies are asked of a run that is resumed.

    Raises, when training begins, KeyError for a name that the model does not have, and ValueError for energies of a run
    that is resumed without ``base``: its weights are not those that training began from.
    """

    def __init__(
        self, energies: tuple[str, ...] | list[str] = (), k: int = 32, tol_degrees: float = 0.05, base: Any = None
    ) -> None:
        self.energies, self.k, self.tol_degrees, self.base = tuple(energies), k, tol_degrees, base
        self.watch: UpdateWatch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.energies:
            check_base(state, self.base)
            self.watch = UpdateWatch(
                kwargs["model"], include=self.energies, energies=self.energies, k=self.k,
                tol_degrees=self.tol_degrees, keep="device", exact=True, base=self.base,
            )  # fmt: skip

    def found(self, **kwargs: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        optimizer = unwrapped(kwargs.get("optimizer"))
        if optimizer is not None:
            found["masked_weights"] = sum(entry.count for entry in optimizer.entries.values())
            if optimizer.track_visible:
                found["visible_fraction"] = optimizer.visible_fraction()
                optimizer.reset_visible()
        if self.watch is not None:
            found |= layer_energies(self.watch.tensors())
        return found


def check_base(state: TrainerState, base: Any) -> None:
    if state.global_step and base is None:
        raise ValueError(
            f"the run resumes at step {state.global_step}, so its weights are not the base any more; "
            "pass base=, the checkpoint that training began from"
        )


def unwrapped(optimizer: Any) -> MaskedAdamW | None:
    """The MaskedAdamW inside what accelerate makes of it, or None."""
    while optimizer is not None and not isinstance(optimizer, MaskedAdamW):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
