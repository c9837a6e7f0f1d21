"""A Triton kernel that reads, and does nothing else worth the name: the ceiling of ops that only read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, TURNS = 2048, 16  # 16 bytes to each of 512 threads' loads, and so many loads in a program: few programs' starts


@triton.jit
def read_kernel(p_x, p_sums, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    o = program * (BLOCK * TURNS) + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.int32)
    for turn in tl.static_range(TURNS):
        b_sum += tl.load(p_x + o + turn * BLOCK)
    tl.store(p_sums + program, tl.sum(b_sum))


def sums(words: torch.Tensor) -> torch.Tensor:
    """Sums of a contiguous int32 tensor's parts, modulo 2^32. Raises ValueError where its size is no whole number of
    parts."""
    programs, rest = divmod(words.numel(), BLOCK * TURNS)
    if rest:
        raise ValueError(f"{words.numel()} words are no multiple of {BLOCK * TURNS}")
    out = torch.empty(programs, dtype=torch.int32, device=words.device)
    read_kernel[(programs,)](words, out, BLOCK=BLOCK, TURNS=TURNS, num_warps=16)
    return out
