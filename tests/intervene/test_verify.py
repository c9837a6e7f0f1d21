"""The verifier: silent on what is right, loud on one wrong head, one wrong bit, one order of heads mistaken."""

from __future__ import annotations

import pytest
import torch

from offprin_kernels import intervene
from offprin_kernels.intervene import transform
from offprin_kernels.intervene.transform import transformed
from offprin_kernels.intervene.verify import check_layer, check_logits

from .models import FOUR, SHAPES, model, state

PREFIX = "model.layers.1.self_attn."
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def layer_of(tensors: dict) -> dict[str, torch.Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}


def intervened(action: str, kind: str, heads: int, kv: int, dtype: torch.dtype, seed: int = 3):
    """(record, attention of layer 1 before, and after)."""
    tensors, config = state(kind, heads, kv, dtype=dtype)
    record = intervene.plan(action, tensors, config, seed=seed)
    return record, layer_of(tensors), layer_of({**tensors, **intervene.apply(tensors, record)})


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize(("heads", "kv"), SHAPES)
@pytest.mark.parametrize("kind", [*FOUR, "olmo2"])
def test_right_interventions_pass(kind, heads, kv, dtype) -> None:
    record, before, after = intervened("permute", kind, heads, kv, dtype)
    found = check_layer(before, after, record, 1)
    assert found.difference <= 1e-12 and found.rounding == 0
    record, before, after = intervened("rotate", kind, heads, kv, dtype)
    found = check_layer(before, after, record, 1)
    # The prediction takes each rounding for the largest it can be in its binade; the truth is about 0.7 of that.
    assert 0.4 < found.rounding < 1.5
    assert 0.1 * ROUNDING[dtype] < found.difference < 10 * ROUNDING[dtype]


@pytest.mark.parametrize("kind", [*FOUR, "olmo2"])
@pytest.mark.parametrize("action", ["rotate", "permute"])
@pytest.mark.parametrize("module", ["v_proj", "o_proj"])
def test_one_corrupt_head_is_caught(kind, action, module) -> None:
    record, before, after = intervened(action, kind, 8, 2, torch.bfloat16)
    wrong = after[f"{module}.weight"].clone()
    block = wrong[8:] if module == "v_proj" else wrong[:, 24:32]
    block.copy_(block.flip(0))
    with pytest.raises(intervene.VerificationError, match="layer 1: "):
        check_layer(before, {**after, f"{module}.weight": wrong}, record, 1)


@pytest.mark.parametrize("rest", ["q_proj.weight", "k_proj.bias", "q_norm.weight", "o_proj.weight"])
def test_a_tensor_left_behind_is_caught(rest) -> None:
    record, before, after = intervened("permute", "olmo2", 4, 2, torch.float32)
    with pytest.raises(intervene.VerificationError, match=f"{rest} does not have the original's bits"):
        check_layer(before, {**after, rest: before[rest]}, record, 1)


def test_a_rotation_of_another_group_is_caught() -> None:
    """O rotated by the matrices of the wrong KV heads, each of them orthogonal."""
    record, before, after = intervened("rotate", "llama", 4, 2, torch.float32)
    flipped = before["o_proj.weight"].view(-1, 2, 16).flip(1).reshape(before["o_proj.weight"].shape)
    name = PREFIX + "o_proj.weight"
    wrong = transformed(name, flipped, record).view(-1, 2, 16).flip(1).reshape(flipped.shape)
    with pytest.raises(intervene.VerificationError, match="head 0 differs by"):
        check_layer(before, {**after, "o_proj.weight": wrong}, record, 1)


@pytest.mark.parametrize("module", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_an_inconsistent_permutation_is_caught(monkeypatch, module) -> None:
    """The function is compared on its own: that the undo gives back every bit is not enough."""

    right = transform.head_order

    def stays(record, layer, part, inverse=False):
        order = right(record, layer, part, inverse)
        return sorted(order) if part == module else order

    monkeypatch.setattr(transform, "head_order", stays)
    record, before, after = intervened("permute", "qwen3", 8, 2, torch.float32)
    with pytest.raises(intervene.VerificationError, match=r"differs by .* and rounding explains"):
        check_layer(before, after, record, 1)


def test_another_record_is_caught() -> None:
    record, before, after = intervened("permute", "qwen3", 8, 2, torch.float32)
    other = intervene.plan("permute", *state("qwen3", 8, 2), seed=4)
    assert record.orders[1].query != other.orders[1].query
    with pytest.raises(intervene.VerificationError):
        check_layer(before, after, other, 1)


def test_one_bit_and_nan_are_caught() -> None:
    record, before, after = intervened("permute", "qwen3", 4, 2, torch.bfloat16)
    wrong = after["k_proj.weight"].clone()
    wrong.view(torch.int16)[0, 0] ^= 1
    with pytest.raises(intervene.VerificationError, match=r"k_proj.weight does not have the original's bits"):
        check_layer(before, {**after, "k_proj.weight": wrong}, record, 1)
    record, before, after = intervened("rotate", "qwen3", 4, 2, torch.bfloat16)
    wrong = after["o_proj.weight"].clone()
    wrong[0, 0] = float("nan")
    with pytest.raises(intervene.VerificationError, match="differs by nan"):
        check_layer(before, {**after, "o_proj.weight": wrong}, record, 1)


@pytest.mark.parametrize("action", ["rotate", "permute"])
def test_logits(tmp_path, action) -> None:
    made = model("qwen2", dtype=torch.bfloat16)
    made.save_pretrained(tmp_path / "before")
    tensors = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    record = intervene.plan(action, tensors, made.config.to_dict(), seed=5)
    new = intervene.apply(tensors, record)
    made.load_state_dict({**tensors, **new})
    made.save_pretrained(tmp_path / "after")
    found = check_logits(tmp_path / "before", tmp_path / "after", record, 2**-8)
    assert found.rms <= 3 * found.control and found.tokens == 64
    assert found.max_difference >= found.rms > 0 and found.max_relative < (0.2 if action == "rotate" else 1e-4)
    name = PREFIX + "o_proj.weight"
    made.load_state_dict({**tensors, **new, name: tensors[name]})
    made.save_pretrained(tmp_path / "wrong")
    with pytest.raises(intervene.VerificationError, match=r"the logits differ by .* and rounding alone by"):
        check_logits(tmp_path / "before", tmp_path / "wrong", record, 2**-8)
