"""Triton backend of ``lowrank_select``: every pass makes the keys of a tile anew and keeps counts or bits only.

``b_`` block values, ``p_`` pointers, ``o_`` offsets, ``m_`` masks, UPPER_CASE constexpr.
"""

# mypy: disable-error-code="assignment"

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ... import _launch, packing
from . import contract as c
from .triton_keys import HASH, PRODUCT, WEIGHT, keys_of

# ---- passes ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "columns_over", "rank", "stream", "tiles", "first", "last", "begin", "shift"])
def histogram_kernel(
    p_inputs, p_bins, rows: tl.int64, columns_over: tl.int64, rank: tl.int64, stream: tl.int64, tiles: tl.int64,
    first: tl.int64, last: tl.int64, begin: tl.int64, shift: tl.int64,
    SOURCE: tl.constexpr, BY_PLACE: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr,
    DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Counts keys first..last by (key - first) >> shift, or by place: by (flat index - begin) >> shift."""
    program = tl.program_id(0).to(tl.int64)
    columns = columns_over * DIVISOR
    o_m = program // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_in = (o_m < rows)[:, None] & (o_n < columns)[None, :]
    b_flat = o_m[:, None] * columns + o_n[None, :]
    b_keys = keys_of(p_inputs, o_m, o_n, b_flat, m_in, rows, columns, rank, stream, SOURCE, BLOCK_M, BLOCK_N, BLOCK_K)
    b_bin = (b_flat - begin if BY_PLACE else b_keys - first) >> shift
    m_in = m_in & (b_keys >= first) & (b_keys <= last) & (b_bin >= 0) & (b_bin < BINS)
    # Copies, so that programs do not all wait for the same hot counters.
    p_bin = p_bins + program % COPIES * BINS + b_bin
    tl.atomic_add(p_bin, (b_bin * 0 + 1), mask=m_in, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "columns_over", "rank", "stream", "tiles", "first", "last", "known"])
def mark_kernel(
    p_inputs, p_bytes, p_count, rows: tl.int64, columns_over: tl.int64, rank: tl.int64, stream: tl.int64,
    tiles: tl.int64, first: tl.int64, last: tl.int64, known: tl.int64,
    SOURCE: tl.constexpr, DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sets the bits of keys below ``first``, and of keys first..last those at flat indices below ``known``."""
    program = tl.program_id(0).to(tl.int64)
    columns = columns_over * DIVISOR
    row_bytes = (columns + 63) // 64 * 8
    o_m = program // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_in = (o_m < rows)[:, None] & (o_n < columns)[None, :]
    b_flat = o_m[:, None] * columns + o_n[None, :]
    b_keys = keys_of(p_inputs, o_m, o_n, b_flat, m_in, rows, columns, rank, stream, SOURCE, BLOCK_M, BLOCK_N, BLOCK_K)
    m_set = m_in & ((b_keys < first) | ((b_keys <= last) & (b_flat < known)))
    b_bits = tl.reshape(m_set.to(tl.int32), [BLOCK_M, BLOCK_N // 8, 8])
    b_bytes = tl.sum(b_bits << tl.arange(0, 8)[None, None, :], axis=2)
    o_byte = program % tiles * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    m_byte = (o_m < rows)[:, None] & (o_byte < row_bytes)[None, :]
    tl.store(p_bytes + o_m[:, None] * row_bytes + o_byte[None, :], b_bytes.to(tl.uint8), mask=m_byte)
    tl.atomic_add(p_count, tl.sum(tl.sum(m_set.to(tl.int32), axis=1)).to(tl.int64), sem="relaxed")


# ---- launch settings ------------------------------------------------------------------------------------------------

BINS = 1 << 16
COPIES = 4


@dataclass(frozen=True)
class Settings:
    """Tile and warps of a launch; a pure function of source, shape and architecture, so that a test needs no device."""

    divisor: int  # proven divisor of a row's length
    block_m: int
    block_n: int
    block_k: int
    num_warps: int


def settings(source: int, rows: int, columns: int, arch: str) -> Settings:
    # A wave of AMD has 64 lanes: half as many warps hold as many threads. Not yet measured on a device.
    warps, divisor = 2 if arch == "hip" else 4, 16 if columns % 16 == 0 else 1
    if source == PRODUCT.value:
        # 16 sums in each thread; with 32, some versions of Triton spill.
        return Settings(divisor, 64, 64, 16, 2 * warps)
    block_n = min(2048 if rows == 1 else 256, max(64, triton.next_power_of_2(columns)))
    return Settings(divisor, 1 if rows == 1 else 2048 // block_n, block_n, 1, warps)


# ---- launches -------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where the keys of a rows x columns matrix come from."""

    code: int
    rows: int
    columns: int
    inputs: tuple[torch.Tensor, ...]
    bits: int  # of a key
    rank: int = 0
    stream: int = 0


def product(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> Source:
    inputs = (left.contiguous(), values, right.contiguous())
    return Source(PRODUCT.value, len(left), right.shape[1], inputs, 31, rank=len(values))


def weight_bits(weight: torch.Tensor) -> Source:
    integers, bits = (torch.int32, 31) if weight.dtype == torch.float32 else (torch.int16, 15)
    return Source(WEIGHT.value, *packing.matrix_shape(weight.shape), (weight.view(integers),), bits)


def plan(
    kernel: object, source: Source, arch: str, outputs: Mapping[str, torch.Tensor], args: Mapping[str, int],
    constexprs: Mapping[str, Any],
) -> _launch.Launch:  # fmt: skip
    rows, columns = source.rows, source.columns
    # Packed rows have no padding where columns are a multiple of 64: then the matrix is one long row.
    if columns % 64 == 0 and source.code != PRODUCT.value:
        rows, columns = 1, rows * columns
    s = settings(source.code, rows, columns, arch)
    tiles = triton.cdiv(packing.row_bytes(columns) * 8, s.block_n)
    everything = {
        **outputs, "p_inputs": source.inputs or tuple(outputs.values())[:1], "rows": rows,
        "columns_over": columns // s.divisor, "rank": source.rank, "stream": source.stream, "tiles": tiles, **args,
    }  # fmt: skip
    tile = {"DIVISOR": s.divisor, "BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k}
    programs = tiles * triton.cdiv(rows, s.block_m)
    return _launch.Launch(kernel, programs, everything, {"SOURCE": source.code, **constexprs, **tile}, s.num_warps)


def plan_histogram(
    source: Source, bins: torch.Tensor, first: int, last: int, shift: int, arch: str, begin: int | None = None
) -> _launch.Launch:
    """``bins`` int64 ``[COPIES, BINS]``; by place from the flat index ``begin`` on, where one is given."""
    args = {"first": first, "last": last, "begin": begin or 0, "shift": shift}
    constexprs = {"BY_PLACE": begin is not None, "BINS": BINS, "COPIES": COPIES}
    return plan(histogram_kernel, source, arch, {"p_bins": bins}, args, constexprs)


def plan_mark(
    source: Source, words: torch.Tensor, total: torch.Tensor, first: int, last: int, known: int, arch: str
) -> _launch.Launch:
    outputs = {"p_bytes": words.view(-1), "p_count": total}
    return plan(mark_kernel, source, arch, outputs, {"first": first, "last": last, "known": known}, {})


# ---- the backend, with the signatures of reference.py ---------------------------------------------------------------


def histogram(source: Source, device: torch.device, *bounds: int, begin: int | None = None) -> torch.Tensor:
    bins = packing.zeros((COPIES, BINS), torch.int64, device)
    plan_histogram(source, bins, *bounds, _launch.arch(device), begin).run()
    return bins.sum(0)


def reach(bins: torch.Tensor, wanted: int) -> tuple[int, int, int]:
    """The bin in which the running sum reaches ``wanted``, the sum before it, and the bin's count."""
    sums = bins.cumsum(0)
    place = torch.searchsorted(sums, wanted).clamp(max=len(bins) - 1)
    place, end, inside = torch.stack([place, sums[place], bins[place]]).tolist()
    if end < wanted:
        raise RuntimeError(c.CHANGED)
    return place, end - inside, inside


def select(source: Source, count: int, device: torch.device, bad: slice, complaint: str) -> torch.Tensor:
    """Narrows down key and, among equal keys, place until what is inside is just what is wanted; then sets bits."""
    words = c.allocate(source.rows, source.columns, device)
    total = source.rows * source.columns
    if total == 0:
        return words
    first, last, shift = 0, (1 << source.bits) - 1, max(0, source.bits - 16)
    bins = histogram(source, device, first, last, shift)
    if bool(bins[bad].any()):
        raise ValueError(complaint)
    if count == 0:
        return words.zero_()
    known, wanted = total, count
    while True:
        place, below, inside = reach(bins, wanted)
        wanted -= below
        first += place << shift
        last = first + (1 << shift) - 1
        if wanted == inside or shift == 0:
            break
        shift = max(0, shift - 16)
        bins = histogram(source, device, first, last, shift)
    if wanted < inside:
        known, shift = 0, max(0, (total - 1).bit_length() - 16)
        while wanted < inside:
            place, below, inside = reach(histogram(source, device, first, last, shift, begin=known), wanted)
            wanted -= below
            known += place << shift
            after, shift = known + (1 << shift), max(0, shift - 16)
        known = after
    found = packing.zeros((1,), torch.int64, device)
    plan_mark(source, words, found, first, last, known, _launch.arch(device)).run()
    if int(found) != count:
        raise RuntimeError(c.CHANGED)
    return words


def select_lowrank(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, count: int) -> torch.Tensor:
    overflowed = (c.LARGEST_MAGNITUDE - c.INFINITY[torch.float32]) >> 15
    return select(product(left, values, right), count, left.device, slice(0, overflowed + 1), c.OVERFLOW)


def select_smallest(weight: torch.Tensor, count: int) -> torch.Tensor:
    source = weight_bits(weight)
    infinity = c.INFINITY[weight.dtype] >> max(0, source.bits - 16)
    return select(source, count, weight.device, slice(infinity, None), c.NONFINITE)


def select_random(rows: int, columns: int, count: int, stream: int, device: torch.device) -> torch.Tensor:
    source = Source(HASH.value, rows, columns, (), c.HASH_BITS, stream=stream)
    return select(source, count, device, slice(0, 0), "")
