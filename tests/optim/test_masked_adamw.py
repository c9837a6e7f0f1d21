"""MaskedAdamW as an optimizer: PyTorch's values, hooks and habits, and what masks add to them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from offprin_kernels import BitMask, numerics
from offprin_kernels.optim import MaskedAdamW, master_weight

from .models import gradients, mask, masks_of, model, same_weights, train

ROUNDINGS = ["nearest", "stochastic", "kahan", "master"]


def pair(**options):
    """The same model twice, with PyTorch's optimizer and with ours."""
    theirs, ours = model(), model()
    own = {key: value for key, value in options.items() if key != "fused"}
    return (theirs, torch.optim.AdamW(theirs.parameters(), **options)), (
        ours,
        MaskedAdamW(ours.named_parameters(), **own),
    )


def close(a: torch.nn.Module, b: torch.nn.Module, steps: int) -> None:
    """A rounding more or less per step: PyTorch fuses multiply-adds in some of its loops and not in others."""
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        bound = 2 * steps * torch.finfo(torch.float32).eps * y.detach().abs().clamp_min(1e-2)
        assert bool(((x - y).detach().abs() <= bound).all())


# ---- PyTorch's values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": torch.tensor(3e-3)},
        {"weight_decay": 0.3, "maximize": True},
        {"betas": (0.5, 0.9), "eps": 1e-3},
        {"betas": (0.0, 0.0), "lr": 1e-4},
    ],
)
def test_full_masks_give_pytorchs_values(options) -> None:
    (theirs, peer), (ours, tested) = pair(**options)
    train(theirs, peer, 30)
    train(ours, tested, 30)
    close(ours, theirs, 30)


def test_a_mask_of_everything_is_no_mask() -> None:
    nets = [model(), model()]
    for net, masks in zip(nets, (None, {n: BitMask.ones(p.shape) for n, p in model().named_parameters()}), strict=True):
        train(net, MaskedAdamW(net.named_parameters(), masks=masks), 5)
    assert same_weights(*nets)


def test_groups_schedulers_and_closures() -> None:
    (theirs, _), (ours, _) = pair()
    steps = []
    for net, kind in ((theirs, torch.optim.AdamW), (ours, MaskedAdamW)):
        groups = [
            {"params": list(net[0].parameters()), "lr": 1e-2, "betas": (0.8, 0.99)},
            {"params": list(net[2].parameters()), "weight_decay": 0.0},
        ]
        optimizer = kind(groups, lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 1e-3], total_steps=12)
        x = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))

        def closure(net=net, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = (net(x) ** 2).mean()
            loss.backward()
            return loss

        losses = []
        for _ in range(10):
            losses.append(optimizer.step(closure).item())
            schedule.step()
        steps.append(losses)
    assert steps[0] == pytest.approx(steps[1], rel=1e-5) and steps[0][-1] < steps[0][0]
    close(ours, theirs, 100)


def test_nonfinite_gradients_do_what_pytorchs_do() -> None:
    (theirs, peer), (ours, tested) = pair()
    for net, optimizer in ((theirs, peer), (ours, tested)):
        train(net, optimizer, 2)
        gradients(net, 2)
        net[0].weight.grad[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
        optimizer.step()
    for x, y in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(x.isnan(), y.isnan())
    assert int(ours[0].weight.isnan().sum()) == 3


def test_parameters_without_gradient_are_left_alone() -> None:
    net = model()
    before = copy.deepcopy(net)
    optimizer = MaskedAdamW(net.named_parameters())
    for step in range(4):
        gradients(net, step)
        if step % 2:
            net[0].weight.grad = None
        net[2].bias.grad = None
        optimizer.step()
    assert torch.equal(net[2].bias, before[2].bias) and net[2].bias not in optimizer.state
    assert optimizer.state[net[0].weight]["steps"].tolist() == [2]
    assert optimizer.state[net[0].bias]["steps"].tolist() == [4]


def test_grad_scaler_hands_over_scale_and_overflow() -> None:
    (theirs, peer), (ours, tested) = pair(fused=True)
    for net, optimizer in ((theirs, peer), (ours, tested)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step in range(6):
            gradients(net, step)
            for p in net.parameters():
                p.grad.mul_(scaler.get_scale() if step or net is ours else 1024.0)
            if step == 3:
                net[0].weight.grad[0, 0] = float("inf")
            # the scaler learns its device from the first loss that it scales
            scaler.scale(torch.ones(()))
            kept = [p.grad.clone() for p in net.parameters()]
            scaler.step(optimizer)
            if net is ours:
                assert all(torch.equal(p.grad, k) for p, k in zip(net.parameters(), kept, strict=True))
            scaler.update()
        assert scaler.get_scale() != 1024.0
    assert tested.state[ours[0].weight]["steps"].tolist() == [5]
    close(ours, theirs, 6)


# ---- PyTorch's habits -----------------------------------------------------------------------------------------------


def test_hooks_run_and_gradients_stay() -> None:
    net = model()
    optimizer = MaskedAdamW(net.named_parameters(), masks=masks_of(net))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    gradients(net, 0)
    kept = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    assert seen == ["pre", "post"]
    assert all(torch.equal(p.grad, k) for p, k in zip(net.parameters(), kept, strict=True))


def test_version_counters_are_bumped() -> None:
    """Else a backward pass through a graph built before the step would silently use the new weights."""
    net = model()
    optimizer = MaskedAdamW(net.named_parameters())
    loss = net(torch.randn(4, 30, requires_grad=True)).square().sum()
    gradients(net, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_zero_gradients_at_zero_lr_change_nothing_but_create_state() -> None:
    """Checkpointing frameworks step once like this, before they load state."""
    net = model(torch.bfloat16)
    optimizer = MaskedAdamW(net.named_parameters(), masks=masks_of(net), rounding="kahan", lr=torch.tensor(1e-2))
    for trained in (False, True):
        if trained:
            train(net, optimizer, 3)
        before = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))
        rates = [group["lr"] for group in optimizer.param_groups]
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.0)
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        assert all(torch.equal(value, before[0][name]) for name, value in net.state_dict().items())
        now = optimizer.state_dict()["state"]
        assert len(now) == 4
        for index, state in before[1].items():
            assert all(torch.equal(now[index][name], value) for name, value in state.items())


def test_copies_and_pickles_go_on_alike() -> None:
    net = model(torch.bfloat16)
    optimizer = MaskedAdamW(net.named_parameters(), masks=masks_of(net), rounding="stochastic", seed=3)
    train(net, optimizer, 3)
    others = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    for a, b in [(net, optimizer), *others]:
        train(a, b, 3, start=3)
    assert all(same_weights(net, other) for other, _ in others)


def test_groups_can_be_added() -> None:
    net = model()
    optimizer = MaskedAdamW([("0.weight", net[0].weight)], masks={"0.weight": mask((50, 30))})
    train(net, optimizer, 2)
    moments = optimizer.state[net[0].weight]["exp_avg"].clone()
    optimizer.add_param_group({"params": [("2.weight", net[2].weight)], "lr": 1e-1})
    assert torch.equal(optimizer.state[net[0].weight]["exp_avg"], moments)
    before = net[2].weight.detach().clone()
    train(net, optimizer, 1, start=2)
    assert bool((net[2].weight != before).all())
    assert optimizer.state[net[0].weight]["steps"].tolist() == [3]


def test_parameters_that_move_to_other_memory_are_followed() -> None:
    """As by `model.to(...)`, which replaces the storage under the optimizer."""
    nets = [model(), model()]
    for net in nets:
        optimizer = MaskedAdamW(net.named_parameters(), masks=masks_of(net))
        train(net, optimizer, 2)
        if net is nets[1]:
            for p in net.parameters():
                p.data = p.data.clone()
        train(net, optimizer, 2, start=2)
    assert same_weights(*nets)


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_only_masked_weights_move_and_as_without_a_mask(dtype, rounding) -> None:
    net, whole = model(dtype), model(dtype)
    before = copy.deepcopy(net)
    masks = masks_of(net)
    optimizer = MaskedAdamW(net.named_parameters(), lr=1e-2, masks=masks, rounding=rounding)
    train(net, optimizer, 5)
    train(whole, MaskedAdamW(whole.named_parameters(), lr=1e-2, rounding=rounding), 5)
    for (name, p), q, old in zip(net.named_parameters(), whole.parameters(), before.parameters(), strict=True):
        dense = masks[name].to_dense()
        assert torch.equal(p[~dense], old[~dense]) and torch.equal(p[dense], q[dense])
        assert len(optimizer.state[p]["exp_avg"]) == masks[name].count()


def test_masks_by_name_parameter_function_and_file(tmp_path) -> None:
    masks = masks_of(model())
    BitMask.save(masks, tmp_path / "masks.safetensors")
    results = []
    for form in ("name", "parameter", "function", "file", "path"):
        net = model()
        given = {
            "name": masks,
            "parameter": {p: masks[name] for name, p in net.named_parameters()},
            "function": lambda name, p: masks[name],
            "file": str(tmp_path / "masks.safetensors"),
            "path": tmp_path / "masks.safetensors",
        }[form]
        params = net.parameters() if form == "parameter" else net.named_parameters()
        train(net, MaskedAdamW(params, masks=given), 2)
        results.append(net)
    assert all(same_weights(results[0], other) for other in results[1:])


def test_an_empty_mask_freezes_and_empty_parameters_are_stepped() -> None:
    net = model()
    net.register_parameter("none", torch.nn.Parameter(torch.zeros(0, 5)))
    before = copy.deepcopy(net)
    optimizer = MaskedAdamW(
        net.named_parameters(), masks={"0.weight": BitMask.zeros((50, 30)), "none": BitMask.zeros((0, 5))}
    )
    train(net, optimizer, 2)
    assert torch.equal(net[0].weight, before[0].weight) and not torch.equal(net[2].weight, before[2].weight)
    assert optimizer.state[net[0].weight]["exp_avg"].numel() == 0


def test_state_is_as_small_as_the_mask() -> None:
    weight = torch.nn.Parameter(torch.zeros(512, 1024))
    optimizer = MaskedAdamW([weight], masks={weight: mask(weight.shape, 0.05)})
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    entry = optimizer.entries[weight]
    held = [*optimizer.state[weight].values(), entry.words, entry.prefix]
    assert sum(t.numel() * t.element_size() for t in held) <= 0.65 * weight.numel()


def test_replaced_masks_keep_what_stays_and_start_what_arrives() -> None:
    """Coordinates that stay go on as if nothing had happened; those that arrive, as in a fresh optimizer."""
    net, kept, fresh = model(), model(), model()
    first, second = masks_of(net), {n: mask(p.shape, 0.4, 50 + i) for i, (n, p) in enumerate(net.named_parameters())}
    optimizer, whole = (
        MaskedAdamW(net.named_parameters(), masks=first),
        MaskedAdamW(kept.named_parameters(), masks=first),
    )
    for a, b in ((net, optimizer), (kept, whole)):
        train(a, b, 4)
    with torch.no_grad():
        for p, q in zip(fresh.parameters(), net.parameters(), strict=True):
            p.copy_(q)
    optimizer.set_masks(second)
    train(net, optimizer, 3, start=4)
    train(kept, whole, 3, start=4)
    train(fresh, MaskedAdamW(fresh.named_parameters(), masks=second), 3, start=4)
    for (name, p), q, r in zip(net.named_parameters(), kept.parameters(), fresh.parameters(), strict=True):
        stay, arrive = first[name] & second[name], second[name] - first[name]
        assert torch.equal(p[stay.to_dense()], q[stay.to_dense()])
        assert torch.equal(p[arrive.to_dense()], r[arrive.to_dense()])
        state = optimizer.state[p]
        if arrive.count():
            assert state["steps"].tolist() == [7, 3]
            assert torch.bincount(state["cohort"].int()).tolist() == [stay.count(), arrive.count()]
        else:
            assert "cohort" not in state


def test_many_replacements_merge_the_oldest_cohorts() -> None:
    weight = torch.nn.Parameter(torch.zeros(2000))
    optimizer = MaskedAdamW([weight], masks={weight: mask((2000,), 0.5, 0)})
    for turn in range(300):
        weight.grad = torch.ones(2000)
        optimizer.step()
        optimizer.set_masks({weight: mask((2000,), 0.98, turn)})
    state = optimizer.state[weight]
    assert len(state["steps"]) <= 256 and int(state["cohort"].max()) == len(state["steps"]) - 1
    assert int(state["steps"].max()) == 300 and int(state["steps"].min()) == 0


# ---- masters --------------------------------------------------------------------------------------------------------


def test_masters_follow_fp32_training_bit_for_bit() -> None:
    """The bf16 weight and its low bits are the weight that fp32 AdamW would have, every step."""
    net, exact = model(torch.bfloat16), model(torch.bfloat16).float()
    optimizer = MaskedAdamW(net.named_parameters(), lr=1e-2, rounding="master")
    peer = MaskedAdamW(exact.named_parameters(), lr=1e-2)
    ties = 0
    for step in range(60):
        gradients(net, step)
        for p, q in zip(net.parameters(), exact.parameters(), strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        peer.step()
        for (name, p), q in zip(net.named_parameters(), exact.parameters(), strict=True):
            assert torch.equal(master_weight(optimizer, name), q)
            even = numerics.codes_to_fp32(numerics.round_to_bf16_codes(q.detach()))
            differ = p.detach().float() != even
            ties += int(differ.sum())
            # the stored weight differs from a cast to nearest even at exact ties only
            assert bool(((numerics.fp32_bits(q.detach()) & 0xFFFF) == 0x8000)[differ].all())
    assert ties < 100


# ---- visible changes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_visible_changes_are_those_of_a_comparison(dtype, rounding, masked) -> None:
    net = model(dtype)
    masks = masks_of(net) if masked else None
    optimizer = MaskedAdamW(net.named_parameters(), lr=1e-3, masks=masks, rounding=rounding, track_visible=True)
    total = sum(p.numel() for p in net.parameters())
    union = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in net.named_parameters()}
    for step in range(4):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        train(net, optimizer, 1, start=step)
        changed = {name: p.detach().bfloat16() != before[name].bfloat16() for name, p in net.named_parameters()}
        assert optimizer.visible_count() == sum(int(c.sum()) for c in changed.values())
        for name, now in changed.items():
            union[name] |= now
            assert optimizer.visible_mask(name) == BitMask.from_dense(union[name])
        assert optimizer.visible_fraction() == sum(int(u.sum()) for u in union.values()) / total
        if step == 1:
            optimizer.reset_visible()
            union = {name: torch.zeros_like(u) for name, u in union.items()}
        if step == 2 and masked:
            # what has been seen outlives the mask
            optimizer.set_masks({name: mask(p.shape, 0.2, 9) for name, p in net.named_parameters()})


def test_a_step_that_changes_nothing_has_no_visible_changes() -> None:
    net = model(torch.bfloat16)
    optimizer = MaskedAdamW(net.named_parameters(), lr=1e-2, track_visible=True)
    train(net, optimizer, 1)
    assert optimizer.visible_count() > 0
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.visible_count() == 0


def test_untracked_visible_changes_are_not_told() -> None:
    optimizer = MaskedAdamW(model().named_parameters())
    for ask in (optimizer.visible_count, optimizer.visible_fraction, optimizer.reset_visible):
        with pytest.raises(RuntimeError, match="track_visible=True"):
            ask()
    with pytest.raises(KeyError, match="named_parameters"):
        MaskedAdamW(model().parameters(), track_visible=True).visible_mask("0.weight")


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["amsgrad", "capturable", "differentiable"])
def test_unsupported_options_are_refused_by_name(option) -> None:
    with pytest.raises(ValueError, match=option):
        MaskedAdamW(model().parameters(), **{option: True})
    with pytest.raises(ValueError, match=option):
        MaskedAdamW([{"params": list(model().parameters()), option: True}])
    MaskedAdamW(model().parameters(), foreach=True, fused=True)


def test_a_refused_group_is_not_added() -> None:
    net = model()
    optimizer = MaskedAdamW([("0.weight", net[0].weight)])
    for group, error in (({"params": [("h", torch.zeros(3).half())]}, TypeError),
                         ({"params": [("2.weight", net[2].weight)], "lr": -1.0}, ValueError)):  # fmt: skip
        with pytest.raises(error):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    train(net, optimizer, 1)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": torch.ones(2)}, ValueError, "one element"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\]"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\]"),
        ({"eps": -1e-8}, ValueError, "eps"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay"),
        ({"rounding": "up"}, ValueError, "nearest, stochastic, kahan or master"),
        ({"state_dtype": torch.float16}, TypeError, "state_dtype"),
    ],
)
def test_options_out_of_range(options, error, says) -> None:
    with pytest.raises(error, match=says):
        MaskedAdamW(model().parameters(), **options)


def test_masks_that_do_not_fit_are_listed_at_once() -> None:
    net = model()
    wrong = {
        "0.weight": mask((50, 31)),
        "2.weight": mask((7, 50)),
        "nobody": mask((3, 3)),
        "2.bias": torch.ones(7).bool(),
    }
    with pytest.raises(ValueError, match="masks do not fit") as caught:
        MaskedAdamW(net.named_parameters(), masks=wrong)
    text = str(caught.value)
    assert (
        all(word in text for word in ("0.weight", "(50, 31)", "nobody", "2.bias", "BitMask")) and "2.weight" not in text
    )
    with pytest.raises(ValueError, match="named_parameters"):
        MaskedAdamW(net.parameters(), masks={"0.weight": mask((50, 30))})
    # a failed replacement changes nothing
    optimizer = MaskedAdamW(net.named_parameters(), masks=masks_of(net))
    train(net, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match="nobody"):
        optimizer.set_masks(wrong)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[index][name]) for name, value in state.items())


def test_parameters_and_gradients_of_other_kinds() -> None:
    for dtype in (torch.float16, torch.float64, torch.int32, torch.complex64):
        with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
            MaskedAdamW([torch.zeros(3, dtype=dtype)])
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = MaskedAdamW(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of weight.*sparse"):
        optimizer.step()
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = MaskedAdamW([("w", weight)])
    if hasattr(weight, "grad_dtype"):  # older versions of PyTorch refuse such gradients themselves
        weight.grad_dtype = None
        weight.grad = torch.ones(3, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"w is \(3,\) torch.float32 .*bfloat16"):
            optimizer.step()
        assert not weight.any() and optimizer.state[weight]["steps"].tolist() == [0]


def test_a_compiled_step_is_the_same_step() -> None:
    """torch.compile leaves the step alone: tables of pointers and counts must not become constants of a graph."""
    weights = []
    for compiled in (False, True):
        net = model()
        optimizer = MaskedAdamW(net.named_parameters(), masks=masks_of(net))
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for turn in range(3):
            gradients(net, turn)
            step()
        weights.append(net)
    assert same_weights(*weights)
