"""More than 2^31 elements, on devices with the memory for them; under Triton's interpreter the same on a small scale.

Results are known by construction: no second implementation is needed, nor memory for one.
"""

from __future__ import annotations

import pytest
import torch

from offprin_kernels._backend import interpreting
from offprin_kernels.ops import mask_algebra
from offprin_kernels.ops import masked_adamw as step
from offprin_kernels.ops.masked_adamw import Part, Setting, Stepper
from offprin_kernels.ops.masked_adamw.contract import BLOCK
from offprin_kernels.ops.update_scan import Output, Rule, scan

BACKENDS = ("triton", "cuda")
EDGE = 1 << 13 if interpreting() else 1 << 31  # what must be passed
GIB = 1 << 30
BITWISE = (Rule.parse("bitwise"),)
SETTING = Setting(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


@pytest.fixture(autouse=True)
def fenced_outputs():
    """Fences copy outputs of gigabytes; tests/gpu/test_patterns.py has them."""


def needs(device: torch.device, gibibytes: int) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if free < gibibytes * GIB:
            pytest.skip(f"{gibibytes} GiB of device memory are needed, {free / GIB:.0f} are free")


def places(numel: int) -> torch.Tensor:
    """Both ends, both sides of the edge, and a few between."""
    some = [0, 1, EDGE // 2 - 1, EDGE // 2, EDGE - 1, EDGE, EDGE + 1, numel - 2, numel - 1]
    return torch.tensor(sorted({*some, *(numel * i // 7 for i in range(7))}))


def weights(numel: int, device: torch.device) -> torch.Tensor:
    """bf16 bits without NaN or infinity: positive numbers."""
    return torch.randint(0x0080, 0x7F80, (numel,), device=device, dtype=torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("shape", ["one row", "odd rows", "odd columns"])
def test_update_scan(backend, device, shape) -> None:
    needs(device, 16)
    root = 91 if interpreting() else 46_341  # the least whose square passes the edge
    rows, columns = {
        "one row": (1, EDGE + 77), "odd rows": (root * 2 + 1, root // 2 + 2), "odd columns": (7, EDGE // 7 + 11),
    }[shape]  # fmt: skip
    numel = rows * columns
    assert numel > EDGE
    base = weights(numel, device)
    after = base.clone()
    at = places(numel).to(device)
    after.view(torch.int16)[at] ^= 1  # the last bit of a normal number
    got = scan(base.view(rows, columns), after.view(rows, columns), BITWISE, Output.MASK | Output.ROWS, backend=backend)
    assert int(got.rule_counts[0, 0]) == len(at)
    want_rows = torch.bincount(at.cpu() // columns, minlength=rows)
    assert torch.equal(got.row_counts.cpu(), want_rows)
    row, column = at // columns, at % columns
    assert bool(((got.mask[row, column // 8] >> (column % 8).to(torch.uint8)) & 1).all())
    # no other bit of the mask is set
    assert int(mask_algebra.row_counts(got.mask, backend=None).sum()) == len(at)


def test_mask_algebra(backend, device) -> None:
    """More than 2^31 bytes of mask: 2^34 coordinates."""
    if backend == "cuda":
        pytest.skip("mask_algebra has no CUDA C++ kernels")
    needs(device, 8)
    columns = 64 * 13
    rows = EDGE // (columns // 8) + 3
    first = torch.zeros(rows, columns // 8, dtype=torch.uint8, device=device)
    second = torch.full_like(first, 0xFF)
    at = places(first.numel()).to(device)
    first.view(-1)[at] = 0b1010_0001
    counts = mask_algebra.pair_counts([first, second], backend=backend).tolist()
    total = rows * columns
    assert counts == [[3 * len(at), 3 * len(at)], [3 * len(at), total]]
    assert mask_algebra.agreement([first, second], columns, backend=backend).tolist() == [
        0, total - 3 * len(at), 3 * len(at),
    ]  # fmt: skip
    row = mask_algebra.row_counts(first, backend=backend).cpu()
    assert torch.equal(row, 3 * torch.bincount(at.cpu() // (columns // 8), minlength=rows))
    column = mask_algebra.col_counts(first, columns, backend=backend).cpu().view(-1, 8)
    found = torch.bincount(at.cpu() % (columns // 8), minlength=columns // 8)
    assert torch.equal(column, found[:, None] * torch.tensor([1, 0, 0, 0, 0, 1, 0, 1]))


def flat_mask(numel: int, at: torch.Tensor) -> torch.Tensor:
    words = torch.zeros(step.padded_words(numel), dtype=torch.uint8, device=at.device)
    # places in one byte would overwrite each other
    for place in at.tolist():
        words[place // 8] |= 1 << (place % 8)
    return words


def sample(part: Part, at: torch.Tensor) -> Part:
    """The coordinates at these places as a part of their own."""
    return Part(part.param[at].cpu(), torch.zeros(len(at)), torch.zeros(len(at)))


def test_masked_adamw_with_a_mask(backend, device) -> None:
    if backend == "cuda":
        pytest.skip("masked_adamw has no CUDA C++ kernels")
    needs(device, 16)
    numel = EDGE + BLOCK + 5
    at = places(numel).to(device)
    param, grad = weights(numel, device), weights(numel, device)
    before = param.clone()
    words = flat_mask(numel, at)
    state = [torch.zeros(len(at), device=device) for _ in range(2)]
    part = Part(param, *state, words=words, prefix=step.block_prefix(words))
    small = sample(part, at)
    Stepper([part], "nearest", backend).step([grad], [SETTING], [(1,)])
    Stepper([small], "nearest", "reference").step([grad[at].cpu()], [SETTING], [(1,)])
    assert torch.equal(param[at].cpu(), small.param)
    assert torch.equal(part.exp_avg.cpu(), small.exp_avg) and torch.equal(part.exp_avg_sq.cpu(), small.exp_avg_sq)
    param[at] = before[at]
    assert torch.equal(param.view(torch.int16), before.view(torch.int16)), "something outside the mask has moved"


def test_masked_adamw_of_everything(backend, device) -> None:
    if backend == "cuda":
        pytest.skip("masked_adamw has no CUDA C++ kernels")
    needs(device, 30)
    numel = EDGE + BLOCK + 5
    at = places(numel).to(device)
    param, grad = weights(numel, device), weights(numel, device)
    part = Part(param, *(torch.zeros(numel, device=device) for _ in range(2)))
    small = sample(part, at)
    Stepper([part], "nearest", backend).step([grad], [SETTING], [(1,)])
    Stepper([small], "nearest", "reference").step([grad[at].cpu()], [SETTING], [(1,)])
    assert torch.equal(param[at].cpu(), small.param)
    assert torch.equal(part.exp_avg[at].cpu(), small.exp_avg)
    # the first moments of positive gradients: none was left out
    assert bool((part.exp_avg > 0).all())
