"""Spectral geometry of an update: angles between principal subspaces, spectra and their shift, energies, bounds.

Every number that comes from an iteration carries its resolution, and every observation its null or its bound.
Source: arXiv 2511.08567, sections 3.2 and 4.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .ops.subspace import TopK, topk_svd
from .ops.subspace.operand import Operand, bf16_products_pay

__all__ = [
    "Angles",
    "BaseSpectrum",
    "Bounds",
    "Energy",
    "Shift",
    "Spectrum",
    "base_spectrum",
    "bounds",
    "normalized_spectral_shift",
    "principal_angles",
    "spectrum",
    "stable_rank",
    "update_energy",
]


# ---- angles ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Angles:
    """Principal angles between the top-k subspaces of two weights, in degrees, descending.

    Angles below ``resolution_degrees`` are NaN: nothing is known of them but that they are smaller.
    """

    left: torch.Tensor  # fp64 [k]: output side, columns of U
    right: torch.Tensor  # fp64 [k]: input side, columns of V
    resolution_degrees: float  # sum of both certificates: how far any of these angles may be off
    converged: bool  # whether both subspaces met the tolerance asked for
    base: TopK
    tuned: TopK

    @property
    def max_left(self) -> float | None:
        """Largest left angle; None where it is below resolution."""
        return resolved(self.left[0])

    @property
    def max_right(self) -> float | None:
        """Largest right angle; None where it is below resolution."""
        return resolved(self.right[0])


def resolved(angle: torch.Tensor) -> float | None:
    return None if bool(angle.isnan()) else float(angle)


def principal_angles(
    base: torch.Tensor | TopK, tuned: torch.Tensor, k: int, *, tol_degrees: float = 0.02, seed: int = 0
) -> Angles:
    """Angles by which training turned the top-k singular subspaces of a weight.

    Args:
        base: ``[m, n]`` weight before training, or its factors with the same k: then nothing is computed for it.
        tuned: ``[m, n]`` weight after training; iterated from the base's search space.
        k: dimension of the subspaces.
        tol_degrees: certificate asked of the tuned weight. The base is asked for a quarter of it, because an
            unconverged base inflates every angle.
        seed: of the random start.

    Errors as :func:`topk_svd`. Angles are invariant to signs and to rotations inside degenerate blocks.
    Source: arXiv 2511.08567, section 3.2; sines as in Bjorck and Golub (1973).
    """
    first = base if isinstance(base, TopK) else topk_svd(base, k, tol_degrees=tol_degrees / 4, seed=seed)
    if first.k != k:
        raise ValueError(f"the base's factors have k = {first.k}, not {k}")
    second = topk_svd(tuned, k, tol_degrees=tol_degrees, warm_start=first, seed=seed)
    resolution = float(first.error_degrees) + float(second.error_degrees)
    left, right = angles_between(first.U.mT, second.U.mT), angles_between(first.Vh, second.Vh)

    def known(angles: torch.Tensor) -> torch.Tensor:
        return angles.masked_fill(angles <= resolution, math.nan)

    return Angles(known(left), known(right), resolution, first.converged and second.converged, first, second)


def angles_between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Principal angles in degrees (fp64 ``[k]``, descending) between the spans of orthonormal rows ``[k, length]``.

    Small ones from their sine (singular values of b off a), which keeps all digits; large ones from their cosine.
    """
    a, b = (torch.linalg.qr(rows.double().mT)[0].mT for rows in (a, b))
    along = b @ a.mT
    sines = torch.linalg.svdvals(b - along @ a).clamp(max=1)
    cosines = torch.linalg.svdvals(along).clamp(max=1).flip(-1)
    return torch.rad2deg(torch.where(sines < 0.7, torch.asin(sines), torch.acos(cosines)))


# ---- spectra --------------------------------------------------------------------------------------------------------


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
    slack = operand.short * torch.finfo(torch.float64).eps * squares[:1]
    values = squares.sqrt()
    error = slack / (values + slack.sqrt()).clamp_min(torch.finfo(torch.float64).tiny)
    scale = 2.0**operand.exponent
    return Spectrum(values * scale, error * scale)


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
    mirsky: float  # ||D||_F / ||W0||_F, which nss cannot exceed
    isotropic: float  # of a Gaussian update of the same norm: mirsky / sqrt(max(m, n))


def normalized_spectral_shift(
    base: torch.Tensor | Spectrum | BaseSpectrum,
    tuned: torch.Tensor,
    k: int | None = None,
    *,
    weight: torch.Tensor | None = None,
) -> Shift:
    """NSS, the relative shift of the spectrum, over all singular values or the top k.

    Args:
        base: ``[m, n]`` weight; or its :class:`Spectrum`, with ``weight`` beside it; or its :class:`BaseSpectrum`: then
            perturbation theory is used, to first order between blocks of 64 neighbouring vectors and exact within them:
            one product instead of two spectra. An approximation for small updates, not a bound.
        tuned: ``[m, n]`` weight after training.
        k: only the k largest values.
        weight: the base weight, where ``base`` is a Spectrum.

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
    update = tuned.float() - weight.float()
    exact = not isinstance(base, BaseSpectrum)
    if isinstance(base, BaseSpectrum):
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
    mirsky = float(norm_of(update) / before.norm())
    return Shift(
        nss=float((after[:k] - before[:k]).norm() / norm),
        exact=exact,
        error=error,
        mirsky=mirsky,
        isotropic=mirsky / math.sqrt(max(weight.shape)),
    )


def norm_of(x: torch.Tensor) -> torch.Tensor:
    """Frobenius norm, fp64, without a copy in fp64."""
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


# ---- energy and bounds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Energy:
    """Shares of an update's squared Frobenius norm that lie in the base's top-k subspaces, beside isotropic values."""

    left: float  # ||U^T D||^2 / ||D||^2
    right: float  # ||D V||^2 / ||D||^2
    both: float  # ||U^T D V||^2 / ||D||^2
    isotropic_left: float  # k / m
    isotropic_right: float  # k / n
    isotropic_both: float  # k^2 / (m n)


def update_energy(base_factors: TopK, update: torch.Tensor) -> Energy:
    """How much of an update lies in the principal subspaces of the weight it changes.

    Args:
        base_factors: of the base weight ``[m, n]``.
        update: ``[m, n]``, any floating dtype. Shares of a zero update are NaN.

    Raises ValueError for another shape. Source: arXiv 2511.08567, section 4.1.
    """
    m, n = check_update(base_factors, update)
    u, vh, d = base_factors.U, base_factors.Vh, update.float()
    total = float(norm_of(d)) ** 2
    down, across = u.mT @ d, d @ vh.mT

    def share(x: torch.Tensor) -> float:
        return float(norm_of(x)) ** 2 / total if total else math.nan

    k = base_factors.k
    return Energy(share(down), share(across), share(down @ vh.mT), k / m, k / n, k * k / (m * n))


def check_update(factors: TopK, update: torch.Tensor) -> tuple[int, int]:
    m, n = factors.U.shape[-2], factors.Vh.shape[-1]
    if factors.U.ndim != 2 or tuple(update.shape) != (m, n):
        raise ValueError(f"the factors are of a {m} x {n} weight and the update has shape {tuple(update.shape)}")
    if update.device != factors.U.device:
        raise ValueError(f"the factors lie on {factors.U.device} and the update on {update.device}; move one")
    return m, n


@dataclass(frozen=True)
class Bounds:
    """What an update's norms allow, without looking at its direction; each beside what was observed."""

    update_norm: float  # ||D||_F
    update_spectral_norm: float  # ||D||_2
    mirsky: float  # NSS_k and NSS cannot exceed ||D||_F / ||W0||_F
    observed_nss_k: float  # over the top k, relative to the norm of the base's top k
    weyl: float  # no singular value moves by more than ||D||_2
    observed_shift: float  # largest move among the top k
    wedin_degrees: float  # asin(||D||_2 / (gap - ||D||_2)); 90 where that says nothing
    observed_degrees: float  # largest angle, left or right
    resolution_degrees: float  # angles below it are not resolved
    ky_fan: float  # the sum of the top k cannot move by more than k ||D||_2
    observed_ky_fan: float


def bounds(
    base_factors: TopK, tuned_factors: TopK, base: torch.Tensor, tuned: torch.Tensor, *, seed: int = 0
) -> Bounds:
    """Mirsky, Weyl, Wedin and Ky Fan bounds of an update beside the observations, for the top k.

    Args:
        base_factors, tuned_factors: of equal k.
        base, tuned: the ``[m, n]`` weights.

    Sources: arXiv 2511.08567, section 3.2 and appendix; Stewart and Sun, Matrix Perturbation Theory (1990).
    """
    check_update(base_factors, base)
    check_update(tuned_factors, tuned)
    if base_factors.k != tuned_factors.k:
        raise ValueError(f"the factors have different k: {base_factors.k} and {tuned_factors.k}")
    update = tuned.float() - base.float()
    norm, k = float(norm_of(update)), base_factors.k
    largest = float(topk_svd(update, 1, tol_degrees=1.0, seed=seed).S[0]) if norm else 0.0
    before, after = base_factors.S.double(), tuned_factors.S.double()
    shift = (after - before).abs()
    room = float(base_factors.gap) - largest
    wedin = math.degrees(math.asin(largest / room)) if room > largest else 90.0
    angles = [
        float(angles_between(a, b)[0])
        for a, b in ((base_factors.U.mT, tuned_factors.U.mT), (base_factors.Vh, tuned_factors.Vh))
    ]
    return Bounds(
        update_norm=norm,
        update_spectral_norm=largest,
        mirsky=norm / float(norm_of(base)),
        observed_nss_k=float(shift.norm() / before.norm()),
        weyl=largest,
        observed_shift=float(shift.max()),
        wedin_degrees=wedin,
        observed_degrees=max(angles),
        resolution_degrees=float(base_factors.error_degrees) + float(tuned_factors.error_degrees),
        ky_fan=k * largest,
        observed_ky_fan=abs(float(after.sum() - before.sum())),
    )
