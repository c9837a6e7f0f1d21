"""One test per way in which a masked step can be silently wrong, on the default CPU path."""

from __future__ import annotations

import mmap

import torch

from offprin_kernels import BitMask
from offprin_kernels.optim import MaskedAdamW

from ..optim.models import mask


def untouched(rows: int, columns: int) -> torch.Tensor:
    """bf16 zeros that take no memory before they are written to."""
    return torch.frombuffer(mmap.mmap(-1, 2 * rows * columns), dtype=torch.bfloat16).view(rows, columns)


def test_more_than_two_to_the_31_weights() -> None:
    """int32 offsets would wrap. Pages that no mask bit leads to are never touched, so this needs little memory."""
    rows, columns = (1 << 16) + 3, 1 << 15
    weight = torch.nn.Parameter(untouched(rows, columns))
    weight.grad = untouched(rows, columns)
    chosen = BitMask.zeros(weight.shape)
    places = [(0, 1), (rows // 2, 77), (rows - 4, columns - 1), (rows - 1, columns - 1)]
    for row, column in places:
        chosen.words[row, column // 8] = 1 << (column % 8)
        weight.grad[row, column] = 1.0
    assert weight.numel() > 2**31 and chosen.count() == len(places)
    optimizer = MaskedAdamW([("w", weight)], lr=0.5, masks={"w": chosen}, rounding="stochastic", track_visible=True)
    optimizer.step()
    assert [weight[place].item() for place in places] == [-0.5] * 4
    assert optimizer.visible_count() == 4 and optimizer.visible_mask("w") == chosen
    # neighbours of the places, and where 32-bit offsets would have led
    for row, column in places:
        wrapped = (row * columns + column) % (1 << 31)
        for at in (row * columns + column - 1, wrapped):
            here = (at // columns, at % columns)
            assert here in places or weight[here].item() == 0


def test_no_decay_outside_the_mask() -> None:
    weight = torch.nn.Parameter(torch.ones(1000))
    weight.grad = torch.zeros(1000)
    chosen = mask((1000,), 0.5)
    MaskedAdamW([("w", weight)], lr=0.1, weight_decay=0.5, masks={"w": chosen}).step()
    dense = chosen.to_dense()
    assert bool((weight[~dense] == 1).all()) and torch.allclose(weight[dense], torch.tensor(0.95))


def test_weights_and_gradients_that_are_not_contiguous() -> None:
    """Channels-last kernels and transposed views: masks count coordinates in logical order, not in memory's."""
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(6, 5, 3, 3, generator=generator), torch.randn(6, 5, 3, 3, generator=generator)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.nn.Parameter(start.clone(memory_format=layout))
        optimizer = MaskedAdamW([("w", weight)], masks={"w": mask(start.shape)}, track_visible=True)
        for step in range(3):
            weight.grad = (grad * (step + 1)).contiguous(memory_format=torch.channels_last)
            optimizer.step()
        assert weight.is_contiguous(memory_format=layout)
        results.append((weight.detach(), optimizer.visible_mask("w"), optimizer.state[weight]["exp_avg"]))
    (a, seen_a, moments_a), (b, seen_b, moments_b) = results
    assert torch.equal(a, b) and seen_a == seen_b and torch.equal(moments_a, moments_b)
    assert torch.equal(a != start, mask(start.shape).to_dense())


def test_tied_weights_are_stepped_once() -> None:
    net = torch.nn.ModuleDict({"embed": torch.nn.Embedding(9, 4), "head": torch.nn.Linear(4, 9, bias=False)})
    net["head"].weight = net["embed"].weight
    optimizer = MaskedAdamW(net.named_parameters(), lr=0.1, weight_decay=0.0)
    before = net["embed"].weight.detach().clone()
    net["embed"].weight.grad = torch.ones(9, 4)
    optimizer.step()
    # a first step of AdamW is lr long
    assert torch.allclose(net["head"].weight.detach(), before - 0.1, atol=1e-6) and len(optimizer.entries) == 1


def test_steps_are_counted_per_tensor_not_per_call() -> None:
    """A tensor whose first gradient comes late gets the bias correction of its own first step."""
    early, late = torch.nn.Parameter(torch.zeros(8)), torch.nn.Parameter(torch.zeros(8))
    optimizer = MaskedAdamW([early, late], lr=0.1, weight_decay=0.0)
    for step in range(5):
        early.grad = torch.ones(8)
        late.grad = torch.ones(8) if step == 4 else None
        optimizer.step()
    assert torch.allclose(late, torch.tensor(-0.1)) and torch.allclose(early, torch.tensor(-0.5))
