"""Interventions on tensors: each tensor can be changed on its own, since the record says all that the others need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..bitmask import BitMask
from ..checkpoint.dtypes import TAGS
from ..numerics import shifted_right, splitmix64
from .attention import attention_layers, choose_layers, heads_of, place
from .record import Intervention, draw, stream


def rotate(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, object],
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Rotate values and outputs of attention heads: V's output rows by R, O's input columns by R transposed.

    Each layer and KV head has its own random orthogonal R (head size squared, Haar, fp64). The function is unchanged in
    exact arithmetic; here it changes by one rounding of each rotated weight. Q, K, their norms and O's bias stay.

    The control of a rotation is no inverse: it mixes coordinates, so masks do not map back. Tune the rotated weights,
    and compare that update mask with the exponent-conditioned null of the *rotated* weights (:mod:`..nulls`).

    Args:
        tensors: a state dict; attention in bf16, fp16 or fp32: ``q_proj.weight`` [Hq D, hidden], ``k_proj.weight`` and
            ``v_proj.weight`` [Hkv D, hidden], ``o_proj.weight`` [hidden, Hq D], biases where the model has them.
        config: the contents of ``config.json`` (``model.config.to_dict()``).
        layers: numbers of layers; None for all.
        seed: 0 <= seed < 2^63.

    Returns:
        The changed tensors, new, by name: ``{**tensors, **rotate(tensors, ...)}`` is the whole model.

    Raises:
        ValueError: attention that is not supported (the tensor or model type is named), shapes that do not fit the
            config, unknown layers, a bad seed, weights with NaN or Inf, fp16 weights that overflow.

    Source: arXiv 2511.08567, section 4.3 and appendix D.
    """
    return apply(tensors, plan("rotate", tensors, config, layers, seed))


def permute(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, object],
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Permute KV heads with their query groups, and query heads inside each group.

    Rows of Q, K and V with their biases, q/k norms as wide as all heads, and O's input columns move together. Weights
    keep their bits; what each head computes stays the same; the model's output can differ by the order of O's sums.
    KV heads never stay all in place, nor do the query heads of a single KV head.

    Arguments, result, errors and source as in :func:`rotate`; NaN and Inf are moved as they are.
    """
    return apply(tensors, plan("permute", tensors, config, layers, seed))


def plan(
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, object],
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Intervention:
    """The record of an intervention on this model, for :func:`apply`. Errors as in :func:`rotate`."""
    layout = {name: (TAGS.get(tensor.dtype, str(tensor.dtype)), tensor.shape) for name, tensor in tensors.items()}
    chosen = choose_layers(layers, attention_layers(config, layout))
    return draw(kind, seed, chosen, heads_of(config))


def apply(tensors: Mapping[str, torch.Tensor], record: Intervention) -> dict[str, torch.Tensor]:
    """The tensors that the intervention changes, new, by name, in their dtype, on their device."""
    return {
        name: transformed(name, tensor, record)
        for name, tensor in tensors.items()
        if touches(record, name, tensor.shape)
    }


def undo(tensors: Mapping[str, torch.Tensor], record: Intervention) -> dict[str, torch.Tensor]:
    """The inverse of :func:`apply`: the original's bits after a permutation, to rounding after a rotation."""
    return {
        name: transformed(name, tensor, record, inverse=True)
        for name, tensor in tensors.items()
        if touches(record, name, tensor.shape)
    }


def touches(record: Intervention, name: str, shape: Sequence[int]) -> bool:
    """Whether the intervention changes a tensor of this name and shape."""
    found = place(name)
    if found is None or found[0] not in record.layers:
        return False
    _, part, leaf = found
    if part == "o_proj" and leaf == "bias":
        return False
    if record.kind == "rotate":
        return part in ("v_proj", "o_proj")
    # A norm of one head's size is shared by all heads, and a single KV head has nowhere to go.
    shared = part.endswith("_norm") and tuple(shape) == (record.heads.size,)
    return record.heads.count(part) > 1 and not shared


def transformed(name: str, tensor: torch.Tensor, record: Intervention, inverse: bool = False) -> torch.Tensor:
    """One tensor that the intervention :func:`touches`, after it, or before it. Raises ValueError as :func:`rotate`."""
    found = place(name)
    assert found is not None
    layer, part, leaf = found
    dimension = 1 if part == "o_proj" else 0
    count, size = record.heads.count(part), record.heads.size
    if (
        tensor.dim() != (2 if leaf == "weight" and part.endswith("_proj") else 1)
        or tensor.shape[dimension] != count * size
    ):
        raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, which is not made of {count} heads of {size}")
    if record.kind == "permute":
        blocks = tensor.unflatten(dimension, (count, size))
        index = torch.tensor(head_order(record, layer, part, inverse), device=tensor.device)
        return blocks.index_select(dimension, index).flatten(dimension, dimension + 1)
    out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    # Head by head, so that fp64 copies are never larger than one head's block.
    for head in range(count):
        kv = head // record.heads.group if part == "o_proj" else head
        turn = rotation(record.seed, layer, kv, size).to(tensor.device)
        turn = turn.T if inverse else turn
        block = slice(head * size, (head + 1) * size)
        if part == "o_proj":
            out[:, block] = round_once(tensor[:, block].double() @ turn.T, tensor.dtype)
        else:
            out[block] = round_once(turn @ tensor[block].double(), tensor.dtype)
    if not bool(out.isfinite().all()):
        raise ValueError(f"tensor {name} has NaN or Inf, or overflows {tensor.dtype} when rotated")
    return out


def head_order(record: Intervention, layer: int, part: str, inverse: bool = False) -> list[int]:
    """``order[new] = old`` for the heads of a module after a permutation; with ``inverse``, ``order[old] = new``."""
    order = record.orders[layer]
    heads = order.query if record.heads.count(part) == record.heads.query else order.kv
    return sorted(range(len(heads)), key=heads.__getitem__) if inverse else list(heads)


def rotation(seed: int, layer: int, head: int, size: int) -> torch.Tensor:
    """A random orthogonal matrix, fp64 [size, size], uniform (Haar); the same for the same arguments.

    QR of a Gaussian matrix with the signs of R's diagonal moved into Q: Mezzadri, arXiv math-ph/0609050, section 5.
    """
    bits = splitmix64(stream(seed, layer, head), torch.arange(2 * size * size))
    # 53 bits, the middle of each step, so that the logarithm never sees zero.
    radius, angle = ((shifted_right(bits, 11).double() + 0.5) * 2.0**-53).view(2, size, size)
    gaussian = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
    orthogonal, upper = torch.linalg.qr(gaussian)
    return orthogonal * torch.where(upper.diagonal() < 0, -1.0, 1.0)


def round_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 -> bf16, fp16 or fp32, to nearest even, in one rounding (torch goes through fp32, which makes it two)."""
    near = x.float()
    if dtype == torch.float32:
        return near
    # Round to odd on the way: then the last rounding decides as if it saw all of x (Boldo and Melquiond, 2008).
    inexact = near.double() != x
    away = near.double().abs() > x.abs()
    bits = near.view(torch.int32) - away.int()
    return torch.where(inexact, bits | 1, bits).view(torch.float32).to(dtype)


def invert_mask(mask: BitMask, name: str, record: Intervention) -> BitMask:
    """A mask of a permuted model's tensor, mapped back to the coordinates of the model before.

    This is the control of a permutation: tune the permuted model, take its update mask, map it back, and compare it
    with the mask of the model that was tuned without. A mask of a tensor that was left alone comes back as it is.

    Args:
        mask: of the tensor's own shape, such as [Hq D, hidden] for ``q_proj.weight``.
        name: the tensor's name.
        record: what was done.

    Raises:
        ValueError: a tensor that was rotated (its coordinates are mixed, see :func:`rotate`), or a mask that does not
            fit the heads.

    Source: arXiv 2511.08567, section 4.3 and appendix D.
    """
    if not touches(record, name, mask.shape):
        return mask
    if record.kind == "rotate":
        raise ValueError(
            f"{name} was rotated, which mixes its coordinates: no mask maps back; compare with the "
            "exponent-conditioned null of the rotated weights"
        )
    found = place(name)
    assert found is not None
    layer, part, _ = found
    count, size = record.heads.count(part), record.heads.size
    dimension = 1 if part == "o_proj" else 0
    if len(mask.shape) <= dimension or mask.shape[dimension] != count * size:
        raise ValueError(
            f"the mask of {name} has shape {list(mask.shape)}, which is not made of {count} heads of {size}"
        )
    index = torch.tensor(head_order(record, layer, part, inverse=True), device=mask.device)
    if len(mask.shape) == 2 and dimension == 0:
        words = mask.words.unflatten(0, (count, size)).index_select(0, index).flatten(0, 1)
    elif size % 8 == 0:
        # Heads are whole bytes, so that nothing is unpacked; the padding behind them is zero.
        words = torch.zeros_like(mask.words)
        used = count * size // 8
        words[:, :used] = mask.words[:, :used].unflatten(1, (count, size // 8)).index_select(1, index).flatten(1, 2)
    else:
        dense = mask.to_dense().unflatten(dimension, (count, size)).index_select(dimension, index)
        return BitMask.from_dense(dense.flatten(dimension, dimension + 1))
    return BitMask(words, mask.shape, check=False)
