"""MaskedAdamW: AdamW that moves, and keeps state for, only the coordinates of a mask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..bitmask import BitMask
from ..ops.masked_adamw import Rounding, Setting, Stepper
from ..ops.masked_adamw.contract import DTYPE_CODES
from . import saved
from .entry import Entry
from .local import local_tensor

# a mapping's keys are names or parameters
Masks: TypeAlias = Mapping[Any, BitMask | None] | Callable[[str, torch.Tensor], BitMask | None] | str | Path | None


class Held:
    """Keeps a dict out of reach of ``Optimizer.load_state_dict``, which casts every tensor to the parameter's dtype."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, restricted to masks: other coordinates keep their bits and have no state.

    With full masks, and moments in the parameters' dtype, steps are those of ``torch.optim.AdamW(fused=True)``: bit for
    bit on CPUs with AVX2 or AVX-512 but for the few elements that end its vectors, within rounding elsewhere.

    Args:
        params: parameters, groups of them, or ``model.named_parameters()``; bf16 or fp32, dense, DTensor included.
        lr: float or one-element tensor. betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        masks: which coordinates move. A mapping from parameter name (then pass named parameters) or from parameter to
            :class:`BitMask`, a file written by ``BitMask.save``, or a function of name and parameter. Parameters
            without a mask (or with None) move as a whole; freeze others with ``requires_grad_(False)``.
        rounding: how bf16 parameters are stored: ``"nearest"``; ``"stochastic"`` (seeded, the same for every sharding);
            ``"kahan"`` (2 more bytes per masked weight give lost digits back); ``"master"`` (2 more bytes make an exact
            fp32 master, whose trajectory is that of fp32 training; ties are rounded away from zero).
        state_dtype: of the moments, float32 or bfloat16.
        track_visible: count, in the step itself, the weights whose value in bf16 changed; see ``visible_mask``.
        seed: of stochastic rounding.
        backend: force one of ``reference``, ``cpu``, ``triton``.
        foreach, fused: accepted, without effect: a step is always one fused launch per combination of dtypes.

    Raises:
        ValueError: hyperparameters out of range; ``amsgrad``, ``capturable`` or ``differentiable`` asked for; masks
            that do not fit their parameters, or that belong to none (all of them listed).
        TypeError: parameters or state of other dtypes.

    Source: Loshchilov and Hutter, arXiv 1711.05101; masks after arXiv 2511.08567, section 5.
    """

    # GradScaler then hands over scale and overflow instead of unscaling the gradients in place
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        masks: Masks = None,
        rounding: str = "nearest",
        state_dtype: torch.dtype = torch.float32,
        track_visible: bool = False,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
    ) -> None:
        refuse(amsgrad=amsgrad, capturable=capturable, differentiable=differentiable)
        if rounding.upper() not in Rounding.__members__:
            raise ValueError(f"unknown rounding {rounding!r}; choose nearest, stochastic, kahan or master")
        if state_dtype not in DTYPE_CODES:
            raise TypeError(f"state_dtype must be torch.float32 or torch.bfloat16, got {state_dtype}")
        self.rounding, self.state_dtype = Rounding[rounding.upper()], state_dtype
        self.track_visible, self.seed, self.backend = track_visible, seed, backend
        self.entries: dict[torch.Tensor, Entry] = {}
        self.masks: Masks = None
        self._stepper: Stepper | None = None
        self._prepared: tuple[list[int], list[int]] = [], []
        self._taken: list[tuple[int, tuple[int, ...]]] = []  # param group and steps of every group of parts
        self._clock = torch.zeros(0, dtype=torch.int64)  # steps of all cohorts of the parts
        self._visible: list[tuple[list[int], torch.Tensor]] = []
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)
        self.set_masks(masks)

    # ---- parameters and masks

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; raises what the constructor does, and has added nothing then."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            refuse(**{name: group.get(name, False) for name in ("amsgrad", "capturable", "differentiable")})
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if self.entries:
            # groups added later move as a whole, unless the masks are a function or name them
            self._enter(self.masks if callable(self.masks) else present(self.masks, self._names()))

    def _names(self) -> dict[torch.Tensor, str]:
        """Every parameter and what messages call it."""
        named: dict[torch.Tensor, str] = {}
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"parameter {i} of group {g}" for i in range(len(group["params"]))]
            named.update(zip(group["params"], names, strict=True))
        return named

    def set_masks(self, masks: Masks) -> None:
        """Replace all masks. State of coordinates that stay is kept; new ones start at zero, as if at their first step.

        They get their own bias correction: coordinates that arrived together are a cohort with one count of steps. More
        than 256 cohorts of a parameter are not told apart: then the two oldest share the older one's count.

        Raises ValueError as the constructor does; nothing has changed then.
        """
        if isinstance(masks, str | Path):
            masks = BitMask.load(masks)
        self._enter(masks)

    def _enter(self, masks: Masks) -> None:
        chosen = choose(masks, self._names())
        for ordinal, (param, (name, mask)) in enumerate(chosen.items()):
            entry = self.entries.get(param)
            if entry is None:
                entry = Entry(param, name, ordinal, mask, self.rounding, self.state_dtype, self.track_visible)
                self.entries[param] = entry
            else:
                entry.set_mask(mask)
        self.masks, self._stepper, self._visible = masks, None, []

    # ---- the step

    @torch.compiler.disable(reason="the step is a kernel already, with tables that tracing would take for constants")
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. With ``closure``, evaluates it first, with gradients enabled, and returns its loss.

        Gradients are not modified. A step in which lr is 0 in every group and every gradient is zero changes nothing
        but creates the state, as checkpointing frameworks want it to.

        ``torch.compile`` leaves it as it is: of ``torch.compile(optimizer.step)`` nothing is compiled.

        Raises RuntimeError for sparse gradients and inside a CUDA graph's capture, ValueError for gradients of another
        dtype or device than the parameter.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "MaskedAdamW.step cannot be captured in a CUDA graph: counts of steps and tables of pointers live on "
                "the CPU, and a replay would repeat the captured ones; capture forward and backward, step outside"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # of the last step, which this one is about to be
        self._visible = []
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf):
            return loss
        params = [param for group in self.param_groups for param in group["params"]]
        found = [param.grad for param in params]
        active = [i for i, grad in enumerate(found) if grad is not None]
        grads = [grad if type(grad) is torch.Tensor else local_tensor(grad) for grad in found if grad is not None]
        stepper = self._prepare(params, active)
        groups = [setting_of(group, 1.0 if scale is None else float(scale)) for group in self.param_groups]
        settings = [groups[index] for index, _ in self._taken]
        if not active or (all(s.lr == 0 for s in settings) and not any(bool(grad.any()) for grad in grads)):
            return loss
        steps = [tuple(count + 1 for count in taken) for _, taken in self._taken]
        self._visible = stepper.step(grads, settings, steps, seed=self.seed, track=self.track_visible)
        self._taken = [(index, taken) for (index, _), taken in zip(self._taken, steps, strict=True)]
        self._clock += 1
        return loss

    def _prepare(self, params: list[torch.Tensor], active: list[int]) -> Stepper:
        """Tables of addresses, made anew where parameters, state or which of them have gradients changed."""
        key = active, [(p if type(p) is torch.nn.Parameter else local_tensor(p)).data_ptr() for p in params]
        if self._stepper is None or key != self._prepared:
            owner = [index for index, group in enumerate(self.param_groups) for _ in group["params"]]
            entries = [self.entries[params[i]] for i in active]
            for entry in entries:
                if not entry.state:
                    entry.start(self.state[entry.param])
            # parts that share a setting and have taken the same steps are described once
            keys = [(owner[i], entry.steps) for i, entry in zip(active, entries, strict=True)]
            self._taken = list(dict.fromkeys(keys))
            group = {key: i for i, key in enumerate(self._taken)}
            # one tensor counts for all: a step is then one addition
            self._clock = torch.cat([torch.zeros(0, dtype=torch.int64), *(entry.state["steps"] for entry in entries)])
            for entry, own in zip(entries, self._clock.split([len(taken) for _, taken in keys]), strict=True):
                entry.state["steps"] = own
            parts = [entry.part(group[key]) for entry, key in zip(entries, keys, strict=True)]
            self._stepper, self._prepared = Stepper(parts, self.rounding, self.backend), key
        return self._stepper

    # ---- visible changes

    def _tracked(self) -> None:
        if not self.track_visible:
            raise RuntimeError("visible changes are not tracked; construct the optimizer with track_visible=True")

    def visible_count(self) -> int:
        """Weights (of this process) whose value in bf16 the last step changed."""
        self._tracked()
        return sum(int(counts.sum()) for _, counts in self._visible)

    def visible_mask(self, which: str | torch.Tensor) -> BitMask:
        """Weights of a parameter (of this process' shard) whose bf16 value changed in any step since the last reset.

        Raises KeyError for a parameter that the optimizer does not have.
        """
        self._tracked()
        return self._entry(which).visible_mask()

    def visible_fraction(self) -> float:
        """Share of all weights (of this process) that ``visible_mask`` holds."""
        self._tracked()
        total = sum(entry.numel for entry in self.entries.values())
        return sum(entry.visible_count() for entry in self.entries.values()) / max(1, total)

    def reset_visible(self) -> None:
        """Forget visible changes so far."""
        self._tracked()
        for entry in self.entries.values():
            entry.reset_visible()

    def _entry(self, which: str | torch.Tensor) -> Entry:
        if isinstance(which, torch.Tensor):
            return self.entries[which]
        for entry in self.entries.values():
            if entry.name == which:
                return entry
        raise KeyError(f"the optimizer has no parameter named {which!r}; pass model.named_parameters() to have names")

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's. State of sharded parameters is given as dense DTensors, which reshard and merge."""
        found = super().state_dict()
        ids = dict(zip(chain.from_iterable(g["params"] for g in self.param_groups),
                       chain.from_iterable(g["params"] for g in found["param_groups"]), strict=True))  # fmt: skip
        for entry in self.entries.values():
            if entry.state and entry.sharded:
                found["state"][ids[entry.param]] = saved.dense_state(entry)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; the masks must be those it was saved with.

        Raises ValueError for state of other masks, roundings or shapes; all of it is listed, nothing has changed then.
        """
        state_dict = {**state_dict, "state": {key: Held(value) for key, value in state_dict["state"].items()}}
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "own": {
            name: getattr(self, name)
            for name in ("rounding", "state_dtype", "track_visible", "seed", "backend", "entries", "masks")
        }}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("own", None)
        if own is not None:
            self.__dict__.update(own)
        held = {param: value for param, value in state["state"].items() if isinstance(value, Held)}
        if held:
            loaded = saved.checked({self.entries[param]: value.state for param, value in held.items()})
            state = {**state, "state": defaultdict(dict, state["state"])}
            for entry, value in loaded.items():
                state["state"][entry.param] = value
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
        for entry in self.entries.values():
            entry.state = self.state.get(entry.param, {})
        self._stepper, self._prepared, self._visible = None, ([], []), []
        self._taken, self._clock = [], torch.zeros(0, dtype=torch.int64)


def refuse(**wanted: bool) -> None:
    why = {
        "amsgrad": "it needs a third moment",
        "capturable": "step counts live on the CPU",
        "differentiable": "steps are fused kernels without a derivative",
    }
    for name, value in wanted.items():
        if value:
            raise ValueError(f"MaskedAdamW does not support {name}=True: {why[name]}; use torch.optim.AdamW for that")


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError for hyperparameters out of range and TypeError for parameters that cannot be stepped."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor with one element, got shape {tuple(lr.shape)}")
    for name, value, fits in (
        ("lr", lr, float(lr) >= 0),
        ("eps", group["eps"], group["eps"] >= 0),
        ("betas[0]", beta1, 0 <= beta1 < 1),
        ("betas[1]", beta2, 0 <= beta2 < 1),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0),
    ):
        if not fits:
            raise ValueError(f"invalid {name}: {value}")
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
    wrong = [
        f"{name} is {param.dtype}" if param.layout == torch.strided else f"{name} has layout {param.layout}"
        for name, param in zip(names, group["params"], strict=True)
        if param.dtype not in DTYPE_CODES or param.layout != torch.strided
    ]
    if wrong:
        raise TypeError(f"MaskedAdamW steps dense bfloat16 and float32 parameters; {', '.join(wrong)}")


def setting_of(group: dict[str, Any], scale: float) -> Setting:
    beta1, beta2 = group["betas"]
    return Setting(
        float(group["lr"]), float(beta1), float(beta2), group["eps"], group["weight_decay"], group["maximize"], scale
    )


def choose(masks: Masks, names: dict[torch.Tensor, str]) -> dict[torch.Tensor, tuple[str, BitMask | None]]:
    """Name and mask of every parameter. Raises ValueError with a line per mask that does not fit."""
    wrong: list[str] = []
    if masks is None:
        found: dict[torch.Tensor, BitMask | None] = {}
    elif callable(masks):
        found = {param: masks(name, param) for param, name in names.items()}
    else:
        assert isinstance(masks, Mapping)
        params = {name: param for param, name in names.items()}
        found = {}
        for key, mask in masks.items():
            param = params.get(key) if isinstance(key, str) else key
            if param is None or param not in names:
                wrong.append(f"{key if isinstance(key, str) else 'a tensor'}: the optimizer has no such parameter")
            else:
                found[param] = mask
    for param, mask in found.items():
        if mask is not None and not isinstance(mask, BitMask):
            wrong.append(f"{names[param]}: expected a BitMask, got {type(mask).__name__}")
        elif mask is not None and mask.shape != param.shape:
            wrong.append(f"{names[param]}: the mask is {tuple(mask.shape)}, the parameter {tuple(param.shape)}")
    if wrong:
        hint = "; pass model.named_parameters() to have names" if not any_named(names) else ""
        raise ValueError(f"masks do not fit the parameters{hint}:\n  " + "\n  ".join(wrong))
    return {param: (name, found.get(param)) for param, name in names.items()}


def any_named(names: dict[torch.Tensor, str]) -> bool:
    return any(not name.startswith("parameter ") for name in names.values())


def present(masks: Masks, names: dict[torch.Tensor, str]) -> Masks:
    """The masks of a mapping as far as their parameters are there."""
    if not isinstance(masks, Mapping):
        return masks
    known = {*names.values(), *names}
    return {key: mask for key, mask in masks.items() if key in known}
