"""Singular values of whole weights and how far an update shifts them, exactly or to first order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..ops.subspace import TopK, topk_svd
from ..ops.subspace.gram import SMALL
from ..ops.subspace.operand import Operand, bf16_products_pay


@dataclass(frozen=True)
class Spectrum:
    """All singular values of a weight, fp64 ``[min(m, n)]``, descending, with a bound on the error of each."""

    values: torch.Tensor
    error: torch.Tensor

    @property
    def stable_rank(self) -> float:
        """||W||_F^2 / ||W||_2^2; 0 for a zero weight."""
        squares = self.values**2
        return float(squares.sum() / squares[0]) if squares[0] > 0 else 0.0


def spectrum(weight: torch.Tensor) -> Spectrum:
    """All singular values, through the fp64 Gram matrix: exact to rounding but for values below 1e-7 of the largest.

    Products of bf16 weights are exact in fp64, so only their sums and the eigensolver round. Their error in squares, at
    most p eps s_1^2, is given for each value. Errors as :func:`topk_svd`.
    """
    operand = matrix_operand(weight, torch.float64)
    squares = torch.linalg.eigvalsh(operand.gram()).flip(-1).clamp_min(0)
    values = squares.sqrt()
    scale = 2.0**operand.exponent
    return Spectrum(values * scale, rounding_of(values) * scale)


def spectrum_and_factors(weight: torch.Tensor, k: int, *, tol_degrees: float) -> tuple[Spectrum, TopK]:
    """All singular values and the top-k factors; of a small weight, both from one decomposition.

    Up to min(m, n) = 1024 the Gram matrix in fp64 with all its vectors costs less than the two apart. Errors as
    :func:`topk_svd`.
    """
    if min(weight.shape) > SMALL:
        return spectrum(weight), topk_svd(weight, k, tol_degrees=tol_degrees)
    factors = topk_svd(weight, k, tol_degrees=tol_degrees, method="gram")
    if factors.values is None:
        return spectrum(weight), factors
    return Spectrum(factors.values, rounding_of(factors.values)), factors


def rounding_of(values: torch.Tensor) -> torch.Tensor:
    """Bound on what rounding did to singular values that are roots of fp64 eigenvalues: p eps s_1^2 in squares."""
    slack = len(values) * torch.finfo(torch.float64).eps * values[:1] ** 2
    return slack / (values + slack.sqrt()).clamp_min(torch.finfo(torch.float64).tiny)


def matrix_operand(weight: torch.Tensor, precision: torch.dtype) -> Operand:
    if not weight.dtype.is_floating_point:
        raise TypeError(f"a weight of bf16, fp16, fp32 or fp64 is needed, got {weight.dtype}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"a matrix with at least one entry is needed, got shape {tuple(weight.shape)}")
    return Operand(weight, precision=precision)


# Neighbouring singular vectors treated together. Within such a block an update may mix them at will.
BLOCK = 64


@dataclass(frozen=True)
class BaseSpectrum:
    """Factors of a base weight, to measure the shift of many tuned ones: see :func:`base_spectrum`.

    With M = max(m, n), p = min(m, n) and A the weight or its transpose ``[M, p]``: blocks V of singular vectors, and
    A V = Q R for each.
    """

    weight: torch.Tensor
    values: torch.Tensor  # fp64 [p], descending
    right: torch.Tensor  # fp32 [p, p], rows: singular vectors of the shorter side
    left: torch.Tensor  # fp32 [ceil(p / BLOCK), M, BLOCK]: Q of each block; zero columns fill the last
    core: torch.Tensor  # fp32 [ceil(p / BLOCK), BLOCK, BLOCK]: R of each block


def base_spectrum(weight: torch.Tensor) -> BaseSpectrum:
    """Full singular vectors of a base weight, through its fp32 Gram matrix. Errors as :func:`spectrum`."""
    operand = matrix_operand(weight, torch.float32)
    if operand.exponent:
        raise ValueError("the weight's largest entry lies outside 1e-6 to 1e6; scale it first")
    right = torch.linalg.eigh(operand.gram())[1].flip(-1).mT.contiguous()
    left, core = torch.linalg.qr(blocks_of(operand.forward(right).mT))
    return BaseSpectrum(weight, block_values(core, operand.short), right, left, core)


def blocks_of(columns: torch.Tensor) -> torch.Tensor:
    """``[M, p]`` as ``[blocks, M, BLOCK]``, filled with zero columns."""
    filled = torch.nn.functional.pad(columns, (0, -columns.shape[1] % BLOCK))
    return filled.reshape(columns.shape[0], -1, BLOCK).transpose(0, 1)


def block_values(core: torch.Tensor, count: int) -> torch.Tensor:
    """Singular values of all blocks together, fp64 ``[count]``, descending."""
    return torch.linalg.svdvals(core.double()).flatten().sort(descending=True).values[:count]


@dataclass(frozen=True)
class Shift:
    """How much the singular values moved, relative to their norm, and what bounds it without any SVD."""

    nss: float  # ||s(W+) - s(W0)||_2 / ||s(W0)||_2
    exact: bool  # False for the first-order value from the base's factors
    error: float  # bound on the rounding error of an exact nss; NaN for a first-order one
    mirsky: float  # ||D||_F over the norm of the base's values counted, which nss cannot exceed
    isotropic: float  # of a small Gaussian update of the same norm, to first order; see nulls.isotropic_shift
    tuned: Spectrum | None  # after training; None from first-order values


def normalized_spectral_shift(
    base: torch.Tensor | Spectrum | BaseSpectrum,
    tuned: torch.Tensor,
    k: int | None = None,
    *,
    weight: torch.Tensor | None = None,
    update: torch.Tensor | None = None,
) -> Shift:
    """NSS, the relative shift of the spectrum, over all singular values or the top k.

    Args:
        base: ``[m, n]`` weight; or its :class:`Spectrum`, with ``weight`` beside it; or its :class:`BaseSpectrum`: then
            perturbation theory is used, to first order between blocks of 64 neighbouring vectors and exact within them:
            one product instead of two spectra. An approximation for small updates, not a bound.
        tuned: ``[m, n]`` weight after training.
        k: only the k largest values.
        weight: the base weight, where ``base`` is a Spectrum.
        update: their difference in fp32, where it is at hand.

    Raises ValueError for unequal shapes, k outside 1..min(m, n), NaN or Inf.
    Source: arXiv 2511.08567, section 3.2; arXiv 2606.07082.
    """
    if isinstance(base, torch.Tensor):
        weight = base
    elif isinstance(base, BaseSpectrum):
        weight = base.weight
    if weight is None:
        raise ValueError("give the base weight beside its spectrum: weight=...")
    if weight.shape != tuned.shape:
        raise ValueError(f"base is {tuple(weight.shape)} and tuned {tuple(tuned.shape)}; they must be equal")
    size = min(weight.shape)
    if k is not None and not 1 <= k <= size:
        raise ValueError(f"k must lie between 1 and min(m, n) = {size}, got {k}")
    if update is None:
        update = tuned.float() - weight.float()
    exact = not isinstance(base, BaseSpectrum)
    second: Spectrum | None = None
    moved = norm_of(update)
    if isinstance(base, (Spectrum, BaseSpectrum)) and not moved:
        # the same weight: rounding of another solver is no shift
        before = after = base.values
        error, second = 0.0, base if isinstance(base, Spectrum) else None
    elif isinstance(base, BaseSpectrum):
        before = base.values
        after = first_order(base, update)
        error = math.nan
    else:
        first = base if isinstance(base, Spectrum) else spectrum(base)
        second = spectrum(tuned)
        before, after = first.values, second.values
        noise = (first.error + second.error)[:k].norm() / before[:k].norm()
        error = float(noise)
    norm = before[:k].norm()
    mirsky = float(moved / norm)
    return Shift(
        nss=float((after[:k] - before[:k]).norm() / norm),
        exact=exact,
        error=error,
        mirsky=mirsky,
        isotropic=mirsky * math.sqrt((k or size) / weight.numel()),
        tuned=second,
    )


@dataclass(frozen=True)
class TopShift:
    """How much the k largest singular values moved, relative to their norm."""

    nss: float  # NSS_k = ||s_k(W+) - s_k(W0)||_2 / ||s_k(W0)||_2
    error: float  # bound on its error
    mirsky: float  # ||D||_F / ||s_k(W0)||_2, which it cannot exceed


def top_shift(base: TopK, tuned: TopK, update_norm: float) -> TopShift:
    """NSS_k from the factors of both weights, certified.

    A subspace off by an angle t has singular values at least cos(t) times the true ones (Courant and Fischer: what
    leads out of the true subspace adds nothing negative), and never larger ones; fp32 rounds them. NaN for a zero base.

    Args:
        base, tuned: factors with equal k.
        update_norm: Frobenius norm of the update.

    Source: arXiv 2511.08567, section 3.2.
    """
    before, after = base.S.double(), tuned.S.double()
    norm = float(before.norm())
    if not norm:
        return TopShift(*[math.nan] * 3)
    error = lacking(base) + lacking(tuned) * float(after.norm()) / norm
    return TopShift(float((after - before).norm()) / norm, error, update_norm / norm)


def lacking(factors: TopK) -> float:
    """How much less than the true singular values those of the factors may be, as a share of each."""
    return 1 - math.cos(math.radians(float(factors.error_degrees))) + torch.finfo(torch.float32).eps


def estimated_values(factors: TopK, norm: float) -> torch.Tensor:
    """All singular values, fp64 ``[min(m, n)]``, descending, for use as a null: exact ones only where they are known.

    Those of the search space, which reaches beyond k, are lower bounds a little off at its end; the rest share the
    energy that is left of ``norm`` (Frobenius) evenly.
    """
    if factors.values is not None:
        return factors.values
    known, size = factors.space_values, min(factors.U.shape[-2], factors.Vh.shape[-1])
    rest = size - len(known)
    if not rest:
        return known
    level = math.sqrt(max(0.0, norm**2 - float(known.square().sum())) / rest)
    return torch.cat([known, known.new_full((rest,), min(level, float(known[-1])))])


# Squares added in fp32 before they are added in fp64; norms of which no square overflows or vanishes that matters.
STRETCH, ORDINARY = 256, (1e-12, 1e15)
# Elements of bf16 that are converted at once.
CONVERTED = 1 << 20


def norm_of(x: torch.Tensor) -> torch.Tensor:
    """Frobenius norm, fp64, right to 1e-7, without a copy: PyTorch's own in fp64 takes ten times as long."""
    if x.dtype != torch.float64 and x.is_contiguous() and x.numel() and x.numel() % STRETCH == 0:
        pieces = x.view(-1, STRETCH).split(CONVERTED // STRETCH)
        parts = torch.cat([torch.linalg.vector_norm(piece.float(), dim=-1) for piece in pieces])
        norm = torch.linalg.vector_norm(parts, dtype=torch.float64)
        if ORDINARY[0] < float(norm) < ORDINARY[1]:
            return norm
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def first_order(base: BaseSpectrum, update: torch.Tensor) -> torch.Tensor:
    """Singular values after a small update, fp64 descending: to first order between blocks, exactly within them.

    In bf16 where its products pay: an update of a few ULP is exact in bf16, and rounding of the vectors averages out.
    """
    a = update if update.shape[0] >= update.shape[1] else update.mT
    precision = torch.bfloat16 if bf16_products_pay(update.device) else torch.float32
    moved = (a.to(precision) @ base.right.mT.to(precision)).float()
    return block_values(base.core + base.left.mT @ blocks_of(moved), base.values.numel())


def stable_rank(weight: torch.Tensor, *, seed: int = 0) -> float:
    """||W||_F^2 / ||W||_2^2 of a matrix; 0 for a zero one. Errors as :func:`topk_svd`."""
    largest = float(topk_svd(weight, 1, tol_degrees=1.0, seed=seed).S[0])
    return float(norm_of(weight)) ** 2 / largest**2 if largest > 0 else 0.0
