"""Moving between dense tensors and compact state: one entry per coordinate in a mask, in flat order.

Masks here are flat and padded, as :mod:`offprin_kernels.ops.masked_adamw` takes them; None is the full mask. Everything
works chunk by chunk, so that nothing of a tensor's size is made at a byte or more per coordinate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch

from ..bitmask import BitMask
from ..ops import mask_algebra
from ..ops.masked_adamw import padded_words
from ..packing import matrix_shape

# Coordinates per chunk; a multiple of every power of two that a mask's layout knows.
CHUNK = 1 << 22


def flat_words(mask: BitMask) -> torch.Tensor:
    """The mask as one packed row, padded to whole blocks: uint8 ``[padded_words(numel)]``."""
    out = torch.zeros(padded_words(mask.numel()), dtype=torch.uint8, device=mask.device)
    if mask.columns % 64 == 0 or mask.rows == 1:
        words = mask.words.flatten()[: len(out)]
        out[: len(words)] = words
        return out
    for begin, end in row_chunks(mask.rows, mask.columns):
        dense = mask_algebra.unpack(mask.words[begin:end], mask.columns)
        packed = mask_algebra.pack(dense.view(1, -1))[0]
        first = begin * mask.columns // 8
        packed = packed[: len(out) - first]
        out[first : first + len(packed)] = packed
    return out


def from_flat(words: torch.Tensor, shape: Sequence[int]) -> BitMask:
    """The inverse of ``flat_words``."""
    rows, columns = matrix_shape(shape)
    mask = BitMask.zeros(shape, words.device)
    if columns % 64 == 0 or rows == 1:
        mask.words.view(-1).copy_(words[: mask.words.numel()])
        return mask
    for begin, end in row_chunks(rows, columns):
        first, count = begin * columns // 8, (end - begin) * columns
        dense = mask_algebra.unpack(words[None, first : first + (count + 63) // 64 * 8].contiguous(), count)
        mask.words[begin:end] = mask_algebra.pack(dense.view(-1, columns))
    return mask


def row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose first bit begins a 64-bit word of the flat mask."""
    step = max(64, CHUNK // max(1, columns) // 64 * 64)
    for begin in range(0, rows, step):
        yield begin, min(rows, begin + step)


def chunks(words: torch.Tensor | None, numel: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """(first coordinate, bool bits) of consecutive parts of a flat mask."""
    for begin in range(0, numel, CHUNK):
        count = min(CHUNK, numel - begin)
        if words is None:
            yield begin, torch.ones(count, dtype=torch.bool, device=device)
        else:
            part = words[None, begin // 8 : (begin + count + 63) // 64 * 8].contiguous()
            yield begin, mask_algebra.unpack(part, count)[0]


def spread(compact: torch.Tensor, words: torch.Tensor | None, numel: int) -> torch.Tensor:
    """Dense ``[numel]`` from compact entries; zeros elsewhere."""
    if words is None:
        return compact.clone()
    dense = compact.new_zeros(numel)
    taken = 0
    for begin, bits in chunks(words, numel, compact.device):
        count = int(bits.sum())
        dense[begin : begin + len(bits)][bits] = compact[taken : taken + count]
        taken += count
    return dense


def spread_bits(packed: torch.Tensor, words: torch.Tensor, numel: int) -> torch.Tensor:
    """Flat padded words with bit i of ``packed`` at the i-th coordinate of the mask."""
    out = torch.zeros(padded_words(numel), dtype=torch.uint8, device=words.device)
    taken = 0
    for begin in range(0, numel, CHUNK):
        end = min(numel, begin + CHUNK)
        part = words[None, begin // 8 : (end + 63) // 64 * 8]
        if not bool(part.any()):
            continue
        bits = mask_algebra.unpack(part.contiguous(), end - begin)[0]
        count, first = int(bits.sum()), taken // 64 * 64
        own = packed[None, first // 8 : (taken + count + 63) // 64 * 8].contiguous()
        dense = torch.zeros_like(bits)
        dense[bits] = mask_algebra.unpack(own, taken + count - first)[0, taken - first :]
        row = mask_algebra.pack(dense[None])[0]
        out[begin // 8 : begin // 8 + len(row)] = row
        taken += count
    return out


def gather(dense: torch.Tensor, words: torch.Tensor | None) -> torch.Tensor:
    """Compact entries of a dense ``[numel]`` tensor."""
    if words is None:
        return dense.clone()
    parts = [dense[begin : begin + len(bits)][bits] for begin, bits in chunks(words, len(dense), dense.device)]
    return torch.cat(parts) if parts else dense.new_empty(0)


def transfer(
    compact: Sequence[torch.Tensor],
    fill: Sequence[float],
    old: torch.Tensor | None,
    new: torch.Tensor | None,
    numel: int,
    count: int,
) -> list[torch.Tensor]:
    """Compact tensors of mask ``old`` for mask ``new`` with ``count`` coordinates: kept entries, else ``fill``."""
    out = [torch.full((count,), value, dtype=t.dtype, device=t.device) for t, value in zip(compact, fill, strict=True)]
    if not compact:
        return out
    device = compact[0].device
    taken = put = 0
    for (_, was), (_, now) in zip(chunks(old, numel, device), chunks(new, numel, device), strict=True):
        leaving, arriving = int(was.sum()), int(now.sum())
        for source, target in zip(compact, out, strict=True):
            target[put : put + arriving][was[now]] = source[taken : taken + leaving][now[was]]
        taken, put = taken + leaving, put + arriving
    return out


def digest(mask: BitMask | None) -> int:
    """63 bits that tell masks apart (SHA-256 of shape and bits); 0 for the full mask."""
    if mask is None:
        return 0
    summary = hashlib.sha256(repr(tuple(mask.shape)).encode())
    summary.update(mask.words.cpu().contiguous().numpy().data)
    return int.from_bytes(summary.digest()[:8], "little") >> 1
