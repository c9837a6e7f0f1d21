"""Projections of a matrix onto the top-k subspaces of a weight, or off them; usable on gradients inside a step."""

from __future__ import annotations

from typing import Protocol

import torch

from . import blocked

__all__ = ["SIDES", "Factors", "project", "project_out"]

SIDES = ("left", "right", "both")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Factors(Protocol):
    """What a projection needs of a weight: orthonormal columns U ``[m, k]`` and orthonormal rows Vh ``[k, n]``."""

    @property
    def U(self) -> torch.Tensor: ...

    @property
    def Vh(self) -> torch.Tensor: ...


def project(x: torch.Tensor, factors: Factors, side: str = "both", *, inplace: bool = False) -> torch.Tensor:
    """The part of ``x`` that lies in the subspaces: ``U U^T x`` (left), ``x V V^T`` (right), ``U U^T x V V^T`` (both).

    Args:
        x: ``[m, n]``, bf16, fp16, fp32 or fp64. Computed in fp32 (fp64 for fp64) and rounded once, to nearest even.
        factors: such as :class:`TopK`; U ``[m, k]`` and Vh ``[k, n]`` on the device of ``x``. Constants: no gradient.
        side: ``"left"``, ``"right"`` or ``"both"``.
        inplace: overwrite ``x`` and return it.

    Returns:
        ``[m, n]`` in the dtype of ``x``. Nothing else of that size is made: intermediates have k rows or columns, and
        16-bit inputs are widened some rows at a time. Works under autograd (the projection is its own adjoint) and
        ``torch.compile``.

    Raises:
        TypeError: a dtype that is none of these.
        ValueError: unknown side, x that is no matrix, factors of another shape or device.
        RuntimeError: in place on a tensor that autograd is watching.

    Source: arXiv 2511.08567, section 4.1 (Gate II).
    """
    return dispatch(x, factors, side, False, inplace)


def project_out(x: torch.Tensor, factors: Factors, side: str = "both", *, inplace: bool = False) -> torch.Tensor:
    """``x`` minus its part in the subspaces: ``x - project(x)``, with arguments and errors as :func:`project`.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> axis = SimpleNamespace(U=torch.eye(3)[:, :1], Vh=torch.eye(3)[:1])
    >>> project_out(torch.ones(3, 3), axis, "left").sum(dim=1)
    tensor([0., 3., 3.])
    """
    return dispatch(x, factors, side, True, inplace)


def dispatch(x: torch.Tensor, factors: Factors, side: str, complement: bool, inplace: bool) -> torch.Tensor:
    check(x, factors, side)
    if not inplace:
        return _project(x, factors.U, factors.Vh, side, complement)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("x requires grad and cannot be overwritten; use torch.no_grad() or inplace=False")
    _project_(x, factors.U, factors.Vh, side, complement)
    return x


def check(x: torch.Tensor, factors: Factors, side: str) -> None:
    if side not in SIDES:
        raise ValueError(f"unknown side {side!r}; choose one of {', '.join(SIDES)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"projections take bf16, fp16, fp32 or fp64, got {x.dtype}")
    u, vh = factors.U, factors.Vh
    if x.ndim != 2 or u.ndim != 2 or vh.ndim != 2:
        raise ValueError(f"projections take a matrix and its factors, got {x.ndim}-D x and {u.ndim}-D U")
    if u.shape[0] != x.shape[0] or vh.shape[1] != x.shape[1] or u.shape[1] != vh.shape[0]:
        shape = f"{u.shape[0]} x {vh.shape[1]}"
        raise ValueError(f"the factors are of a {shape} weight and x is {x.shape[0]} x {x.shape[1]}")
    if u.device != x.device or vh.device != x.device:
        raise ValueError(f"the factors lie on {u.device} and x on {x.device}; move one of them")


@torch.library.custom_op("offprin::project", mutates_args=())
def _project(x: torch.Tensor, u: torch.Tensor, vh: torch.Tensor, side: str, complement: bool) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    blocked.project(x, u, vh, side, complement, out)
    return out


@_project.register_fake
def _(x: torch.Tensor, u: torch.Tensor, vh: torch.Tensor, side: str, complement: bool) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def setup_context(ctx, inputs, output) -> None:
    _, u, vh, ctx.side, ctx.complement = inputs
    ctx.save_for_backward(u, vh)


def backward(ctx, grad: torch.Tensor):
    u, vh = ctx.saved_tensors
    return _project(grad, u, vh, ctx.side, ctx.complement), None, None, None, None


_project.register_autograd(backward, setup_context=setup_context)


@torch.library.custom_op("offprin::project_", mutates_args={"x"})
def _project_(x: torch.Tensor, u: torch.Tensor, vh: torch.Tensor, side: str, complement: bool) -> None:
    blocked.project(x, u, vh, side, complement, x)


@_project_.register_fake
def _(x: torch.Tensor, u: torch.Tensor, vh: torch.Tensor, side: str, complement: bool) -> None:
    return None
