"""MaskedAdamW on a CUDA device: shares of the bandwidth measured beside it, and fused AdamW as the peer."""

from __future__ import annotations

import sys

import torch

from offprin_kernels import BitMask, random_mask
from offprin_kernels.optim import MaskedAdamW

from .gpu_timing import milliseconds
from .registry import masked_step_traffic

TENSORS, SHAPE = 32, (4096, 4096)
WEIGHTS = TENSORS * SHAPE[0] * SHAPE[1]


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    params = []
    for _ in range(TENSORS):
        param = torch.nn.Parameter((torch.randn(SHAPE, device="cuda") * 0.02).to(dtype))
        param.grad = (torch.randn(SHAPE, device="cuda") * 1e-3).to(dtype)
        params.append(param)
    return params


def check(dtype: torch.dtype, mask: BitMask | None, rounding: str) -> None:
    """The device's steps against the CPU library's, bit for bit."""
    start, results = (torch.randn(SHAPE) * 0.02).to(dtype), []
    for device in ("cpu", "cuda"):
        param = torch.nn.Parameter(start.to(device))
        chosen = None if mask is None else {param: mask.to(device)}
        optimizer = MaskedAdamW([param], masks=chosen, rounding=rounding, track_visible=True)
        for step in range(3):
            grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)) * 1e-3
            param.grad = grad.to(dtype).to(device)
            optimizer.step()
        results.append((param.detach().cpu(), optimizer.visible_mask(param).to("cpu")))
    if not (torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]):
        sys.exit(f"masked_adamw is wrong on the device ({dtype}, {rounding}): no timing of a wrong answer")


def masked_adamw_rows(copy: float) -> list[dict]:
    """``copy``: GB/s of a copy, reads and writes counted."""
    peers, found = {}, []
    for dtype in (torch.float32, torch.bfloat16):
        peer = torch.optim.AdamW(parameters(dtype), fused=True)
        peers[dtype] = milliseconds(lambda _, peer=peer: peer.step())
        del peer
    for dtype, rounding in ((torch.float32, "nearest"), (torch.bfloat16, "master"), (torch.bfloat16, "stochastic")):
        for share in (None, 0.05, 0.01):
            mask = None if share is None else random_mask(SHAPE, share, seed=0)
            check(dtype, mask, rounding)
            params = parameters(dtype)
            chosen = None if share is None else {
                p: random_mask(SHAPE, share, seed=i, device="cuda") for i, p in enumerate(params)
            }  # fmt: skip
            optimizer = MaskedAdamW(params, masks=chosen, rounding=rounding)
            ms = milliseconds(lambda _, optimizer=optimizer: optimizer.step())
            traffic = masked_step_traffic(WEIGHTS, share, dtype.itemsize, extra=2 if rounding == "master" else 0)
            found.append(
                {
                    "op": f"masked_adamw {rounding}, mask {'full' if share is None else share}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "ms": ms,
                    "share_of_copy": traffic.total / ms / 1e6 / copy,
                    "times_fused_adamw_of_that_dtype": peers[dtype] / ms,
                }
            )
            del optimizer, params, chosen
    return found
