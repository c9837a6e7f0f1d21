"""Masks that the base weights alone decide: principal, low-magnitude, safe, and random ones of the same size.

Every function returns a :class:`~offprin_kernels.BitMask` with an exact number of coordinates; ties at the threshold
are broken by flat index, lowest first. Densities ``alpha`` are shares of all coordinates of the weight.

Source: arXiv 2511.08567, sections 4.2 and 5.1; principal weights as in LIFT, arXiv 2506.00772.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from numbers import Integral
from typing import Protocol, TypeAlias

import torch

from .bitmask import BitMask
from .checkpoint import is_linear
from .ops import lowrank_select
from .ops.subspace import topk_svd
from .packing import matrix_shape

__all__ = [
    "KINDS",
    "Factors",
    "count_for",
    "low_magnitude_mask",
    "mask_and_error",
    "principal_mask",
    "random_mask",
    "safe_mask",
    "weight_masks",
]

# what a mask of a whole model can be
KINDS = ("principal", "non-principal", "low", "safe", "random")

Share: TypeAlias = float | Fraction | Decimal


class Factors(Protocol):
    """Anything with truncated SVD factors of a weight ``[m, n]``, all on one device."""

    @property
    def U(self) -> torch.Tensor: ...  # [m, k]

    @property
    def S(self) -> torch.Tensor: ...  # [k]

    @property
    def Vh(self) -> torch.Tensor: ...  # [k, n]


def count_for(alpha: Share, total: int) -> int:
    """ceil(alpha * total), where a float means the decimal number it prints as: 0.1 of 10 is 1, not 2.

    Raises ValueError where alpha is not in (0, 1] or total is negative.
    """
    try:
        exact = alpha if isinstance(alpha, Fraction) else Fraction(str(alpha))
    except ValueError:
        raise ValueError(f"alpha must be a number in (0, 1], got {alpha!r}") from None
    if not 0 < exact <= 1:
        raise ValueError(f"alpha must lie in (0, 1], got {alpha!r}")
    if total < 0:
        raise ValueError(f"total must not be negative, got {total}")
    return -(-exact.numerator * total // exact.denominator)


def principal_mask(
    factors: Factors | tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    shape: Sequence[int],
    alpha: Share,
    *,
    backend: str | None = None,
) -> BitMask:
    """M_princ(k, alpha): the ceil(alpha * m * n) entries of largest ``|U @ diag(S) @ Vh|``.

    Args:
        factors: rank-k factors of the weight as ``(U, S, Vh)`` or as an object with these attributes: ``[m, k]``,
            ``[k]`` and ``[k, n]``, in any floating dtype (used in fp32). k and alpha are independent of each other.
        shape: shape of the weight; with leading dimensions flattened, m x n.
        alpha: share of coordinates, in (0, 1].
        backend: force one of ``reference``, ``cpu``, ``triton``.

    Returns:
        The mask, on the factors' device. The m x n reconstruction never exists. Backends sum in different orders and
        may differ in entries within fp32 rounding of the threshold.

    Raises:
        ValueError: factors that do not fit each other or the shape, hold NaN or Inf, or overflow fp32; a bad alpha.

    Source: arXiv 2511.08567, section 4.2; arXiv 2506.00772.
    """
    u, s, vh = factors if isinstance(factors, tuple) else (factors.U, factors.S, factors.Vh)
    m, n = matrix_shape(shape)
    if u.dim() != 2 or vh.dim() != 2 or (u.shape[0], vh.shape[1]) != (m, n):
        raise ValueError(
            f"U is {tuple(u.shape)} and Vh {tuple(vh.shape)}; a weight of shape {tuple(shape)} needs {m} x {n}"
        )
    words = lowrank_select.select_lowrank(u.float(), s.float(), vh.float(), count_for(alpha, m * n), backend=backend)
    return BitMask(words, shape, check=False)


def low_magnitude_mask(weight: torch.Tensor, alpha: Share, *, backend: str | None = None) -> BitMask:
    """M_low(alpha): the ceil(alpha * m * n) entries of smallest ``|weight|``, compared exactly; -0 equals +0.

    Args:
        weight: bf16, fp16 or fp32, any shape.
        alpha: share of coordinates, in (0, 1].
        backend: force one of ``reference``, ``cpu``, ``triton``.

    Raises:
        TypeError: another dtype.
        ValueError: NaN or Inf in the weight, or a bad alpha.

    Source: arXiv 2511.08567, section 4.2.
    """
    words = lowrank_select.select_smallest(weight, count_for(alpha, weight.numel()), backend=backend)
    return BitMask(words, weight.shape, check=False)


def safe_mask(
    weight: torch.Tensor,
    factors: Factors | tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    alpha: Share,
    *,
    backend: str | None = None,
) -> BitMask:
    """The safe set: M_low(alpha) | ~M_princ(k, alpha), with the same alpha for both.

    Arguments and errors are those of :func:`low_magnitude_mask` and :func:`principal_mask`.

    Source: arXiv 2511.08567, section 5.1.
    """
    principal = principal_mask(factors, weight.shape, alpha, backend=backend)
    return low_magnitude_mask(weight, alpha, backend=backend) | ~principal


def random_mask(
    shape: Sequence[int],
    density_or_count: Share | int,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> BitMask:
    """A uniformly random set of exact size: the control for masks of the same density.

    The same shape, size and seed give the same set on every device and backend; a larger set contains a smaller one.

    Args:
        shape: shape of the weight.
        density_or_count: an int is the number of coordinates (0 allowed); anything else their share, in (0, 1], rounded
            up as in :func:`count_for`. So 1 is one coordinate and 1.0 all of them.
        seed: 0 to 2^63 - 1. Give each weight its own, or weights of one shape share one set.
        device: where the mask is made.
        backend: force one of ``reference``, ``cpu``, ``triton``.

    Raises:
        ValueError: a count, density or seed out of range.

    Source: arXiv 2511.08567, section 5.1 (random masks of equal density for each layer).
    """
    m, n = matrix_shape(shape)
    given = isinstance(density_or_count, Integral)
    count = int(density_or_count) if given else count_for(density_or_count, m * n)
    words = lowrank_select.select_random(m, n, count, seed, device=device, backend=backend)
    return BitMask(words, shape, check=False)


def mask_and_error(
    weight: torch.Tensor, kind: str, alpha: Share, *, k: int = 128, seed: int = 0, tol_degrees: float = 0.05
) -> tuple[BitMask, float]:
    """One matrix' mask of a kind, and the certificate of its factors in degrees (0 where it needs none)."""
    if kind == "random":
        return random_mask(weight.shape, alpha, seed, device=weight.device), 0.0
    if kind == "low" or not weight.numel():
        return low_magnitude_mask(weight, alpha), 0.0
    factors = topk_svd(weight, min(k, *weight.shape), tol_degrees=tol_degrees)
    if kind == "safe":
        return safe_mask(weight, factors, alpha), float(factors.error_degrees)
    mask = principal_mask(factors, weight.shape, alpha)
    return (~mask if kind == "non-principal" else mask), float(factors.error_degrees)


def weight_masks(
    weights: Mapping[str, torch.Tensor],
    kind: str,
    alpha: Share,
    *,
    k: int = 128,
    seed: int = 0,
    tol_degrees: float = 0.05,
) -> dict[str, BitMask]:
    """Masks of the linear layers of a model: of its state dict, or of ``dict(model.named_parameters())``.

    Embeddings, norms, biases and the head get none. ``offprin mask`` does the same for a checkpoint on disk.

    Args:
        weights: by name; linear layers are 2-D, or 3-D with a matrix per expert, in bf16, fp16 or fp32.
        kind: ``principal``, ``non-principal``, ``low``, ``safe`` or ``random``.
        alpha: share of coordinates, in (0, 1], as in the functions for one matrix.
        k: of the principal subspaces, at most the smaller size of a matrix.
        seed: of random masks; every layer gets its own.
        tol_degrees: to which principal subspaces are certified. Where one misses it, a warning says so.

    Raises:
        ValueError: an unknown kind, no linear layer, a weight with NaN or Inf (named), a bad alpha or k.

    Source: arXiv 2511.08567, sections 4.2 and 5.1.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    linear = {name: w.detach() for name, w in weights.items() if is_linear(name, tuple(w.shape))}
    if not linear:
        raise ValueError(f"none of the {len(weights)} weights is a linear layer; pass model.state_dict()")
    found, missed = {}, []
    for index, (name, weight) in enumerate(linear.items()):
        try:
            made = [
                mask_and_error(matrix, kind, alpha, k=k, seed=seed + index + start, tol_degrees=tol_degrees)
                for start, matrix in zip(range(0, 1 << 62, weight.shape[-2]), matrices(weight), strict=False)
            ]
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
        words = torch.cat([mask.words for mask, _ in made])
        found[name] = BitMask(words, weight.shape, check=False)
        if max(error for _, error in made) > tol_degrees:
            missed.append(name)
    if missed:
        warnings.warn(
            f"principal subspaces of {', '.join(missed)} are certified to more than {tol_degrees} degrees", stacklevel=2
        )
    return found


def matrices(weight: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of a linear layer: itself, or one per expert."""
    return [weight] if weight.ndim == 2 else list(weight.reshape(-1, *weight.shape[-2:]))
