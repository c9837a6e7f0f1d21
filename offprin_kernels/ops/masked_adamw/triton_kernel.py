"""Triton backend of ``masked_adamw``: one launch steps all full tensors of a kind, and one all masked ones.

``b_`` block values, ``p_`` pointers, ``o_`` offsets, ``m_`` masks, UPPER_CASE constexpr.
"""

# mypy: disable-error-code="assignment"

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from ... import _backend, _launch, packing
from ... import numerics_triton as num
from . import contract as c
from .contract import Slot
from .triton_coordinates import (
    SLOT_CHANGED,
    SLOT_MASK,
    SLOT_NUMEL,
    SLOT_PREFIX,
    SLOTS,
    address,
    addresses,
    advance,
    constants,
)

BLOCK = tl.constexpr(c.BLOCK)
WORDS = tl.constexpr(c.BLOCK // 32)  # of a block's mask
TILE_BITS = tl.constexpr(40)  # of an entry of ``p_units``: the tile, below the tensor
TILE = tl.constexpr((1 << TILE_BITS.value) - 1)

# ---- every coordinate -----------------------------------------------------------------------------------------------


@triton.jit
def pack_bytes(b_bits):
    """Bits of a block as bytes, in int32: eight neighbours, which one thread holds."""
    return tl.sum(tl.reshape(b_bits, [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :], axis=1)


@triton.jit
def mark_bytes(p_changed, b_bytes, block, numel):
    """Ors a block's bits into the bytes that are its own."""
    o_byte = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    m_byte = o_byte < (numel + 63) // 64 * 8
    b_old = tl.load(p_changed + o_byte, mask=m_byte, other=0)
    tl.store(p_changed + o_byte, b_old | b_bytes.to(tl.uint8), mask=m_byte)


@triton.jit
def full_kernel(
    p_units, p_slots, p_hypers, p_cohorts, p_counts,
    PARAM: tl.constexpr, STATE: tl.constexpr, ROUNDING: tl.constexpr, COHORTS: tl.constexpr, TRACKED: tl.constexpr,
    PTX: tl.constexpr, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Steps BLOCKS blocks of a tensor that has no mask."""
    unit = tl.load(p_units + tl.program_id(0).to(tl.int64))
    tensor = unit >> TILE_BITS
    block = (unit & TILE) * BLOCKS
    p_row = p_slots + tensor * SLOTS
    numel = tl.load(p_row + SLOT_NUMEL)
    last = tl.minimum(block + BLOCKS, (numel + (BLOCK - 1)) // BLOCK)
    if block < last:
        p_all = addresses(p_row, PARAM, STATE, ALIGNED)
        shared, bias, factors = constants(p_row, p_hypers, p_cohorts)
        p_changed = address(p_row, SLOT_CHANGED, tl.uint8, False)
        marked = tl.load(p_row + SLOT_CHANGED) != 0
        b_count = tl.zeros([BLOCK // 8], tl.int32)
        while block < last:
            # The product shows the compiler how blocks are aligned, which it cannot follow through a loop.
            o_flat = block * BLOCK + tl.arange(0, BLOCK)
            m_in = o_flat < numel
            # Full blocks load without a mask: 16-byte accesses, and fewer instructions.
            if (block + 1) * BLOCK <= numel:
                b_changed = advance(
                    p_all, shared, bias, factors, o_flat, o_flat, m_in, PARAM, STATE, ROUNDING, COHORTS, False, PTX
                )
            else:
                b_changed = advance(
                    p_all, shared, bias, factors, o_flat, o_flat, m_in, PARAM, STATE, ROUNDING, COHORTS, True, PTX
                )
            if TRACKED:
                b_bytes = pack_bytes(b_changed)
                b_count += num.popcount(b_bytes.to(tl.uint32))
                if marked:
                    mark_bytes(p_changed, b_bytes, block, numel)
            block += 1
        if TRACKED:
            tl.atomic_add(p_counts + tensor, tl.sum(b_count).to(tl.int64), sem="relaxed")


# ---- the coordinates of a mask --------------------------------------------------------------------------------------


@triton.jit
def mark_entries(p_changed, b_changed, o_entry):
    """Ors bits at places that other programs' bits may share a word with."""
    b_bit = (o_entry & 31).to(tl.int8).to(tl.int32)
    tl.atomic_or(p_changed + (o_entry >> 5), (b_bit * 0 + 1) << b_bit, mask=b_changed != 0, sem="relaxed")


@triton.jit
def masked_kernel(
    p_units, p_slots, p_hypers, p_cohorts, p_counts,
    PARAM: tl.constexpr, STATE: tl.constexpr, ROUNDING: tl.constexpr, COHORTS: tl.constexpr, TRACKED: tl.constexpr,
    PTX: tl.constexpr, BLOCKS: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Steps what the mask has in BLOCKS blocks of a tensor, as many coordinates at a time as their mask has words."""
    LANES: tl.constexpr = BLOCKS * WORDS
    unit = tl.load(p_units + tl.program_id(0).to(tl.int64))
    tensor = unit >> TILE_BITS
    p_row = p_slots + tensor * SLOTS
    blocks = (tl.load(p_row + SLOT_NUMEL) + (BLOCK - 1)) // BLOCK
    block = (unit & TILE) * BLOCKS
    last = tl.minimum(block + BLOCKS, blocks)
    if block < last:
        p_prefix = address(p_row, SLOT_PREFIX, tl.int64, False)
        entry = tl.load(p_prefix + block)
        if tl.load(p_prefix + last) > entry:
            p_all = addresses(p_row, PARAM, STATE, False)
            shared, bias, factors = constants(p_row, p_hypers, p_cohorts)
            p_changed = address(p_row, SLOT_CHANGED, tl.int32, False)
            marked = tl.load(p_row + SLOT_CHANGED) != 0
            p_words = address(p_row, SLOT_MASK, tl.uint32, False)
            o_word = block * WORDS + tl.arange(0, LANES)
            b_word = tl.load(p_words + o_word, mask=o_word < last * WORDS, other=0)
            b_left = num.popcount(b_word)
            o_entry = entry + (tl.cumsum(b_left) - b_left).to(tl.int64)
            # A turn takes the lowest bit of every word; where that makes too many turns, neighbouring coordinates.
            turns = tl.max(b_left).to(tl.int64)
            sparse = turns <= SPARSE
            if not sparse:
                turns = (last - block) * (BLOCK // LANES)
            turn = turns * 0
            b_count = tl.zeros([LANES], tl.int32)
            while turn < turns:
                if sparse:
                    b_lowest = b_word & ((b_word ^ 0xFFFFFFFF) + 1)
                    b_word = b_word ^ b_lowest
                    o_flat = o_word * 32 + num.popcount(b_lowest - 1).to(tl.int64)
                    b_in = num.popcount(b_lowest)
                else:
                    o_flat = block * BLOCK + turn * LANES + tl.arange(0, LANES)
                    b_bits = tl.load(p_words + (o_flat >> 5))
                    b_in = ((b_bits >> (tl.arange(0, LANES) & 31).to(tl.uint32)) & 1).to(tl.int32)
                    o_entry = entry + (tl.cumsum(b_in) - b_in).to(tl.int64)
                    entry += tl.sum(b_in).to(tl.int64)
                b_changed = advance(
                    p_all, shared, bias, factors, o_flat, o_entry, b_in != 0, PARAM, STATE, ROUNDING, COHORTS, True, PTX
                )
                if TRACKED:
                    b_count += b_changed
                    if marked:
                        mark_entries(p_changed, b_changed, o_entry)
                o_entry += 1
                turn += 1
            if TRACKED:
                tl.atomic_add(p_counts + tensor, tl.sum(b_count).to(tl.int64), sem="relaxed")


# ---- launch settings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How tensors are cut up; a pure function of mask and architecture, so that a test needs no device."""

    blocks: int  # of contract.BLOCK coordinates, to a program
    sparse: int  # most bits of any word of a program's mask with which it goes word by word; 0 without a mask
    num_warps: int


def settings(masked: bool, arch: str) -> Settings:
    # A wave of AMD has 64 lanes: half as many warps hold as many threads.
    warps = 2 if arch == "hip" else 4
    if masked:
        # 256 words of 32 bits, two to a thread: few registers, so that many programs wait for memory at once. At 1 %
        # the fullest of the words has some 3 bits, at 5 % 7, at an eighth 11, where 32 turns over neighbours, which
        # read and write whole sectors, begin to be the better way. Not yet measured on a device.
        return Settings(8, 11, warps)
    # 8 elements to a thread make 16-byte accesses of bf16. Four blocks pay for the three loads, each waiting for the
    # one before, that a program begins with; a norm of 4,096 weights is one program. Not yet measured on a device.
    return Settings(4, 0, warps)


# ---- launches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceTables:
    """The tables where the kernels read them, and where visible changes are counted."""

    slots: torch.Tensor
    hypers: torch.Tensor
    cohorts: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, tables: c.Tables, counts: torch.Tensor) -> "DeviceTables":
        sources = (tables.slots, tables.hypers, tables.cohorts)
        if tables.device.type == "cpu":
            return cls(*sources, counts)
        # One copy, out of pinned memory that PyTorch does not reuse before it is done; rows are multiples of 16 bytes
        # but the last table's.
        sizes = [t.numel() * t.element_size() for t in sources]
        staging = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        for source, part in zip(sources, staging.split(sizes), strict=True):
            part.copy_(source.reshape(-1).view(torch.uint8))
        parts = staging.to(tables.device, non_blocking=True).split(sizes)
        slots, hypers, cohorts = (part.view(source.dtype) for source, part in zip(sources, parts, strict=True))
        return cls(slots, hypers, cohorts, counts)


def plan(
    kind: c.Kind, units: torch.Tensor, on_device: DeviceTables, arch: str, *, masked: bool, cohorts: bool,
    tracked: bool, aligned: bool,
) -> _launch.Launch:  # fmt: skip
    """``aligned``: everything a full tensor has begins at a multiple of 16 bytes; masked ones are not asked."""
    s = settings(masked, arch)
    args = {
        "p_units": units, "p_slots": on_device.slots, "p_hypers": on_device.hypers, "p_cohorts": on_device.cohorts,
        "p_counts": on_device.counts,
    }  # fmt: skip
    constexprs = {
        "PARAM": c.DTYPE_CODES[kind.param], "STATE": c.DTYPE_CODES[kind.state], "ROUNDING": int(kind.rounding),
        "COHORTS": cohorts, "TRACKED": tracked, "PTX": arch == "cuda" and not _backend.interpreting(),
        **({"SPARSE": s.sparse} if masked else {"ALIGNED": aligned}), "BLOCKS": s.blocks,
    }  # fmt: skip
    return _launch.Launch(masked_kernel if masked else full_kernel, len(units), args, constexprs, s.num_warps)


def units_of(numel: Sequence[int], members: np.ndarray, coordinates: int, device: torch.device) -> torch.Tensor:
    """Which tensor and which tile of it every program steps: int64, a tensor's number above its tile's."""
    tiles = [triton.cdiv(numel[i], coordinates) for i in members]
    found = [(int(i) << TILE_BITS.value) + np.arange(n, dtype=np.int64) for i, n in zip(members, tiles, strict=True)]
    return torch.from_numpy(np.concatenate(found, dtype=np.int64)).to(device)


def groups_of(tables: c.Tables, arch: str) -> list[tuple[bool, np.ndarray, torch.Tensor]]:
    """Whether masked, which tensors, and their units; made once, from sizes that do not change."""
    if "groups" not in tables.cache:
        numel = [tensors[Slot.PARAM].numel() for tensors in tables.tensors]
        has_mask = tables.slots[:, Slot.MASK].numpy() != 0
        tables.cache["groups"] = [
            (masked, members, units_of(numel, members, settings(masked, arch).blocks * c.BLOCK, tables.device))
            for masked in (False, True)
            if len(members := np.flatnonzero(has_mask == masked))
        ]
    return tables.cache["groups"]


# ---- the backend, with the signature of reference.py ----------------------------------------------------------------


def step(tables: c.Tables, track: bool) -> torch.Tensor | None:
    counts = packing.zeros((len(tables.tensors),), torch.int64, tables.device)
    arch = _launch.arch(tables.device)
    on_device = DeviceTables.of(tables, counts)
    for masked, members, units in groups_of(tables, arch):
        rows = tables.slots.numpy()[members]
        if len(units) == 0 or not rows[:, Slot.NUMEL].any():
            continue
        plan(
            tables.kind, units, on_device, arch, masked=masked,
            cohorts=bool(rows[:, Slot.COHORT].any()),
            tracked=track or bool(rows[:, Slot.CHANGED].any()),
            aligned=not (rows[:, Slot.PARAM : Slot.EXTRA + 1] % 16).any(),
        ).run()  # fmt: skip
    return counts if track else None
