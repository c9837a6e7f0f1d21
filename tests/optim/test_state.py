"""State that survives saving, loading, other optimizers' formats; and that is refused where it does not belong."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from offprin_kernels.optim import MaskedAdamW, adamw_state, load_adamw_state

from .models import mask, masks_of, model, same_weights, train

ROUNDINGS = ["nearest", "stochastic", "kahan", "master"]


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(rounding, state_dtype) -> None:
    """PyTorch casts loaded state to the parameter's dtype; moments of bf16 parameters must not lose digits by that."""
    net = model(torch.bfloat16)
    options = {"lr": 1e-2, "masks": masks_of(net), "rounding": rounding, "state_dtype": state_dtype}
    optimizer = MaskedAdamW(net.named_parameters(), **options)
    train(net, optimizer, 3)
    optimizer.set_masks({name: mask(p.shape, 0.4, 7) for name, p in net.named_parameters()})
    train(net, optimizer, 2, start=3)
    other = copy.deepcopy(net)
    fresh = MaskedAdamW(other.named_parameters(), **{**options, "lr": 1.0, "masks": optimizer.masks})
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == fresh.state[q].keys() >= {"cohort"}
        for name, value in optimizer.state[p].items():
            assert fresh.state[q][name].dtype == value.dtype and torch.equal(fresh.state[q][name], value)
    for a, b in ((net, optimizer), (other, fresh)):
        train(a, b, 3, start=5)
    assert same_weights(net, other)


def test_loaded_state_is_a_copy() -> None:
    net = model()
    optimizer = MaskedAdamW(net.named_parameters())
    train(net, optimizer, 2)
    saved = optimizer.state_dict()
    moments = saved["state"][0]["exp_avg"].clone()
    other = model()
    fresh = MaskedAdamW(other.named_parameters())
    fresh.load_state_dict(saved)
    train(other, fresh, 2, start=2)
    assert torch.equal(saved["state"][0]["exp_avg"], moments)


def test_state_of_another_optimizer_is_refused_whole() -> None:
    net = model(torch.bfloat16)
    masks = masks_of(net)
    optimizer = MaskedAdamW(net.named_parameters(), masks=masks, rounding="master")
    train(net, optimizer, 2)
    saved = optimizer.state_dict()
    others = {
        name: mask(p.shape, 0.4, 90) if name.startswith("0") else masks[name] for name, p in net.named_parameters()
    }
    refused = [
        (
            {"masks": others, "rounding": "master"},
            r"0\.weight: it was saved with mask [0-9a-f]{16}, .* has [0-9a-f]{16}",
        ),
        ({"masks": masks, "rounding": "kahan"}, "no compensation"),
        ({"masks": masks, "rounding": "nearest"}, "has low_bits"),
        ({"masks": masks, "rounding": "master", "state_dtype": torch.bfloat16}, "state_dtype"),
    ]
    for options, says in refused:
        fresh = MaskedAdamW(net.named_parameters(), lr=0.5, **options)
        with pytest.raises(ValueError, match=says):
            fresh.load_state_dict(saved)
        assert not fresh.state and fresh.param_groups[0]["lr"] == 0.5
    peer = torch.optim.AdamW(net.parameters())
    train(net, peer, 1)
    with pytest.raises(ValueError, match="load_adamw_state"):
        optimizer.load_state_dict(peer.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        MaskedAdamW([{"params": [p]} for p in net.parameters()]).load_state_dict(saved)


def test_accelerate_wraps_it() -> None:
    """Its wrapper moves state through state_dict and load_state_dict when it is made."""
    accelerate = pytest.importorskip("accelerate", reason="a peer that users have and the package does not need")
    net = model(torch.bfloat16)
    optimizer = MaskedAdamW(net.named_parameters(), masks=masks_of(net), rounding="master")
    train(net, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    accelerator = accelerate.Accelerator(cpu=True)
    wrapped_net, wrapped = accelerator.prepare(net, optimizer)
    for index, state in wrapped.state_dict()["state"].items():
        for name, value in state.items():
            assert value.dtype == before[index][name].dtype and torch.equal(value, before[index][name])
    train(wrapped_net, wrapped, 1, start=2)
    assert optimizer.state[net[0].weight]["steps"].tolist() == [3]


def test_to_and_from_a_dense_adamw() -> None:
    net = model()
    masks = masks_of(net)
    optimizer = MaskedAdamW(net.named_parameters(), masks=masks)
    train(net, optimizer, 3)
    other = copy.deepcopy(net)
    peer = torch.optim.AdamW(other.parameters())
    peer.load_state_dict(adamw_state(optimizer))
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        dense = masks[name].to_dense()
        for moments in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(peer.state[q][moments][dense], optimizer.state[p][moments])
            assert not peer.state[q][moments][~dense].any()
        assert int(peer.state[q]["step"]) == 3
    again = copy.deepcopy(net)
    back = MaskedAdamW(again.named_parameters(), masks=masks)
    load_adamw_state(back, peer.state_dict())
    for a, b in ((net, optimizer), (again, back)):
        train(a, b, 3, start=3)
    assert same_weights(net, again)


def test_dense_state_that_does_not_fit() -> None:
    net = model()
    optimizer = MaskedAdamW(net.named_parameters())
    peer = torch.optim.AdamW(net.parameters(), amsgrad=True)
    train(net, peer, 1)
    with pytest.raises(ValueError, match="amsgrad"):
        load_adamw_state(optimizer, peer.state_dict())
    with pytest.raises(ValueError, match="1 parameters"):
        load_adamw_state(optimizer, torch.optim.AdamW([net[0].weight]).state_dict())
    assert not optimizer.state


def test_dense_state_replaces_cohorts() -> None:
    """Loaded into an optimizer whose masks were replaced, it leaves nothing of the cohorts behind."""
    net = model()
    optimizer = MaskedAdamW(net.named_parameters(), masks=masks_of(net))
    train(net, optimizer, 2)
    optimizer.set_masks({name: mask(p.shape, 0.4, 7) for name, p in net.named_parameters()})
    assert "cohort" in optimizer.state[net[0].weight]
    peer = torch.optim.AdamW(copy.deepcopy(net).parameters())
    for p in peer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    peer.step()
    load_adamw_state(optimizer, peer.state_dict())
    state = optimizer.state[net[0].weight]
    assert "cohort" not in state and state["steps"].tolist() == [1]
    train(net, optimizer, 1)


def test_damaged_cohorts_are_refused() -> None:
    """Numbers of cohorts that have no count would lead outside the table of bias corrections."""
    net = model()
    optimizer = MaskedAdamW(net.named_parameters(), masks=masks_of(net))
    train(net, optimizer, 2)
    optimizer.set_masks({name: mask(p.shape, 0.4, 7) for name, p in net.named_parameters()})
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["cohort"][0] = 9
    with pytest.raises(ValueError, match=r"0\.weight: .*damaged"):
        optimizer.load_state_dict(saved)
