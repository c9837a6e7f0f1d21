"""UpdateWatch: what training has moved so far, on a live model, sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, is_linear
from ..ops.update_scan.contract import DTYPE_CODES
from ..optim.local import bare, local_tensor
from .basis import Layer, Wanted, build
from .change import TensorChange, summary
from .collect import collect
from .look import Watched, look
from .sources import sources
from .spread import Spread, spread_of


class UpdateWatch:
    """Compares a model that trains with the weights it began from: the cheap part of ``offprin analyze``.

    Args:
        model: at its start, after it was wrapped and sharded. Parameters in bf16, fp16 and fp32 are compared, frozen
            ones too, tied ones once; DTensors (FSDP2, HSDP, tensor parallelism) where they lie.
        base: None takes a snapshot now. Or a :class:`Checkpoint`, opened or as a path, read slab by slab at each
            measurement; or a state dict, which is not copied and must not be the model's own memory.
        include: which parameters, as names or as a function of name and parameter; by default all.
        energies: names of 2-D weights to measure the energy of, or ``"linear"`` for all linear layers.
        k: of their principal subspaces, or as many as a layer has. tol_degrees: to which those are certified.
        keep: where the snapshot lies: ``"cpu"``, or ``"device"``, beside the parameters.
        exact: compare fp32 and fp16 weights un-rounded in norms and energies, with a snapshot in their own dtype. By
            default everything is about bf16 values, and the snapshot takes 2 bytes a weight. Counts are always of bf16
            values.
        basis: a safetensors file of the subspaces. It is read where it exists, so that a resumed run does not compute
            them again, and else written (by process 0).

    Measuring is collective for DTensors: all processes of their mesh call it, and all get the same numbers. Without
    DTensors (one process, DDP) no process waits for another, and one may measure alone. Between steps only: FSDP must
    not hold gathered parameters.

    Raises:
        KeyError: a name in ``include`` or ``energies`` that the model does not have.
        ValueError: a base that does not fit; FSDP1 or DeepSpeed ZeRO-3, whose parameters are not whole anywhere; a
            layer that has no energies (no matrix, not compared, cut along both its dimensions); a ``basis`` of another
            base, k, shape or coarser tolerance; NaN in such a layer.

    Source: arXiv 2511.08567, sections 2.1 and 4.1.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        base: Checkpoint | str | Path | Mapping[str, torch.Tensor] | None = None,
        include: Collection[str] | Callable[[str, torch.Tensor], bool] | None = None,
        energies: Collection[str] | str = (),
        k: int = 32,
        tol_degrees: float = 0.05,
        keep: str = "cpu",
        exact: bool = False,
        basis: str | Path | None = None,
    ) -> None:
        if keep not in ("cpu", "device"):
            raise ValueError(f"keep must be 'cpu' or 'device', got {keep!r}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if isinstance(base, str | Path):
            base = Checkpoint.open(base)
        self.model, self.exact = model, exact
        refuse(model)
        params = chosen(named(model), include)
        spreads = {name: spread_of(name, param) for name, param in params.items()}
        layers = layers_of(energies, params, spreads, known=named(model))
        found = sources(params, spreads, base, None if exact else torch.bfloat16, keep)
        self.watched = [
            Watched(
                name, tuple(param.shape), tuple(local_tensor(param).shape), is_linear(name, param.shape),
                spreads[name], found[name], rounded=param.dtype == torch.bfloat16,
            )
            for name, param in params.items()
        ]  # fmt: skip
        wanted = Wanted(k, tol_degrees, torch.float32 if exact else torch.bfloat16, Path(basis) if basis else None)
        factors = build([Layer(name, params[name], spreads[name], found[name]) for name in layers], wanted)
        for watched in self.watched:
            watched.factors = factors.get(watched.name)

    @property
    def sharded(self) -> bool:
        """Whether measuring is collective."""
        return any(watched.spread is not None for watched in self.watched)

    def measure(self) -> dict[str, float]:
        """Sums over all tensors, and the same under ``linear/`` over the weights of linear layers, where there are any:

        * ``changed`` of ``total`` weights (counts), ``visible_fraction``, ``sparsity`` = 1 - visible_fraction;
        * ``relative_update``: ||D||_F / ||W0||_F over all coordinates; ``update_max``: max |D|;
        * ``sign_flips``, ``nonfinite`` (NaN and Inf among the present values): counts;
        * ``energy/NAME/left``, ``right``, ``both`` of the layers asked for, beside ``isotropic_left``, ``..._right``,
          ``..._both``, which a random update would have; ``energy/mean/...`` over these layers. 0 before an update.
        """
        return summary(self.tensors())

    @torch.no_grad()
    def tensors(self) -> list[TensorChange]:
        """Every tensor's numbers. One pass over base and model; a few small sums over processes.

        Raises RuntimeError for a parameter that is gone or lies otherwise than when the watch began.
        """
        now = named(self.model)
        looks = []
        for watched in self.watched:
            param = now.get(watched.name)
            if (
                param is None
                or tuple(local_tensor(param).shape) != watched.local_shape
                or spread_of(watched.name, param) != watched.spread
            ):
                raise RuntimeError(
                    f"{watched.name} is not what it was when the watch began; begin after the model is wrapped and "
                    "sharded, and measure between steps (FSDP: model.reshard() first)"
                )
            looks.append(look(watched, local_tensor(param).detach(), self.exact))
        return collect(self.watched, looks)


# ---- what is watched ------------------------------------------------------------------------------------------------


def named(model: torch.nn.Module) -> dict[str, Any]:
    """Parameters by name without wrappers, tied ones once."""
    found: dict[str, Any] = {}
    for name, param in model.named_parameters():
        if bare(name) in found:
            raise ValueError(f"{name} and another parameter have one name, {bare(name)}, but for wrappers; unwrap them")
        found[bare(name)] = param
    return found


def refuse(model: torch.nn.Module) -> None:
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("FSDP1 flattens parameters, so that none has its shape; use FSDP2 (fully_shard)")
    for name, param in model.named_parameters():
        if hasattr(param, "ds_id"):
            raise ValueError(f"{name} is a parameter of DeepSpeed ZeRO-3, which holds no shape; use FSDP2 or ZeRO-2")
        if param.is_meta:
            raise ValueError(f"{name} is on the meta device: it has no values yet; load the model first")


def chosen(
    params: dict[str, Any], include: Collection[str] | Callable[[str, torch.Tensor], bool] | None
) -> dict[str, Any]:
    fit = {name: param for name, param in params.items() if param.dtype in DTYPE_CODES}
    if include is None:
        return fit
    if callable(include):
        return {name: param for name, param in fit.items() if include(name, param)}
    absent([name for name in include if name not in params])
    return {name: param for name, param in fit.items() if name in set(include)}


def absent(names: list[str]) -> None:
    if names:
        raise KeyError(f"the model has no parameter named {', '.join(names)}")


def layers_of(
    energies: Collection[str] | str,
    params: dict[str, Any],
    spreads: dict[str, Spread | None],
    known: Collection[str],
) -> list[str]:
    """Names of the layers whose energies are wanted, in the model's order."""
    if isinstance(energies, str):
        if energies != "linear":
            raise ValueError(f"energies are names of parameters or 'linear', got {energies!r}")
        energies = [name for name, param in params.items() if param.ndim == 2 and is_linear(name, param.shape)]
    absent([name for name in energies if name not in known])
    for name in energies:
        if name not in params:
            raise ValueError(f"{name} is not compared (include leaves it out, or it is not bf16, fp16 or fp32)")
        param, spread = params[name], spreads[name]
        if param.ndim != 2 or not param.numel():
            raise ValueError(f"{name} has shape {tuple(param.shape)}; energies are of matrices")
        if spread is not None and (spread.strided or len(spread.cut_dimensions) > 1):
            raise ValueError(f"{name} is sharded by two mesh dimensions at once; its energies are not measured")
    return [name for name in params if name in set(energies)]
