"""Interventions on state dicts: the function stays, bits stay, masks come back, and the unknown is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from offprin_kernels import BitMask, intervene, update_mask
from offprin_kernels.intervene.attention import MODEL_TYPES, choose_layers, parse_layers, place, ranges
from offprin_kernels.intervene.record import draw
from offprin_kernels.intervene.transform import rotation, round_once

from .models import FOUR, SHAPES, bits, logits, model, state

PREFIX = "model.layers.1.self_attn."


def difference_and_control(made, record) -> tuple[float, float]:
    """Root mean squares: of the change by the intervention, and of a random change of V and O as large as rounding.

    A permutation changes the order of O's sums of n terms, which costs about sqrt(n) unit roundoffs of fp32.
    """
    stored = torch.finfo(made.dtype).eps / 2
    summed = 2.0**-24 * (record.heads.query * record.heads.size) ** 0.5
    scale = max(summed, stored if record.kind == "rotate" else 0)
    tensors = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.float()
    before = logits(made)
    made.load_state_dict({**tensors, **intervene.apply(tensors, record)})
    after = logits(made)
    controls = []
    for seed in range(4):
        torch.manual_seed(seed)
        moved = {n: t.float() for n, t in tensors.items()}
        for name in moved:
            if "v_proj" in name or "o_proj" in name:
                moved[name] *= 1 + scale * (2 * torch.rand_like(moved[name]) - 1)
        made.load_state_dict(moved)
        controls.append((logits(made) - before).square().mean().item())
    return (after - before).square().mean().item() ** 0.5, (sum(controls) / 4) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "kv"), SHAPES)
@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("action", ["rotate", "permute"])
def test_the_function_stays(action, kind, heads, kv, dtype) -> None:
    made = model(kind, heads, kv, dtype=dtype)
    record = intervene.plan(action, made.state_dict(), made.config.to_dict(), seed=3)
    found, control = difference_and_control(made, record)
    # Both are root mean squares over 3,072 logits of noise of the same size; measured ratios lie between 0.3 and 1.3.
    assert found <= 3 * control


@pytest.mark.parametrize("action", ["rotate", "permute"])
@pytest.mark.parametrize("kind", sorted(set(MODEL_TYPES) - set(FOUR)))
def test_every_supported_type(kind, action) -> None:
    made = model(kind)
    record = intervene.plan(action, made.state_dict(), made.config.to_dict(), seed=3)
    found, control = difference_and_control(made, record)
    assert found <= 3 * control


def test_a_wrong_order_is_seen_by_these_tests() -> None:
    made = model("qwen3")
    record = intervene.plan("permute", made.state_dict(), made.config.to_dict(), seed=3)
    tensors = made.state_dict()
    before = logits(made)
    new = intervene.apply(tensors, record)
    new[PREFIX + "k_proj.weight"] = tensors[PREFIX + "k_proj.weight"]
    _, control = difference_and_control(model("qwen3"), record)
    made.load_state_dict({**tensors, **new})
    assert (logits(made) - before).square().mean().sqrt() > 1000 * control


# ---- bits and inverses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["qwen2", "olmo2"])
def test_permuted_weights_keep_their_bits(kind, dtype) -> None:
    tensors, config = state(kind, 4, 2, dtype=dtype)
    tensors[PREFIX + "q_proj.weight"][0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    record = intervene.plan("permute", tensors, config, seed=1)
    new = intervene.permute(tensors, config, seed=1)
    assert sorted(new) == sorted(name for name in tensors if "self_attn" in name and "o_proj.bias" not in name)
    for name, tensor in new.items():
        assert tensor.dtype == dtype and tensor.shape == tensors[name].shape
        assert not torch.equal(bits(tensor), bits(tensors[name])), name
        width = torch.int32 if dtype == torch.float32 else torch.int16
        values = [t.contiguous().view(width).flatten().sort()[0] for t in (tensor, tensors[name])]
        assert torch.equal(*values)
    back = intervene.undo({**tensors, **new}, record)
    assert sorted(back) == sorted(new)
    for name, tensor in back.items():
        assert torch.equal(bits(tensor), bits(tensors[name]))


def test_heads_move_with_their_groups() -> None:
    """Against plain indexing, head by head."""
    tensors, config = state("qwen2", 8, 2)
    record = intervene.plan("permute", tensors, config, seed=2)
    new, order = intervene.apply(tensors, record), record.orders[1]
    assert order.kv == (1, 0) and sorted(order.query[:4]) == [4, 5, 6, 7]
    for i, old in enumerate(order.query):
        to, start = slice(8 * i, 8 * i + 8), slice(8 * old, 8 * old + 8)
        for rest in ("q_proj.weight", "q_proj.bias"):
            assert torch.equal(new[PREFIX + rest][to], tensors[PREFIX + rest][start])
        assert torch.equal(new[PREFIX + "o_proj.weight"][:, to], tensors[PREFIX + "o_proj.weight"][:, start])
    for j, old in enumerate(order.kv):
        for rest in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
            assert torch.equal(new[PREFIX + rest][8 * j : 8 * j + 8], tensors[PREFIX + rest][8 * old : 8 * old + 8])


def test_rotations_round_once_and_undo_to_rounding() -> None:
    tensors, config = state("llama", 4, 2, dtype=torch.bfloat16)
    record = intervene.plan("rotate", tensors, config, [1], seed=7)
    new = intervene.rotate(tensors, config, [1], seed=7)
    assert sorted(new) == [PREFIX + rest for rest in ("o_proj.weight", "v_proj.bias", "v_proj.weight")]
    turn = rotation(7, 1, 1, 8)
    value, out = tensors[PREFIX + "v_proj.weight"].double(), tensors[PREFIX + "o_proj.weight"].double()
    exact = {PREFIX + "v_proj.weight": (turn @ value[8:], new[PREFIX + "v_proj.weight"][8:])}
    exact[PREFIX + "o_proj.weight"] = (out[:, 24:] @ turn.T, new[PREFIX + "o_proj.weight"][:, 24:])
    for true, stored in exact.values():
        # half a unit in the last place, and fp64's own rounding of sums of eight
        assert bool(((stored.double() - true).abs() <= 2**-8 * (1 + 1e-9) * true.abs()).all())
    back = intervene.undo({**tensors, **new}, record)
    assert sorted(back) == sorted(new)
    for name, tensor in back.items():
        # each of the eight rotated values was rounded by 2^-8 of itself, and the result once more
        bound = 2**-8 * (8**0.5 + 1.01) * tensors[name].double().abs().max() * 8**0.5
        assert (tensor.double() - tensors[name].double()).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding(dtype) -> None:
    """Between every pair of neighbours: the middle goes to the even one, and a hair beside it to the nearer one."""
    last = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16).item()
    codes = torch.arange(last, dtype=torch.int16)
    low, high = codes.view(dtype), (codes + 1).view(dtype)
    middle = (low.double() + high.double()) / 2
    for sign in (1, -1):
        assert torch.equal(round_once(sign * low.double(), dtype), sign * low)
        assert torch.equal(round_once(sign * middle * (1 + 2**-50), dtype), sign * high)
        assert torch.equal(round_once(sign * middle * (1 - 2**-50), dtype), sign * low)
        assert torch.equal(round_once(sign * middle, dtype), sign * torch.where(codes % 2 == 0, low, high))
    largest = torch.finfo(dtype).max
    assert bool(
        round_once(torch.tensor([largest * 1.01, float("nan"), 1e300]).double(), dtype).isfinite().logical_not().all()
    )


def test_rotations_are_orthogonal_and_uniform() -> None:
    turns = torch.stack([rotation(0, layer, head, 4) for layer in range(20) for head in range(40)])
    identity = torch.eye(4, dtype=torch.float64)
    assert (turns @ turns.mT - identity).abs().max() < 1e-14
    assert torch.equal(rotation(0, 3, 1, 4), turns[3 * 40 + 1]) and not torch.equal(rotation(1, 3, 1, 4), turns[121])
    # Haar: the trace has mean 0 and variance 1, and entries variance 1/4; four standard errors of 800 draws
    trace = turns.diagonal(dim1=1, dim2=2).sum(dim=1)
    assert abs(trace.mean()) < 4 / 800**0.5 and abs(trace.square().mean() - 1) < 4 * (2 / 800) ** 0.5
    assert (turns.square().mean(dim=0) - 0.25).abs().max() < 4 * 0.22 / 800**0.5
    assert abs((torch.linalg.det(turns) > 0).double().mean() - 0.5) < 4 * 0.5 / 800**0.5


# ---- masks


@pytest.mark.parametrize(("heads", "kv", "size"), [(4, 2, 8), (8, 2, 16), (4, 1, 6), (8, 4, 10)])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "olmo2"])
def test_masks_map_back(kind, heads, kv, size) -> None:
    """The mask of a permuted update, mapped back, is the mask of the update."""
    base, config = state(kind, heads, kv, size, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tuned = {name: torch.where(torch.rand(t.shape, generator=generator) < 0.3, t * 1.5, t) for name, t in base.items()}
    record = intervene.plan("permute", base, config, [0, 2], seed=4)
    base_new, tuned_new = ({**tensors, **intervene.apply(tensors, record)} for tensors in (base, tuned))
    moved = 0
    for name in base:
        direct, permuted = update_mask(base[name], tuned[name]), update_mask(base_new[name], tuned_new[name])
        moved += direct != permuted
        back = intervene.invert_mask(permuted, name, record)
        assert back == direct and back.shape == base[name].shape
        BitMask(back.words, back.shape)  # padding is zero
    assert moved == len(intervene.apply(base, record))
    with pytest.raises(ValueError, match=r"q_proj\.weight has shape \[3, 5\], which is not made of"):
        intervene.invert_mask(BitMask.zeros((3, 5)), "model.layers.0.self_attn.q_proj.weight", record)


def test_masks_of_rotated_weights_do_not_map_back() -> None:
    tensors, config = state("qwen3")
    record = intervene.plan("rotate", tensors, config, [1])
    for rest in ("v_proj.weight", "o_proj.weight"):
        with pytest.raises(ValueError, match="exponent-conditioned null of the rotated weights"):
            intervene.invert_mask(BitMask.zeros(tensors[PREFIX + rest].shape), PREFIX + rest, record)
    mask = BitMask.zeros(tensors[PREFIX + "q_proj.weight"].shape)
    assert intervene.invert_mask(mask, PREFIX + "q_proj.weight", record) is mask


# ---- the record


@pytest.mark.parametrize("kind", ["rotate", "permute"])
def test_records_are_saved_whole(tmp_path, kind) -> None:
    record = draw(kind, 11, [0, 2], intervene.Heads(8, 2, 16))
    record.save(tmp_path / "intervention.json", {"source": "here"})
    assert (
        intervene.Intervention.load(tmp_path) == record == intervene.Intervention.load(tmp_path / "intervention.json")
    )
    (tmp_path / "intervention.json").write_text((tmp_path / "intervention.json").read_text().replace("-1", "-2", 1))
    with pytest.raises(ValueError, match="is no record of an intervention"):
        intervene.Intervention.load(tmp_path)


def test_records_that_contradict_themselves() -> None:
    record = draw("permute", 0, [0], intervene.Heads(4, 2, 8))
    for order in (intervene.Order((0, 2, 1, 3), (0, 1)), intervene.Order((0, 1, 2, 2), (0, 1)), None):
        with pytest.raises(ValueError, match="no order of its heads that keeps query groups together"):
            dataclasses.replace(record, orders={} if order is None else {0: order})
    with pytest.raises(ValueError, match="no attention has 4 query heads, 3 KV heads"):
        dataclasses.replace(record, heads=intervene.Heads(4, 3, 8))


@pytest.mark.parametrize(("heads", "kv"), [(2, 1), (4, 2), (2, 2), (32, 8), (3, 3)])
def test_orders_always_move_something(heads, kv) -> None:
    record = draw("permute", 0, range(50), intervene.Heads(heads, kv, 4))
    orders = [record.orders[n] for n in range(50)]
    assert all(order.query != tuple(range(heads)) for order in orders)
    assert kv == 1 or all(order.kv != tuple(range(kv)) for order in orders)
    assert (heads, kv) in ((2, 1), (2, 2)) or len(set(orders)) > 1
    assert record == draw("permute", 0, range(50), intervene.Heads(heads, kv, 4))


# ---- refusals


def changed(tensors: dict, rest: str, tensor: torch.Tensor | None) -> dict:
    new = dict(tensors)
    new.pop(PREFIX + rest, None)
    return new if tensor is None else {**new, PREFIX + rest: tensor}


@pytest.mark.parametrize(
    ("rest", "tensor", "words"),
    [
        ("qkv_proj.weight", torch.zeros(64, 32), "attention with qkv_proj.weight is not supported"),
        ("kv_a_proj_with_mqa.weight", torch.zeros(8, 32), "attention with kv_a_proj_with_mqa.weight"),
        ("sinks", torch.zeros(4), "attention with sinks is not supported"),
        ("v_proj.weight_scale_inv", torch.zeros(1, 1), "attention with v_proj.weight_scale_inv"),
        ("q_proj.lora_A.weight", torch.zeros(2, 32), "attention with q_proj.lora_A.weight"),
        ("v_proj.weight", torch.zeros(16, 32).to(torch.float8_e4m3fn), "has dtype F8_E4M3"),
        ("q_proj.weight", torch.zeros(32, 16, dtype=torch.uint8), "has dtype U8"),
        ("q_proj.weight", torch.zeros(64, 32), r"shape \[64, 32\], and the config \(4 query and 2 key/value heads"),
        ("q_norm.weight", torch.zeros(9), r"asks for \[8\] or \[32\]"),
        ("k_proj.weight", None, "layer 1 has no k_proj.weight"),
        ("q_proj.base_layer.weight", torch.zeros(32, 32), "one and the same by name"),
    ],
)
def test_attention_that_is_refused(rest, tensor, words) -> None:
    tensors, config = state("qwen3")
    with pytest.raises(ValueError, match=words):
        intervene.permute(changed(tensors, rest, tensor), config)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"model_type": "gpt_oss"}, "models of type 'gpt_oss' are not supported; supported are gemma2"),
        ({"model_type": None}, "models of type None"),
        ({"num_attention_heads": None}, "the config has no num_attention_heads"),
        ({"hidden_size": None}, "the config has no hidden_size"),
        ({"num_attention_heads": "four"}, "num_attention_heads is 'four'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 3}, "which 3 key/value heads do not divide"),
        ({"head_dim": 16}, r"asks for \[64, 32\]"),
    ],
)
def test_configs_that_are_refused(entries, words) -> None:
    tensors, config = state("qwen3")
    with pytest.raises(ValueError, match=words):
        intervene.rotate(tensors, {**config, **entries})


def test_defaults_of_configs() -> None:
    """No number of KV heads means one for each query head; no head size, hidden over heads."""
    tensors, config = state("llama", 4, 4, 8)
    bare = {key: config[key] for key in ("model_type", "num_attention_heads", "hidden_size")}
    assert intervene.plan("rotate", tensors, bare) == intervene.plan("rotate", tensors, config)


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1.0, True, "1"])
def test_bad_seeds(seed) -> None:
    with pytest.raises(ValueError, match="the seed must be an integer"):
        draw("permute", seed, [0], intervene.Heads(4, 2, 8))


def test_values_that_cannot_be_rotated() -> None:
    tensors, config = state("llama", dtype=torch.float16)
    tensors[PREFIX + "v_proj.weight"][:8, 0] = 60000
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.v_proj.weight has NaN or Inf, or overflows torch.float16"
    ):
        intervene.rotate(tensors, config)
    with pytest.raises(ValueError, match="one query head has nothing to permute"):
        draw("permute", 0, [0], intervene.Heads(1, 1, 8))
    with pytest.raises(ValueError, match="unknown intervention 'reflect'"):
        draw("reflect", 0, [0], intervene.Heads(4, 1, 8))


def test_layers() -> None:
    assert parse_layers("all") is None and parse_layers("3, 5-7") == [3, 5, 6, 7]
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert choose_layers([2, 1, 2], range(3)) == (1, 2)
    with pytest.raises(ValueError, match="no attention layer 3; its 3 are 0-2"):
        choose_layers([1, 3], range(3))
    with pytest.raises(ValueError, match="no layers were asked for"):
        choose_layers([], range(3))
    for text in ("", "a", "3-", "-1", "5-3", "1,,2", "1-99999999"):
        with pytest.raises(ValueError, match="is no layer; write all"):
            parse_layers(text)
    assert (
        place("model.layers.3.self_attn.q_proj.weight")
        == (3, "q_proj", "weight")
        == place("layers.3.self_attn.q_proj.weight")
    )
    assert place("model.layers.3.mlp.up_proj.weight") is None
