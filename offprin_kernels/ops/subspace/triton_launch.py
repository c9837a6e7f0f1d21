"""Launch settings and launches of the kernels in ``triton_kernel.py``. Blocks hold vectors as rows, as in blocks.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ... import _backend, _launch, packing
from . import triton_kernel as kernels

ALL, LOWER_RESULT, LOWER_LEFT = kernels.ALL.value, kernels.LOWER_RESULT.value, kernels.LOWER_LEFT.value
PIECES = 2  # of a block that meets a bf16 weight: relative error 2.4e-6

# ---- launch settings ------------------------------------------------------------------------------------------------

# Programs that keep a large GPU busy (108 to 148 multiprocessors); with fewer, depth is split among several.
WAVE = 128
# Tiles of depth that a split is worth: its partial sums are written and read once more.
LEAST_DEPTH = 8


@dataclass(frozen=True)
class Settings:
    """Tile, splits and warps of a launch; a pure function of shape, pieces and architecture. Not yet measured."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def settings(
    rows: int, columns: int, depth: int, batches: int, pieces: tuple[int, int], part: int, wide: bool, arch: str
) -> Settings:
    """For factors in so many ``pieces`` (0: bf16 already), whose rows can be read 16 bytes at a time if ``wide``."""
    # Two sums of 64 x 128 (of a tile, of all) take 64 registers of each thread of 8 warps, pieces and addresses most of
    # the rest. Fewer rows (the probe's 16) waste no work on rows that are not there.
    block_m, block_n, block_k = min(64, power_of_two(rows, 16)), min(128, power_of_two(columns, 16)), 64
    if pieces == (0, 0) and min(rows, columns) >= 1024:
        # Nothing to split: only reuse of what is loaded counts. Shallow, as two such sums take 128 registers.
        block_m, block_k = 128, 32
    if pieces[0] == 3 or not wide:
        # Registers: a third piece, or an address for every element.
        block_k = 32
    if pieces[1]:
        # Both factors are split, and six products add up: smaller tiles.
        block_n = min(64, block_n)
    if part == LOWER_RESULT:
        # Square tiles waste least on the diagonal.
        block_n = block_m
    block_k = min(block_k, power_of_two(depth, 16))
    # AMD has less shared memory for tiles fetched ahead.
    stages = 2 if arch == "hip" else 3
    tiles = [cdiv(rows, block_m), cdiv(columns, block_n)]
    programs = batches * (tiles[0] * (tiles[0] + 1) // 2 if part == LOWER_RESULT else math.prod(tiles))
    # A triangular factor ends early: its splits would be uneven, and it is small.
    most = 1 if part == LOWER_LEFT else max(1, cdiv(depth, block_k) // LEAST_DEPTH)
    return Settings(block_m, block_n, block_k, max(1, min(WAVE // programs, most, 32)), 8, stages)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


@dataclass(frozen=True)
class Pipelined(_launch.Launch):
    """A launch whose loop fetches tiles ahead."""

    num_stages: int = 2

    def options(self) -> dict[str, Any]:
        return {**super().options(), "num_stages": self.num_stages}


# ---- launches -------------------------------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """bf16 as int16, which Triton's interpreter reads as it is."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def divisor(*sizes: int) -> int:
    """8 (16 bytes of bf16) where it divides them all, else 1."""
    return 8 if all(size % 8 == 0 for size in sizes) else 1


def plain(factor: torch.Tensor) -> torch.Tensor:
    """A factor [batch, r, c] of which one of the last two strides is 1; copied where neither is."""
    return factor if 1 in factor.stride()[-2:] else factor.contiguous()


def plan_product(
    x: torch.Tensor, a: torch.Tensor, pieces: int, out: torch.dtype, arch: str, part: int = ALL
) -> tuple[torch.Tensor, list[_launch.Launch]]:
    """``x @ a`` of ``[batch, rows, depth]`` and ``[batch, depth, columns]`` into ``[batch, rows, columns]``.

    Factors are fp32, split into ``pieces`` bf16 parts (the second one: into three), or bf16. With one piece, sums are
    left to the tensor cores, as rough as itself. ``LOWER_RESULT``: x @ a is symmetric; ``LOWER_LEFT``: x is a lower
    triangle.
    """
    x, a = plain(x), plain(a)
    batches, rows, depth = x.shape
    columns = a.shape[-1]
    split_x, split_a = pieces if x.dtype == torch.float32 else 0, 3 if a.dtype == torch.float32 else 0
    along_x, along_a = x.stride(-1) == 1, a.stride(-1) != 1
    x_stride, a_stride = x.stride(-2 if along_x else -1), a.stride(-1 if along_a else -2)
    by_m, by_n, by_k = divisor(rows), divisor(columns), divisor(depth)
    by_x, by_a = divisor(x_stride, x.stride(0)), divisor(a_stride, a.stride(0))
    # 16 bytes at a time, of both factors
    wide = min(by_x, by_a, by_k if along_x else by_m, by_k if along_a else by_n) > 1
    s = settings(rows, columns, depth, batches, (split_x, split_a), part, wide, arch)
    tiles_m, tiles_n, steps = cdiv(rows, s.block_m), cdiv(columns, s.block_n), cdiv(depth, s.block_k)
    span = cdiv(steps, s.splits)
    splits = cdiv(steps, span)
    result = packing.empty((batches, rows, columns), out, x.device)
    # Partial sums lie in a workspace, and are added in their order: the same bits every time.
    target = result if splits == 1 else packing.empty((splits, batches, rows, columns), torch.float32, x.device)
    args = {
        "p_x": bits(x), "p_a": bits(a), "p_y": bits(target), "rows_over": rows // by_m,
        "columns_over": columns // by_n, "depth_over": depth // by_k, "x_over": x_stride // by_x,
        "x_batch_over": x.stride(0) // by_x, "a_over": a_stride // by_a, "a_batch_over": a.stride(0) // by_a,
        "tiles_m": tiles_m, "tiles_n": tiles_n, "splits": splits, "span": span, "batches": batches,
    }  # fmt: skip
    constexprs = {
        "X_PIECES": split_x, "A_PIECES": split_a, "ROUGH": pieces == 1, "OUT_BF16": target.dtype == torch.bfloat16,
        "PART": part, "X_ALONG_DEPTH": along_x, "A_ALONG_DEPTH": along_a, "M_DIVISOR": by_m, "N_DIVISOR": by_n,
        "K_DIVISOR": by_k, "X_DIVISOR": by_x, "A_DIVISOR": by_a, "INTERPRETED": _backend.interpreting(),
        "BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k,
    }  # fmt: skip
    programs = batches * splits * tiles_m * tiles_n
    launches: list[_launch.Launch] = [
        Pipelined(kernels.product_kernel, programs, args, constexprs, s.num_warps, s.num_stages)
    ]
    if part == LOWER_RESULT:
        launches.append(plan_mirror(target.view(-1, batches, rows, rows), result))
    elif splits > 1:
        launches.append(plan_sum(target, result))
    return result, launches


def plan_sum(parts: torch.Tensor, result: torch.Tensor) -> _launch.Launch:
    """``parts`` ``[splits, ...]`` added up into ``result``."""
    count, block = result.numel(), 1024
    by = divisor(count)
    args = {"p_parts": parts, "p_y": bits(result), "count_over": count // by, "splits": parts.shape[0]}
    constexprs = {"OUT_BF16": result.dtype == torch.bfloat16, "DIVISOR": by, "BLOCK": block}
    return _launch.Launch(kernels.sum_kernel, cdiv(count, block), args, constexprs, 4)


def plan_mirror(parts: torch.Tensor, result: torch.Tensor) -> _launch.Launch:
    """Lower triangles of ``parts`` ``[splits, batch, l, l]`` added up into both triangles of ``result``."""
    splits, batches, size, _ = parts.shape
    block = 32
    tiles = cdiv(size, block)
    args = {"p_parts": parts, "p_y": result, "size": size, "tiles": tiles, "splits": splits, "batches": batches}
    return _launch.Launch(kernels.mirror_kernel, batches * tiles * tiles, args, {"BLOCK": block}, 4)


def plan_recurrence(
    image: torch.Tensor, now: torch.Tensor, force: torch.Tensor, before: torch.Tensor, x: torch.Tensor,
    rho: torch.Tensor, after: torch.Tensor, centre: torch.Tensor,
) -> _launch.Launch:  # fmt: skip
    """Contiguous blocks ``[..., rows, length]``; x, rho and after ``[..., rows, 1]``, centre ``[..., 1, 1]``."""
    rows, length = now.shape[-2:]
    # 8 elements a thread of four arrays each; rows are long, so few programs end before their block does.
    block = min(1024, power_of_two(length, 128))
    by, tiles = divisor(length), cdiv(length, block)
    args = {
        "p_image": image, "p_now": now, "p_force": force, "p_before": before, "p_x": x, "p_rho": rho, "p_next": after,
        "p_centre": centre, "rows": rows, "length_over": length // by, "tiles": tiles,
    }  # fmt: skip
    programs = now.numel() // length * tiles
    return _launch.Launch(kernels.recurrence_kernel, programs, args, {"DIVISOR": by, "BLOCK": block}, 4)


# ---- what operand.py, blocks.py and polynomial.py call --------------------------------------------------------------


def flat(factor: torch.Tensor) -> torch.Tensor:
    """Leading dimensions as one."""
    return factor.reshape(-1, *factor.shape[-2:])


def product(
    x: torch.Tensor, a: torch.Tensor, pieces: int = PIECES, out: torch.dtype = torch.float32, part: int = ALL
) -> torch.Tensor:
    """``x @ a`` with the accuracy of :func:`plan_product`; leading dimensions are a batch."""
    shape = (*x.shape[:-1], a.shape[-1])
    if math.prod(shape) == 0 or x.shape[-1] == 0:
        return packing.zeros(shape, out, x.device)
    result, launches = plan_product(flat(x), flat(a), pieces, out, _launch.arch(x.device), part)
    for launch in launches:
        launch.run()
    return result.view(shape)


def gram(block: torch.Tensor) -> torch.Tensor:
    """``X X^T`` of fp32 rows, as accurate as in fp32, exactly symmetric."""
    return product(block, block.mT, 3, part=LOWER_RESULT)


def lower_product(triangle: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """``T X`` of a lower triangle and fp32 rows, as accurate as in fp32."""
    return product(triangle, block, 3, part=LOWER_LEFT)


def recurrence(
    image: torch.Tensor, now: torch.Tensor, force: torch.Tensor, before: torch.Tensor, x: torch.Tensor,
    rho: torch.Tensor, centre: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Overwrites ``before`` with the recurrence's next block, and returns the next rho."""
    after = packing.empty(rho.shape, rho.dtype, rho.device)
    if now.numel():
        plan_recurrence(image, now, force, before, x, rho, after, centre).run()
    return after
