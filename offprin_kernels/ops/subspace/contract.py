"""What ``topk_svd`` returns, and what its methods agree on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .ritz import Certificate, Ritz

METHODS = ("auto", "krylov", "gram", "correction", "reference")


@dataclass(frozen=True)
class TopK:
    """Top-k singular triplets of a weight, descending, and how good they are.

    For a batch of weights ``[..., m, n]`` every field has the batch's leading dimensions, and the numbers below are
    fp64 tensors instead of floats.
    """

    U: torch.Tensor  # fp32 [..., m, k], orthonormal columns
    S: torch.Tensor  # fp32 [..., k], descending
    Vh: torch.Tensor  # fp32 [..., k, n], orthonormal rows
    residual: torch.Tensor  # fp64 [..., k]: max(|W v - s u|, |W^T u - s v|), in weight units
    gap: float | torch.Tensor  # s_k - s_{k+1}, the latter estimated; in weight units
    error_degrees: float | torch.Tensor  # bound on the largest angle to the true subspace, left and right
    rounding_degrees: float | torch.Tensor  # the part of the bound that is rounding: no tolerance below it can be met
    converged: bool  # error_degrees <= the tolerance asked for (for every matrix of a batch)
    iterations: int  # blocks (krylov), rounds (correction), 1 (gram, reference)
    method: str
    space: torch.Tensor  # fp32 [..., l, min(m, n)]: rows of the whole search space, to start a related weight from
    space_values: torch.Tensor  # fp64 [..., l], descending: singular values of the weight within the space
    values: torch.Tensor | None = None  # fp64 [min(m, n)]: all singular values, where fp64 ones came with the method

    @property
    def k(self) -> int:
        return self.S.shape[-1]


@dataclass
class Solution:
    """What a method found, in the operand's orientation and scale."""

    ritz: Ritz
    certificate: Certificate
    iterations: int
    method: str
    squares: torch.Tensor | None = None  # fp64 [..., p], descending: all singular values squared, where known
