"""Triton backend of ``update_scan``: the kernel for plain bf16 masks, launch settings, and the plan of a scan.

``b_`` block values, ``p_`` pointers, ``o_`` offsets, ``m_`` masks, UPPER_CASE constexpr.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ... import _launch, packing
from ... import numerics_triton as num
from . import contract as c
from . import triton_rules as rule
from .triton_tiles import WANT_MASK, WANT_ROWS, norms_kernel, tiles_kernel

# ---- words: two bf16 codes in one 32-bit register -------------------------------------------------------------------


@triton.jit(do_not_specialize=["groups", "tiles"])
def words_kernel(
    p_base, p_tuned, p_mask, p_rows, p_rules, groups: tl.int64, tiles: tl.int64,
    RULE: tl.constexpr, OUTPUTS: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mask, row counts and count of ``bitwise`` or ``storage``; rows are ``groups`` x 64 columns."""
    program = tl.program_id(0).to(tl.int64)
    # One row needs no division, which is some forty instructions in 64 bits.
    row = program * 0 if FLAT else program // tiles
    tile = program if FLAT else program % tiles
    words = groups * 32
    o_word = tile * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    p_a = p_base + row * words + o_word
    p_b = p_tuned + row * words + o_word
    # Full tiles load without a mask: fewer instructions, and 16-byte loads whatever the analysis can prove.
    if (tile + 1) * (BLOCK // 2) <= words:
        b_a = tl.load(p_a)
        b_b = tl.load(p_b)
    else:
        b_a = tl.load(p_a, mask=o_word < words, other=0)
        b_b = tl.load(p_b, mask=o_word < words, other=0)
    # Each step leaves its answer in the top bit of both halves; no addition carries from one half to the other.
    b_flags = (((b_a ^ b_b) & 0x7FFF7FFF) + 0x7FFF7FFF) | (b_a ^ b_b)
    if RULE == rule.BITWISE:
        b_a_magnitude = b_a & 0x7FFF7FFF
        b_b_magnitude = b_b & 0x7FFF7FFF
        b_not_zero = (b_a_magnitude | b_b_magnitude) + 0x7FFF7FFF
        b_both_nan = (b_a_magnitude + 0x007F007F) & (b_b_magnitude + 0x007F007F)
        b_flags = b_flags & b_not_zero & (b_both_nan ^ 0xFFFFFFFF)
    b_flags = (b_flags >> 15) & 0x00010001
    # Four words become one byte inside a thread, which holds them after a 16-byte load: no traffic between threads.
    b_spread = tl.reshape(b_flags, [BLOCK // 8, 4]) << (tl.arange(0, 4) * 2)[None, :].to(tl.uint32)
    b_spread = tl.sum(b_spread, axis=1)
    if WANT_MASK & OUTPUTS:
        o_byte = tile * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        b_bytes = (b_spread | (b_spread >> 15)) & 0xFF
        tl.store(p_mask + row * (groups * 8) + o_byte, b_bytes.to(tl.uint8), mask=o_byte < groups * 8)
    count = tl.sum(num.popcount(b_spread)).to(tl.int64)
    if WANT_ROWS & OUTPUTS:
        tl.atomic_add(p_rows + row, count)
    # The first program turns the un-cast count, which does not exist here, into UNDEFINED.
    o_slot = tl.arange(0, 2)
    undefined = tl.where(program == 0, -1, 0).to(tl.int64)
    tl.atomic_add(p_rules + o_slot, tl.where(o_slot == 0, count, undefined))


# ---- launch settings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How one scan is launched; a pure function of what is asked, so that a test needs no device."""

    words: bool  # words_kernel instead of tiles_kernel
    flat: bool  # the tensor is treated as a single row
    divisor: int  # proven divisor of the number of columns
    block_m: int
    block_n: int
    steps: int  # tiles of a program
    num_warps: int


def settings(
    rows: int, columns: int, dtypes: tuple[torch.dtype, torch.dtype], rules: Sequence[c.Rule], outputs: c.Output,
    additive: bool, arch: str,
) -> Settings:  # fmt: skip
    by_row = bool(outputs & (c.Output.ROWS | c.Output.COLUMNS))
    # Packed rows have no padding where columns are a multiple of 64: then bits are one sequence, as elements are.
    flat = rows == 1 or (not by_row and (columns % 64 == 0 or not outputs & c.Output.MASK))
    if flat:
        rows, columns = 1, rows * columns
    divisor = math.gcd(columns, 64)
    # 8 elements make a 16-byte load of bf16; between 8 and 64 more specialisations would gain nothing.
    divisor = 64 if divisor == 64 else 8 if divisor >= 8 else 1
    plain = len(rules) == 1 and rules[0].code in (c.RuleCode.BITWISE, c.RuleCode.STORAGE) and not additive
    words = plain and dtypes == (torch.bfloat16, torch.bfloat16) and divisor == 64
    words = words and not outputs & ~(c.Output.MASK | c.Output.ROWS)
    if words and (flat or columns >= 1024):
        # 32 elements (four 16-byte loads of each tensor) per thread; not yet measured on a device.
        block = 8192
        # Tiles that divide a row leave no thread without work; not yet measured on a device.
        while not flat and block > 1024 and columns % block:
            block //= 2
        # A wave of AMD has 64 lanes: half as many warps hold as many threads.
        return Settings(True, flat, divisor, 1, block, 1, max(1, block // (2048 if arch == "hip" else 1024)))
    heavy = len(rules) > 1 or bool(outputs & ~(c.Output.MASK | c.Output.ROWS | c.Output.COLUMNS))
    # 16 elements per thread are two to four 16-byte loads of each tensor. Ahead of time, 32 spill; where much is made
    # of each element, or where predicates take scalar registers (AMD), 16 do too. Not yet measured on a device.
    per_thread, elements = (8, 2048) if heavy else (16, 4096)
    if c.Output.COLUMNS in outputs:
        # Tall tiles: one 64-bit atomic per column serves the rows of a tile; not yet measured on a device.
        block_n = elements if rows == 1 else 64
    else:
        block_n = min(elements, max(64, triton.next_power_of_2(columns)))
    block_m = elements // block_n if rows > 1 else 1
    # Eight tiles share one reduction and one flush of histograms; small tensors have too few tiles for that, and what
    # little the light outputs reduce does not pay for a loop. Not yet measured on a device.
    steps = 8 if heavy and rows * columns >= 1 << 23 else 1
    # A wave of AMD has 64 lanes, and gets half as many elements each: the same number of warps.
    return Settings(False, flat, divisor, block_m, block_n, steps, max(1, block_m * block_n // (per_thread * 32)))


# ---- launches -------------------------------------------------------------------------------------------------------


def threshold_of(r: c.Rule) -> int:
    """What the kernel compares with: whole ULP, or the bits of an fp32 number."""
    if r.code == c.RuleCode.ULP:
        # No two codes are farther apart than 0xFFFF.
        return int(min(r.threshold, 0xFFFF))
    return int(torch.tensor(r.threshold, dtype=torch.float32).view(torch.int32).item())


def plan(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rules: Sequence[c.Rule],
    outputs: c.Output,
    additive: bool,
    arch: str,
    mask: torch.Tensor | None = None,
) -> tuple[c.ScanTensors, list[_launch.Launch]]:
    """Result tensors and the launches that fill them. ``base`` and ``tuned`` may be on the meta device."""
    rows, columns = packing.matrix_shape(base.shape)
    s = settings(rows, columns, (base.dtype, tuned.dtype), rules, outputs, additive, arch)
    out = c.allocate(base, tuned, len(rules), outputs, additive, mask, fill=False)
    # Mask and norms are overwritten; everything else is added to.
    for name, tensor in zip(out._fields, out, strict=True):
        if name not in ("mask", "norms"):
            tensor.zero_()
    if s.flat:
        rows, columns = 1, rows * columns
    tiles = triton.cdiv(columns, s.block_n)
    programs = triton.cdiv(tiles * triton.cdiv(rows, s.block_m), s.steps)
    pointers = {"p_mask": out.mask, "p_rows": out.row_counts, "p_rules": out.rule_counts}
    # Row and column counts of a flat tensor are those of its single row.
    common: dict[str, object] = {"OUTPUTS": int(outputs), "FLAT": s.flat}
    # A view as 32-bit words needs 4-byte alignment, which a slice of a 16-bit tensor may lack.
    if s.words and base.data_ptr() % 4 == 0 and tuned.data_ptr() % 4 == 0:
        bits = {"p_base": flat_view(base, torch.uint32), "p_tuned": flat_view(tuned, torch.uint32)}
        constexprs = {"RULE": int(rules[0].code), "BLOCK": s.block_n, **common}
        args = {**bits, **pointers, "groups": columns // 64, "tiles": tiles}
        return out, [_launch.Launch(words_kernel, programs, args, constexprs, s.num_warps)]
    norms = c.Output.NORMS in outputs
    partials = packing.empty((2 * c.NORMS, programs if norms else 0), torch.float64, base.device)
    args = {
        "p_base": bits_of(base), "p_tuned": bits_of(tuned), **pointers, "p_columns": out.col_counts,
        "p_counters": out.counters, "p_ulp": out.ulp_histogram, "p_exponents": out.exponent_histogram,
        "p_partials": partials, "rows": rows, "columns_over": columns // s.divisor, "tiles": tiles,
        "programs": programs,
    }  # fmt: skip
    constexprs = {
        "DIVISOR": s.divisor, "BASE": c.DTYPE_CODES[base.dtype], "TUNED": c.DTYPE_CODES[tuned.dtype],
        "ADDITIVE": additive, "RULES": tuple(v for r in rules for v in (int(r.code), threshold_of(r))),
        "BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "STEPS": s.steps, **common,
    }  # fmt: skip
    launches = [_launch.Launch(tiles_kernel, programs, args, constexprs, s.num_warps)]
    if norms:
        uncast = c.has_uncast(base.dtype, tuned.dtype, additive)
        args = {"p_partials": partials, "p_norms": out.norms, "programs": programs}
        launches.append(_launch.Launch(norms_kernel, 2 * c.NORMS, args, {"UNCAST": uncast, "BLOCK": 1024}, 4))
    return out, launches


def flat_view(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.view(-1).view(dtype)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return flat_view(tensor, torch.int32 if tensor.element_size() == 4 else torch.int16)


def scan(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rules: Sequence[c.Rule],
    outputs: c.Output,
    additive: bool,
    mask: torch.Tensor | None = None,
) -> c.ScanTensors:
    """All outputs of one scan; ``rules[0]`` decides mask, rows, columns and the histogram of changed exponents."""
    if base.numel() == 0:
        return empty_scan(base, tuned, rules, outputs, additive, mask)
    out, launches = plan(base, tuned, rules, outputs, additive, _launch.arch(base.device), mask)
    for launch in launches:
        launch.run()
    return out


def empty_scan(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rules: Sequence[c.Rule],
    outputs: c.Output,
    additive: bool,
    mask: torch.Tensor | None = None,
) -> c.ScanTensors:
    """Zeros, and UNDEFINED where there is no un-cast comparison."""
    out = c.allocate(base, tuned, len(rules), outputs, additive, mask)
    uncast = c.has_uncast(base.dtype, tuned.dtype, additive)
    for i, r in enumerate(rules):
        if not uncast or r.code == c.RuleCode.ULP:
            out.rule_counts[i, 1] = c.UNDEFINED
    if not uncast and c.Output.NORMS in outputs:
        out.norms[1] = c.UNDEFINED
    return out
