"""Triton backend of ``mask_algebra``: everything works on packed words and never makes a byte per coordinate in memory.

``b_`` block values, ``p_`` pointers, ``o_`` offsets, ``m_`` masks, UPPER_CASE constexpr.
"""


# mypy: disable-error-code="assignment"

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ... import _launch, packing
from ... import numerics_triton as num
from .triton_pack import pack_kernel, unpack_kernel

# ---- counts over several masks --------------------------------------------------------------------------------------


@triton.jit
def load_all(p_masks, o_word, words, MASKED: tl.constexpr):
    """One block of words of each mask, as a tuple."""
    b_words = ()
    for i in tl.static_range(len(p_masks)):
        if MASKED:
            b_words = b_words + (tl.load(p_masks[i] + o_word, mask=o_word < words, other=0),)
        else:
            b_words = b_words + (tl.load(p_masks[i] + o_word),)
    return b_words


@triton.jit
def zeros(COUNT: tl.constexpr, SIZE: tl.constexpr):
    """A tuple of blocks of zeros."""
    b_zeros = ()
    for _ in tl.static_range(COUNT):
        b_zeros = b_zeros + (tl.zeros([SIZE], tl.int32),)
    return b_zeros


@triton.jit
def count_bits(b_words, BLOCK: tl.constexpr):
    """Set bits, added up over the four neighbouring words that one thread loads."""
    return tl.sum(tl.reshape(num.popcount(b_words), [BLOCK // 4, 4]), axis=1)


@triton.jit
def pair_tiles(p_masks, o_word, words, MASKED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Counts of all pairs i <= j over TILES blocks: a tuple, ordered by i and then j."""
    MASKS: tl.constexpr = len(p_masks)
    b_counts = zeros(MASKS * (MASKS + 1) // 2, BLOCK // 4)
    for _ in range(TILES):
        b_words = load_all(p_masks, o_word, words, MASKED)
        b_pairs = ()
        for i in tl.static_range(MASKS):
            for j in tl.static_range(i, MASKS):
                b_pairs = b_pairs + (count_bits(b_words[i] & b_words[j], BLOCK),)
        b_next = ()
        for k in tl.static_range(len(b_pairs)):
            b_next = b_next + (b_counts[k] + b_pairs[k],)
        b_counts = b_next
        o_word += BLOCK
    return b_counts


@triton.jit
def put_pairs(p_counts, b_counts, MASKS: tl.constexpr, SLOTS: tl.constexpr):
    """Adds the tuple of counts of pairs to the symmetric matrix."""
    o_slot = tl.arange(0, SLOTS)
    o_low = tl.minimum(o_slot // MASKS, o_slot % MASKS)
    o_high = tl.maximum(o_slot // MASKS, o_slot % MASKS)
    # Pairs before row i of the upper triangle, then the place within that row.
    o_pair = o_low * MASKS - o_low * (o_low - 1) // 2 + o_high - o_low
    b_slots = tl.zeros([SLOTS], tl.int32)
    for k in tl.static_range(len(b_counts)):
        b_slots = tl.where(o_pair == k, tl.sum(b_counts[k]), b_slots)
    tl.atomic_add(p_counts + o_slot, b_slots.to(tl.int64), mask=o_slot < MASKS * MASKS)


@triton.jit(do_not_specialize=["words"])
def pairs_kernel(p_masks, p_counts, words: tl.int64, SLOTS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (BLOCK * TILES)
    o_word = start + tl.arange(0, BLOCK)
    # Full blocks load without a mask: 16-byte loads and fewer instructions.
    if start + BLOCK * TILES <= words:
        put_pairs(p_counts, pair_tiles(p_masks, o_word, words, False, BLOCK, TILES), len(p_masks), SLOTS)
    else:
        put_pairs(p_counts, pair_tiles(p_masks, o_word, words, True, BLOCK, TILES), len(p_masks), SLOTS)


@triton.jit
def agreement_tiles(p_masks, o_word, words, MASKED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
                    PLANES: tl.constexpr):  # fmt: skip
    """How many coordinates are set in exactly 1, 2, .. of the masks, over TILES blocks: a tuple."""
    MASKS: tl.constexpr = len(p_masks)
    b_counts = zeros(MASKS, BLOCK // 4)
    for _ in range(TILES):
        b_words = load_all(p_masks, o_word, words, MASKED)
        # Votes of 32 coordinates at a time, as binary numbers whose digits lie in PLANES words.
        b_planes = ()
        for _p in tl.static_range(PLANES):
            b_planes = b_planes + (b_words[0] & 0,)
        for i in tl.static_range(MASKS):
            b_carry = b_words[i]
            b_added = ()
            for p in tl.static_range(PLANES):
                b_added = b_added + (b_planes[p] ^ b_carry,)
                b_carry = b_planes[p] & b_carry
            b_planes = b_added
        b_next = ()
        for k in tl.static_range(MASKS):
            b_match = b_words[0] | 0xFFFFFFFF
            for p in tl.static_range(PLANES):
                # Bit p of k + 1 says whether the digit must be set or clear.
                b_match = b_match & (b_planes[p] if ((k + 1) >> p) & 1 else b_planes[p] ^ 0xFFFFFFFF)
            b_next = b_next + (b_counts[k] + count_bits(b_match, BLOCK),)
        b_counts = b_next
        o_word += BLOCK
    return b_counts


@triton.jit
def put_agreement(p_counts, b_counts, elements, MASKS: tl.constexpr, SLOTS: tl.constexpr):
    o_slot = tl.arange(0, SLOTS)
    b_slots = tl.zeros([SLOTS], tl.int32)
    for k in tl.static_range(MASKS):
        b_slots = tl.where(o_slot == k + 1, tl.sum(b_counts[k]), b_slots)
    # Coordinates set in no mask are the rest; counted directly they would include the padding.
    first = tl.where(tl.program_id(0) == 0, elements, 0) - tl.sum(b_slots)
    tl.atomic_add(p_counts + o_slot, tl.where(o_slot == 0, first, b_slots.to(tl.int64)), mask=o_slot <= MASKS)


@triton.jit(do_not_specialize=["words", "elements"])
def agreement_kernel(
    p_masks, p_counts, words: tl.int64, elements: tl.int64,
    PLANES: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (BLOCK * TILES)
    o_word = start + tl.arange(0, BLOCK)
    if start + BLOCK * TILES <= words:
        b_counts = agreement_tiles(p_masks, o_word, words, False, BLOCK, TILES, PLANES)
        put_agreement(p_counts, b_counts, elements, len(p_masks), SLOTS)
    else:
        b_counts = agreement_tiles(p_masks, o_word, words, True, BLOCK, TILES, PLANES)
        put_agreement(p_counts, b_counts, elements, len(p_masks), SLOTS)


# ---- counts of rows and columns -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "words_over", "tiles"])
def rows_kernel(
    p_words, p_counts, rows: tl.int64, words_over: tl.int64, tiles: tl.int64,
    DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    words = words_over * DIVISOR
    o_m = program // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_words = (o_m < rows)[:, None] & (o_n < words)[None, :]
    b_words = tl.load(p_words + o_m[:, None] * words + o_n[None, :], mask=m_words, other=0)
    b_counts = tl.sum(num.popcount(b_words), axis=1)
    tl.atomic_add(p_counts + o_m, b_counts.to(tl.int64), mask=o_m < rows)


@triton.jit(do_not_specialize=["rows", "words_over", "columns", "tiles"])
def columns_kernel(
    p_words, p_counts, rows: tl.int64, words_over: tl.int64, columns: tl.int64, tiles: tl.int64,
    DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    words = words_over * DIVISOR
    o_m = program // tiles * (BLOCK_M * STEPS) + tl.arange(0, BLOCK_M)
    o_n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    # Four columns are counted in the four bytes of a word; a program's rows are too few for a byte to overflow.
    b_lanes = tl.zeros([BLOCK_M, BLOCK_N, 8], tl.uint32)
    o_bit = tl.arange(0, 8).to(tl.uint32)
    for _ in range(STEPS):
        m_words = (o_m < rows)[:, None] & (o_n < words)[None, :]
        b_words = tl.load(p_words + o_m[:, None] * words + o_n[None, :], mask=m_words, other=0)
        b_lanes += (b_words[:, :, None] >> o_bit[None, None, :]) & 0x01010101
        o_m += BLOCK_M
    b_lanes = tl.sum(b_lanes, axis=0)
    o_byte = tl.arange(0, 4)
    b_counts = (b_lanes[:, :, None] >> (o_byte * 8).to(tl.uint32)[None, None, :]) & 0xFF
    o_column = o_n[:, None, None] * 32 + (o_byte * 8)[None, None, :] + tl.arange(0, 8)[None, :, None]
    tl.atomic_add(p_counts + o_column, b_counts.to(tl.int64), mask=(o_column < columns) & (b_counts != 0))


# ---- launch settings ------------------------------------------------------------------------------------------------

GROUP = 8  # masks that one launch counts against each other: their 36 counts and 8 words fit in registers


@dataclass(frozen=True)
class Settings:
    """Tile and warps of a launch; a pure function of shapes, so that a test needs no device."""

    divisor: int  # proven divisor of a row's length
    block_m: int
    block_n: int
    steps: int
    num_warps: int


def settings(kernel: str, rows: int, length: int, masks: int, arch: str) -> Settings:
    """``length``: elements of a row for ``pack`` and ``unpack``, else its 32-bit words."""
    # A wave of AMD has 64 lanes: half as many warps hold as many threads.
    warps = 2 if arch == "hip" else 4
    if kernel in ("pairs", "agreement"):
        # One 16-byte load of each mask per thread and step; eight steps share one reduction of the counts. Small masks
        # have too few blocks for that, and many masks too many counts for registers. Not yet measured on a device.
        return Settings(1, 1, 512, 8 if masks <= GROUP and length >= 1 << 16 else 1, warps)
    if kernel in ("pack", "unpack"):
        # Four 16-byte accesses per thread; rows at odd places go by bytes, 16 of them. Not yet measured on a device.
        divisor = 64 if length % 64 == 0 else 8 if length % 8 == 0 else 1
        elements = 8192 if divisor > 1 else 2048
        block_n = min(elements, max(64, triton.next_power_of_2(length)))
        return Settings(divisor, 1 if rows == 1 else elements // block_n, block_n, 1, warps)
    divisor = 4 if length % 4 == 0 else 2
    if kernel == "rows":
        # 16 words per thread; not yet measured on a device.
        block_n = min(2048, max(4, triton.next_power_of_2(length)))
        return Settings(divisor, 1 if rows == 1 else 2048 // block_n, block_n, 1, warps)
    # 64 rows for each 64-bit atomic, and at least 8 x 64 words per step; not yet measured on a device.
    block_n = min(64, max(2, triton.next_power_of_2(length)))
    return Settings(divisor, 8, block_n, 8, warps)


# ---- launches -------------------------------------------------------------------------------------------------------


def words_of(mask: torch.Tensor, dtype: torch.dtype = torch.uint32) -> torch.Tensor:
    """The bytes of a mask or of a dense bool tensor as words; copied where they do not begin at a whole word."""
    flat = mask.reshape(-1).view(torch.uint8)
    return (flat.clone() if flat.data_ptr() % dtype.itemsize else flat).view(dtype)


def plan_pack(dense: torch.Tensor, out: torch.Tensor, arch: str) -> _launch.Launch:
    return plan_dense("pack", pack_kernel, dense, out, arch)


def plan_unpack(out: torch.Tensor, dense: torch.Tensor, arch: str) -> _launch.Launch:
    return plan_dense("unpack", unpack_kernel, dense, out, arch)


def plan_dense(name: str, kernel: object, dense: torch.Tensor, packed: torch.Tensor, arch: str) -> _launch.Launch:
    rows, columns = dense.shape
    # Packed rows have no padding where columns are a multiple of 64: then the matrix is one long row.
    if columns % 64 == 0:
        rows, columns = 1, rows * columns
    s = settings(name, rows, columns, 1, arch)
    tiles = triton.cdiv(packing.row_bytes(columns) * 8, s.block_n)
    args = {
        "p_dense": words_of(dense, torch.uint64 if s.divisor > 1 else torch.uint8), "p_bytes": packed.view(-1),
        "rows": rows, "columns_over": columns // s.divisor, "tiles": tiles,
    }  # fmt: skip
    constexprs = {"DIVISOR": s.divisor, "BLOCK_M": s.block_m, "BLOCK_N": s.block_n}
    return _launch.Launch(kernel, tiles * triton.cdiv(rows, s.block_m), args, constexprs, s.num_warps)


def plan_pairs(masks: Sequence[torch.Tensor], out: torch.Tensor, arch: str) -> _launch.Launch:
    words = masks[0].numel() // 4
    s = settings("pairs", 1, words, len(masks), arch)
    args = {"p_masks": tuple(words_of(mask) for mask in masks), "p_counts": out, "words": words}
    constexprs = {"SLOTS": triton.next_power_of_2(len(masks) ** 2), "BLOCK": s.block_n, "TILES": s.steps}
    return _launch.Launch(pairs_kernel, triton.cdiv(words, s.block_n * s.steps), args, constexprs, s.num_warps)


def plan_agreement(masks: Sequence[torch.Tensor], columns: int, out: torch.Tensor, arch: str) -> _launch.Launch:
    words = masks[0].numel() // 4
    s = settings("agreement", 1, words, len(masks), arch)
    args = {
        "p_masks": tuple(words_of(mask) for mask in masks), "p_counts": out, "words": words,
        "elements": masks[0].shape[0] * columns,
    }  # fmt: skip
    constexprs = {
        "PLANES": len(masks).bit_length(), "SLOTS": triton.next_power_of_2(len(masks) + 1), "BLOCK": s.block_n,
        "TILES": s.steps,
    }  # fmt: skip
    return _launch.Launch(agreement_kernel, triton.cdiv(words, s.block_n * s.steps), args, constexprs, s.num_warps)


def plan_rows(words: torch.Tensor, out: torch.Tensor, arch: str) -> _launch.Launch:
    rows, length = words.shape[0], words.shape[1] // 4
    s = settings("rows", rows, length, 1, arch)
    tiles = triton.cdiv(length, s.block_n)
    args = {
        "p_words": words_of(words), "p_counts": out, "rows": rows, "words_over": length // s.divisor, "tiles": tiles,
    }  # fmt: skip
    constexprs = {"DIVISOR": s.divisor, "BLOCK_M": s.block_m, "BLOCK_N": s.block_n}
    return _launch.Launch(rows_kernel, tiles * triton.cdiv(rows, s.block_m), args, constexprs, s.num_warps)


def plan_columns(words: torch.Tensor, columns: int, out: torch.Tensor, arch: str) -> _launch.Launch:
    rows, length = words.shape[0], words.shape[1] // 4
    s = settings("columns", rows, length, 1, arch)
    tiles = triton.cdiv(length, s.block_n)
    args = {
        "p_words": words_of(words), "p_counts": out, "rows": rows, "words_over": length // s.divisor,
        "columns": columns, "tiles": tiles,
    }  # fmt: skip
    constexprs = {"DIVISOR": s.divisor, "BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "STEPS": s.steps}
    programs = tiles * triton.cdiv(rows, s.block_m * s.steps)
    return _launch.Launch(columns_kernel, programs, args, constexprs, s.num_warps)


# ---- the backend, with the signatures of reference.py ---------------------------------------------------------------


def pack(dense: torch.Tensor) -> torch.Tensor:
    out = packing.empty((dense.shape[0], packing.row_bytes(dense.shape[1])), torch.uint8, dense.device)
    if dense.numel():
        plan_pack(dense, out, _launch.arch(dense.device)).run()
    return out


def unpack(words: torch.Tensor, columns: int) -> torch.Tensor:
    dense = packing.empty((words.shape[0], columns), torch.bool, words.device)
    if dense.numel():
        plan_unpack(words, dense, _launch.arch(words.device)).run()
    return dense


def pair_counts(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    out = packing.zeros((len(masks), len(masks)), torch.int64, masks[0].device)
    if masks[0].numel() == 0:
        return out
    if len(masks) <= GROUP:
        plan_pairs(masks, out, _launch.arch(out.device)).run()
        return out
    # More masks are taken in unions of two half groups, so that every pair shares a launch.
    for members in unions(len(masks)):
        part = packing.zeros((len(members), len(members)), torch.int64, out.device)
        plan_pairs([masks[i] for i in members], part, _launch.arch(out.device)).run()
        for i, row in zip(members, part, strict=True):
            for run in (members[: GROUP // 2], members[GROUP // 2 :]):
                at = members.index(run[0])
                out[i, run[0] : run[-1] + 1] = row[at : at + len(run)]
    return out


def unions(count: int) -> Iterator[list[int]]:
    """Indices of all unions of two half groups of ``count`` masks; each half is a run of neighbours."""
    halves = [list(range(i, min(i + GROUP // 2, count))) for i in range(0, count, GROUP // 2)]
    for i, first in enumerate(halves):
        for second in halves[i + 1 :]:
            yield first + second


def agreement(masks: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    out = packing.zeros((len(masks) + 1,), torch.int64, masks[0].device)
    if masks[0].numel():
        plan_agreement(masks, columns, out, _launch.arch(out.device)).run()
    return out


def row_counts(words: torch.Tensor) -> torch.Tensor:
    out = packing.zeros((words.shape[0],), torch.int64, words.device)
    if words.numel():
        plan_rows(words, out, _launch.arch(out.device)).run()
    return out


def col_counts(words: torch.Tensor, columns: int) -> torch.Tensor:
    out = packing.zeros((columns,), torch.int64, words.device)
    if words.numel():
        plan_columns(words, columns, out, _launch.arch(out.device)).run()
    return out
