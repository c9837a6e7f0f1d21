"""Top-k singular subspaces of weights, with a certificate: an angle bound that says what may be read from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from . import correction, gram, krylov, plan, reference
from .contract import METHODS, Solution, TopK
from .operand import Operand

__all__ = ["METHODS", "TopK", "element", "least_tolerance", "search_rows", "topk_svd", "whole_gram"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Batch(TopK):
    """Of a batch of weights, of which some may have converged and others not."""

    met: torch.Tensor | None = None  # bool [...]: whether each met the tolerance


def topk_svd(
    weight: torch.Tensor,
    k: int,
    *,
    tol_degrees: float = 0.05,
    method: str = "auto",
    warm_start: TopK | None = None,
    seed: int = 0,
) -> TopK:
    """Top-k singular triplets of a weight, iterated until their own certificate meets a tolerance.

    Args:
        weight: ``[..., m, n]``, bf16, fp16, fp32 or fp64; leading dimensions are a batch of weights.
        k: how many, 1 <= k <= min(m, n).
        tol_degrees: largest angle allowed between the computed and the true k-dimensional subspaces, in degrees.
        method: ``"krylov"`` (block Lanczos), ``"gram"`` (Gram matrix and eigensolver), ``"correction"`` (polynomial
            correction of a block), ``"reference"`` (full fp64 SVD) or ``"auto"``: by cost.
        warm_start: result for a related weight of the same shape (its base, say), whose search space is the start.
        seed: of the random start; the same seed gives the same result on the same machine.

    Returns:
        :class:`TopK`. ``converged`` is False where the certificate misses the tolerance: then the iteration met its
        limit, or the gap s_k - s_{k+1} is too small for rounding (``rounding_degrees``) or vanishes, so that no such
        subspace is defined. The certificate is rigorous given an estimate of the spectrum outside the search space.

    Raises:
        TypeError: integer or other dtypes.
        ValueError: fewer than two dimensions, k outside 1..min(m, n), NaN or Inf, a tolerance that is not positive or
            below what fp32 vectors can show, an unknown method, a warm start of another shape or device.

    Source: arXiv 2511.08567, section 3.2; methods in krylov.py, gram.py and correction.py.
    """
    check(weight, k, tol_degrees, method, warm_start)
    if weight.ndim > 2 and weight.device.type == "cpu":
        return batched(weight, k, tol_degrees, method, warm_start, seed)
    operand = Operand(weight)
    found = solve(operand, k, tol_degrees, method, warm_start, seed)
    return package(operand, found, k, tol_degrees)


def stored(k: int) -> float:
    """Degrees by which rounding to fp32 can turn the span of k unit vectors: half a unit in the last place of each."""
    return math.degrees(2.0**-24 * k**0.5)


def least_tolerance(k: int) -> float:
    """The smallest tolerance that may be asked for, in degrees."""
    return 2 * stored(k)


def search_rows(k: int) -> int:
    """Vectors of the search space of a large weight."""
    return k + krylov.extra_rows(k)


def whole_gram(m: int, n: int, k: int) -> bool:
    """Whether, on a CPU, an m x n weight goes through its Gram matrix and eigenvectors of that."""
    return min(m, n) <= gram.SMALL or plan.choose(m, n, k, torch.device("cpu")).method == "gram"


def check(weight: torch.Tensor, k: int, tol_degrees: float, method: str, warm_start: TopK | None) -> None:
    if weight.dtype not in DTYPES:
        raise TypeError(f"topk_svd takes bf16, fp16, fp32 or fp64 weights, got {weight.dtype}")
    if weight.ndim < 2:
        raise ValueError(f"topk_svd takes a matrix or a batch of them, got shape {tuple(weight.shape)}")
    m, n = weight.shape[-2:]
    if not 1 <= k <= min(m, n):
        raise ValueError(f"k must lie between 1 and min(m, n) = {min(m, n)}, got {k}")
    if not (tol_degrees > 0 and math.isfinite(tol_degrees)):
        raise ValueError(f"tol_degrees must be a positive number of degrees, got {tol_degrees}")
    if tol_degrees < least_tolerance(k):
        raise ValueError(
            f"tol_degrees = {tol_degrees} is below what {k} fp32 vectors can show; "
            f"the floor is {least_tolerance(k):.1e}"
        )
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if warm_start is not None:
        space = warm_start.space
        expected = (*weight.shape[:-2], min(m, n))
        if (*space.shape[:-2], space.shape[-1]) != expected or warm_start.U.shape[-2] != m:
            raise ValueError(f"the warm start is of another shape than this {m} x {n} weight; use its own base")
        if space.device != weight.device:
            raise ValueError(f"the warm start lies on {space.device}, the weight on {weight.device}; move one")


def solve(operand: Operand, k: int, tolerance: float, method: str, warm_start: TopK | None, seed: int) -> Solution:
    generator = torch.Generator().manual_seed(seed)
    m, n = operand.weight.shape[-2:]
    space = None
    if warm_start is not None and warm_start.space.shape[-2] > k:
        space = warm_start.space
    chosen = plan.choose(m, n, k, operand.weight.device, warm=space is not None)
    name = chosen.method if method == "auto" else method
    extra = krylov.extra_rows(k)
    if name == "reference":
        return reference.solve(operand, k)
    if name == "correction" and 2 * (k + extra) <= operand.short:
        found = correction.solve(operand, k, extra, tolerance, generator, space)
        good = bool((found.certificate.degrees <= tolerance).all())
        if good or method != "auto" or found.certificate.limited_by_rounding(tolerance):
            return found
        name = plan.choose(m, n, k, operand.weight.device).method
    if name == "krylov":
        answer = krylov.solve(operand, k, extra, tolerance, generator)
        if answer is not None:
            return answer
    return gram.solve(operand, k, plan.GRAM_EXTRA, tolerance)


def package(operand: Operand, found: Solution, k: int, tolerance: float) -> TopK:
    """Back to the weight's orientation and scale, in fp32."""
    ritz, certificate = found.ritz, found.certificate
    scale = 2.0**operand.exponent
    degrees = (certificate.degrees + stored(k)).clamp(max=90.0)
    left, right = ritz.left[..., :k, :].float(), ritz.right[..., :k, :].float()
    u, vh = (right.mT, left) if operand.transposed else (left.mT, right)

    def number(x: torch.Tensor) -> float | torch.Tensor:
        return float(x) if operand.weight.ndim == 2 else x

    result = TopK(
        U=u.contiguous(),
        S=(ritz.values[..., :k] * scale).float(),
        Vh=vh.contiguous(),
        residual=certificate.residual * scale,
        gap=number(certificate.gap * scale),
        error_degrees=number(degrees),
        rounding_degrees=number((certificate.rounding_degrees + stored(k)).clamp(max=90.0)),
        converged=bool((degrees <= tolerance).all()),
        iterations=found.iterations,
        method=found.method,
        space=ritz.right.float(),
        space_values=ritz.values * scale,
        values=found.squares.clamp_min(0).sqrt() * scale if found.squares is not None else None,
    )
    return result if operand.weight.ndim == 2 else as_batch(result, degrees <= tolerance)


def as_batch(found: TopK, met: torch.Tensor) -> Batch:
    return Batch(**{field.name: getattr(found, field.name) for field in fields(found)}, met=met)


def batched(weight: torch.Tensor, k: int, tol_degrees: float, method: str, warm_start: TopK | None, seed: int) -> TopK:
    """One weight after the other, as a CPU likes it. Search spaces are cut to the smallest."""
    lead = weight.shape[:-2]
    flat = weight.reshape(-1, *weight.shape[-2:])
    parts = []
    for index, one in enumerate(flat):
        start = None if warm_start is None else element(warm_start, index)
        parts.append(topk_svd(one, k, tol_degrees=tol_degrees, method=method, warm_start=start, seed=seed))
    rows = min((part.space.shape[0] for part in parts), default=0)

    def stack(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tensors).reshape(*lead, *tensors[0].shape)

    def numbers(name: str) -> torch.Tensor:
        return torch.tensor([getattr(part, name) for part in parts], dtype=torch.float64).reshape(lead)

    return Batch(
        U=stack([part.U for part in parts]),
        S=stack([part.S for part in parts]),
        Vh=stack([part.Vh for part in parts]),
        residual=stack([part.residual for part in parts]),
        gap=numbers("gap"),
        error_degrees=numbers("error_degrees"),
        rounding_degrees=numbers("rounding_degrees"),
        converged=all(part.converged for part in parts),
        iterations=max(part.iterations for part in parts),
        method=parts[0].method,
        space=stack([part.space[:rows] for part in parts]),
        space_values=stack([part.space_values[:rows] for part in parts]),
        met=torch.tensor([part.converged for part in parts]).reshape(lead),
    )


def element(found: TopK, index: int) -> TopK:
    """One weight's result out of a batch's."""

    def of(tensor: torch.Tensor, trailing: int) -> torch.Tensor:
        return tensor.reshape(-1, *tensor.shape[tensor.ndim - trailing :])[index]

    return TopK(
        U=of(found.U, 2),
        S=of(found.S, 1),
        Vh=of(found.Vh, 2),
        residual=of(found.residual, 1),
        gap=float(of(torch.as_tensor(found.gap), 0)),
        error_degrees=float(of(torch.as_tensor(found.error_degrees), 0)),
        rounding_degrees=float(of(torch.as_tensor(found.rounding_degrees), 0)),
        converged=bool(of(found.met, 0)) if isinstance(found, Batch) and found.met is not None else found.converged,
        iterations=found.iterations,
        method=found.method,
        space=of(found.space, 2),
        space_values=of(found.space_values, 1),
    )
