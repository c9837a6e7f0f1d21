"""Every bf16 pattern at every kind of odd size, on a device; under Triton's interpreter, some of the sizes.

Outputs are poisoned and fenced by tests/conftest.py. What the reference gives on the CPU is what must come out.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from offprin_kernels._backend import interpreting
from offprin_kernels.ops import mask_algebra
from offprin_kernels.ops.masked_adamw import Stepper
from offprin_kernels.ops.update_scan import Output, Rule, scan

from ..ops.test_masked_adamw import KINDS, SETTING, bits, make, moved, same_bits, values
from ..ops.test_update_scan import assert_same, supported
from ..ops.weights import from_codes

BACKENDS = ("triton", "cuda")
PATTERNS = 1 << 16
# around the vectors of 8, the words of 64, and blocks; 65,537 has a row for the rest of the patterns
COLUMNS = (127, 65_537) if interpreting() else (7, 9, 63, 65, 127, 255, 257, 1023, 1025, 4095, 4097, 65_535, 65_537)
RULES = tuple(Rule.parse(*rule) for rule in (("bitwise",), ("ulp", 1), ("eta",), ("atol", 1e-5), ("storage",)))
OUTPUTS = (Output.MASK, Output.MASK | Output.ROWS, Output.all())
SIZES = (1025,) if interpreting() else (1023, 1025, 4097, 65_535, 65_537)


def cycled(rows: int, columns: int, start: int = 0) -> torch.Tensor:
    """Every pattern at least once, in order of their codes."""
    return from_codes((torch.arange(rows * columns) + start) % PATTERNS).view(rows, columns)


def shuffled(rows: int, columns: int, seed: int) -> torch.Tensor:
    flat = cycled(rows, columns).flatten()
    return flat[torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(seed))].view(rows, columns)


@pytest.mark.parametrize("columns", COLUMNS)
def test_update_scan(backend, device, columns) -> None:
    rows = -(-PATTERNS // columns)
    base = cycled(rows, columns)
    partners = [shuffled(rows, columns, columns)]
    if not interpreting():
        # the next code, the one before, and the other sign
        partners += [cycled(rows, columns, 1), cycled(rows, columns, -1), cycled(rows, columns, 1 << 15)]
    for after, wanted in itertools.product(partners, OUTPUTS if not interpreting() else OUTPUTS[-1:]):
        outputs = supported(backend, wanted)
        got = scan(base.to(device), after.to(device), RULES, outputs, backend=backend)
        assert_same(got, scan(base, after, RULES, outputs, backend="reference"), base.numel())


@pytest.mark.parametrize("shift", [1, 3])
def test_update_scan_off_alignment(backend, device, shift) -> None:
    """Storage that begins at no multiple of 16 bytes, on either side or on both."""
    rows, columns = (8, 1025) if interpreting() else (64, 1025)
    base, after = cycled(rows, columns), shuffled(rows, columns, 1)
    for moved_base, moved_after in ((shift, 0), (0, shift), (shift, shift + 1)):
        sides = []
        for tensor, by in ((base, moved_base), (after, moved_after)):
            room = torch.zeros(tensor.numel() + by, dtype=torch.bfloat16, device=device)
            sides.append(room[by:].view(rows, columns).copy_(tensor))
        outputs = supported(backend, Output.all())
        got = scan(*sides, RULES, outputs, backend=backend)
        assert_same(got, scan(base, after, RULES, outputs, backend="reference"), base.numel())


@pytest.mark.parametrize("columns", [64, 16 * 64] if interpreting() else [64, 3 * 64, 16 * 64, 1025 * 64])
def test_masks_of_every_16_bits(backend, device, columns) -> None:
    """All patterns that two bytes of a mask can hold, at every place of a word."""
    if backend == "cuda":
        pytest.skip("mask_algebra has no CUDA C++ kernels")
    words = torch.arange(PATTERNS, dtype=torch.int32).to(torch.int16)
    words = torch.cat([words.roll(place) for place in range(4)]).view(torch.uint8)
    if interpreting():
        words = words[: PATTERNS // 4]
    rows = words.numel() // (columns // 8)
    one = words[: rows * columns // 8].view(rows, columns // 8)
    masks = [one, one.flip(0).contiguous(), one ^ 0xFF]
    there = [mask.to(device) for mask in masks]
    assert torch.equal(mask_algebra.unpack(there[0], columns, backend=backend).cpu(),
                       mask_algebra.unpack(one, columns, backend="reference"))  # fmt: skip
    dense = mask_algebra.unpack(there[0], columns, backend=backend)
    assert torch.equal(mask_algebra.pack(dense, backend=backend).cpu(), one)
    for call in (
        lambda given, chosen: mask_algebra.pair_counts(given, backend=chosen),
        lambda given, chosen: mask_algebra.agreement(given, columns, backend=chosen),
        lambda given, chosen: mask_algebra.row_counts(given[0], backend=chosen),
        lambda given, chosen: mask_algebra.col_counts(given[0], columns, backend=chosen),
    ):
        assert torch.equal(call(there, backend).cpu(), call(masks, "reference"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(part).removeprefix("torch.") for part in kind))
@pytest.mark.parametrize("density", [None, 0.3])
def test_masked_adamw(backend, device, kind, density) -> None:
    """Weights and gradients of every pattern; the same bits in everything after three steps."""
    if backend == "cuda":
        pytest.skip("masked_adamw has no CUDA C++ kernels")
    dtype = kind[0]
    for index, size in enumerate(SIZES):
        part = make(size, kind, bits(size, density, index), seed=index)
        grads = [values(size, 1), values(size, 2)]
        if dtype == torch.bfloat16:
            part.param = cycled(1, size).flatten().clone()
            grads = [shuffled(1, size, 3).flatten(), cycled(1, size, 1 << 15).flatten()]
        grads = [grad.to(dtype) for grad in grads]
        ours, theirs = moved(part, device), moved(part, torch.device("cpu"))
        tested, oracle = Stepper([ours], kind[2], backend), Stepper([theirs], kind[2], "reference")
        for turn, grad in enumerate(grads, 1):
            found = tested.step([grad.to(device)], [SETTING], [(turn,)], seed=3, track=True)
            expected = oracle.step([grad], [SETTING], [(turn,)], seed=3, track=True)
            assert [counts.tolist() for _, counts in found] == [counts.tolist() for _, counts in expected]
            for name, value in vars(ours).items():
                if isinstance(value, torch.Tensor):
                    same_bits(value, getattr(theirs, name), f"{name} of {size} after step {turn}")
