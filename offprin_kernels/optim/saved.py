"""State as it is saved and loaded: checked against the masks, dense where sharded, and as a dense AdamW has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import compact
from .entry import KEPT, MAX_COHORTS, Entry
from .local import is_sharded, like, local_tensor

if TYPE_CHECKING:
    from .masked_adamw import MaskedAdamW


def tensor_names(entry: Entry) -> list[str]:
    """Names of the compact tensors in an entry's state, but for the cohorts."""
    return ["exp_avg", "exp_avg_sq", *([KEPT[entry.rounding][0]] if entry.rounding in KEPT else [])]


def dense(entry: Entry, name: str) -> torch.Tensor:
    """A compact tensor as the process' part of the parameter has it; zeros outside the mask."""
    return compact.spread(entry.state[name], entry.words, entry.numel).view(entry.place.shape)


def dense_state(entry: Entry) -> dict[str, Any]:
    """State of a sharded parameter, each tensor a dense DTensor, which torch.distributed.checkpoint reshards.

    Its names and shapes are the same whatever the history, as loading in place needs: counts of steps are padded with
    -1, and there are always cohorts.
    """
    tensors = {name: like(entry.param, dense(entry, name)) for name in tensor_names(entry)}
    if "cohort" in entry.state:
        cohort = dense(entry, "cohort")
    else:
        cohort = torch.zeros(entry.place.shape, dtype=torch.uint8, device=local_tensor(entry.param).device)
    steps = torch.full((MAX_COHORTS,), -1, dtype=torch.int64)
    steps[: len(entry.steps)] = entry.state["steps"]
    return {**tensors, "cohort": like(entry.param, cohort), "steps": steps, "mask_digest": entry.state["mask_digest"]}


def checked(loaded: dict[Entry, dict[str, Any]]) -> dict[Entry, dict[str, Any]]:
    """Copies of loaded state, compact and on the right device. Raises ValueError with a line per misfit."""
    wrong: list[str] = []
    result = {}
    for entry, state in loaded.items():
        problem = misfit(entry, state) if state else None
        if problem:
            wrong.append(f"{entry.name}: {problem}")
        else:
            result[entry] = own_state(entry, state) if state else {}
    if wrong:
        raise ValueError("the state does not fit this optimizer:\n  " + "\n  ".join(wrong))
    return result


def misfit(entry: Entry, state: dict[str, Any]) -> str | None:
    """What is wrong with a parameter's loaded state, or None."""
    if "mask_digest" not in state:
        return "the state is not MaskedAdamW's; load a dense AdamW's with load_adamw_state"
    saved = int(state["mask_digest"])
    if saved != entry.digest:
        return f"it was saved with mask {saved:016x}, the optimizer has {entry.digest:016x}"
    for name in tensor_names(entry):
        if name not in state:
            return (
                f"it has no {name}, which rounding {entry.rounding.name.lower()!r} needs; load it with its own rounding"
            )
        tensor = state[name]
        known = (entry.count,), entry.place.shape, entry.place.whole
        if tuple(tensor.shape) not in known or (tensor.shape == entry.place.whole and not fits_whole(entry, tensor)):
            return (
                f"{name} is {tuple(tensor.shape)}, expected {entry.count} entries or {entry.place.whole}; state of "
                "another world size is resharded by torch.distributed.checkpoint"
            )
        expected = KEPT[entry.rounding][1] if name not in ("exp_avg", "exp_avg_sq") else entry.state_dtype
        if tensor.dtype != expected:
            return f"{name} is {tensor.dtype}, the optimizer keeps {expected}; construct it with that state_dtype"
    cohorts = int((torch.as_tensor(state["steps"]) >= 0).sum())
    if cohorts > 1:
        numbers = local_tensor(state["cohort"]) if "cohort" in state else torch.full((1,), cohorts)
        if numbers.numel() and int(numbers.max()) >= cohorts:
            return f"it counts the steps of {cohorts} cohorts, and its coordinates are in others; the file is damaged"
    extra = {name for name, _ in KEPT.values()} & state.keys() - set(tensor_names(entry))
    if extra:
        return f"it has {extra.pop()}, which rounding {entry.rounding.name.lower()!r} would lose; load it with its own"
    return None


def fits_whole(entry: Entry, tensor: torch.Tensor) -> bool:
    """Whether a tensor of the whole parameter's shape can be this process' part of it."""
    return entry.place.complete or is_sharded(tensor)


def own_state(entry: Entry, state: dict[str, Any]) -> dict[str, Any]:
    device = local_tensor(entry.param).device
    steps = torch.as_tensor(state["steps"]).cpu().to(torch.int64)
    result: dict[str, Any] = {"steps": steps[steps >= 0]}
    for name in [*tensor_names(entry), *(["cohort"] if len(result["steps"]) > 1 else [])]:
        tensor = local_tensor(state[name]).to(device)
        if tensor.dim() != 1 or len(tensor) != entry.count:
            tensor = compact.gather(tensor.reshape(-1), entry.words)
        result[name] = tensor.clone()
    result["mask_digest"] = torch.tensor(entry.digest)
    return result


def adamw_state(optimizer: MaskedAdamW) -> dict[str, Any]:
    """State dict for a ``torch.optim.AdamW`` over the same parameters: dense moments, zero outside the masks.

    Coordinates of all cohorts get the count of steps of the oldest that has any. Moments have the optimizer's
    ``state_dtype``; note that loading casts them to the parameters' dtype. Masters and compensations are not part of
    it: see ``master_weight``. Raises ValueError for sharded parameters.
    """
    found = optimizer.state_dict()
    for group in found["param_groups"]:
        group.update(amsgrad=False, foreach=None, capturable=False, differentiable=False, fused=None)
        group.setdefault("decoupled_weight_decay", True)
    state = {}
    for index, entry in enumerate(optimizer.entries.values()):
        if entry.sharded:
            raise ValueError(f"{entry.name} is sharded; gather it with torch.distributed.checkpoint.state_dict first")
        if entry.state:
            members = entry.state["cohort"].unique().tolist() if "cohort" in entry.state else [0]
            step = torch.tensor(float(max(entry.steps[i] for i in members)))
            state[index] = {"step": step, **{name: dense(entry, name) for name in ("exp_avg", "exp_avg_sq")}}
    found["state"] = state
    return found


def load_adamw_state(optimizer: MaskedAdamW, state_dict: dict[str, Any]) -> None:
    """Take the moments of a dense AdamW (its ``state_dict``) at the masked coordinates, and its counts of steps.

    Hyperparameters stay the optimizer's own. Raises ValueError for state of another number of parameters, other shapes,
    amsgrad, or sharded parameters.
    """
    entries = list(optimizer.entries.values())
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    if len(saved) != len(entries):
        raise ValueError(f"the state is of {len(saved)} parameters, the optimizer has {len(entries)}")
    found: dict[Entry, dict[str, Any]] = {}
    for index, entry in zip(saved, entries, strict=True):
        state = state_dict["state"].get(index)
        if not state:
            continue
        if entry.sharded or "max_exp_avg_sq" in state or state["exp_avg"].shape != entry.param.shape:
            raise ValueError(
                f"{entry.name}: expected dense moments {tuple(entry.param.shape)} of an unsharded parameter, without "
                f"amsgrad; got {tuple(state['exp_avg'].shape)}"
            )
        found[entry] = state
    for entry, state in found.items():
        entry.start(optimizer.state[entry.param])
        for name in ("exp_avg", "exp_avg_sq"):
            moments = state[name].to(entry.param.device, entry.state_dtype).reshape(-1)
            entry.state[name] = compact.gather(moments, entry.words)
        entry.steps = (round(float(state["step"])),)
    optimizer._stepper = None


def master_weight(optimizer: MaskedAdamW, which: str | torch.Tensor) -> torch.Tensor:
    """fp32 weights of a parameter (this process' part): with its low bits or compensation where the rounding keeps any.

    Raises KeyError for a parameter that the optimizer does not have.
    """
    from ..numerics import bf16_codes, join_master
    from ..ops.masked_adamw import Rounding

    entry = optimizer._entry(which)
    param = local_tensor(entry.param).detach()
    if not entry.state or entry.rounding not in KEPT:
        return param.float()
    kept = dense(entry, KEPT[entry.rounding][0])
    if entry.rounding == Rounding.MASTER:
        return join_master(bf16_codes(param), kept.to(torch.int32) & 0xFFFF)
    return param.float() + kept.float()
