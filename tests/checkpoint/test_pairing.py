"""Pairing by name: every tensor of both sides is accounted for, and nothing is guessed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offprin_kernels.checkpoint import Checkpoint, pair

from .files import bf16, checked, pair_of, raw, reason, save, save_sharded, status

Q = "model.layers.0.self_attn.q_proj.weight"
N = "model.norm.weight"


def test_equal_names(tmp_path: Path) -> None:
    pairing = pair_of(tmp_path, {Q: bf16(4, 8), N: bf16(8)}, {Q: bf16(4, 8, seed=1), N: bf16(8)})
    assert pairing.complete
    assert pairing.counts() == {"base": {"compared": 2}, "tuned": {"compared": 2}}
    shapes = {found.name: (found.base.rows, found.base.columns, found.status.value) for found in pairing.pairs}
    assert shapes == {Q: (4, 8, "compared"), N: (1, 8, "compared")}


def test_pairs_come_in_the_order_of_the_base_on_disk(tmp_path: Path) -> None:
    names = [f"w{number}" for number in (3, 1, 2, 0)]
    one = save_sharded(tmp_path / "a", [{names[0]: bf16(2, 2), names[1]: bf16(2, 2)}, {names[2]: bf16(2, 2)}])
    two = save(tmp_path / "b", {name: bf16(2, 2) for name in sorted(names)})
    base, tuned = Checkpoint.open(one), Checkpoint.open(two)
    places = [(base.tensors[p.name].file, base.tensors[p.name].offset) for p in checked(base, tuned).pairs]
    assert places == sorted(places) and len(places) == 3


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "base_model.model.{}",
        "_fsdp_wrapped_module.{}",
        "model.{}",
        "module.base_model.model.model.model.{}",
    ],
)
def test_wrapper_prefixes(tmp_path: Path, wrapped: str) -> None:
    tensors = {Q: bf16(4, 8), N: bf16(8), "lm_head.weight": bf16(3, 8)}
    pairing = pair_of(tmp_path, tensors, {wrapped.format(name): tensor for name, tensor in tensors.items()})
    assert pairing.complete and {found.name for found in pairing.pairs} == set(tensors)
    assert all(found.note == "names equal once wrapper prefixes are set aside" for found in pairing.pairs)
    swapped = checked(Checkpoint.open(tmp_path / "tuned"), Checkpoint.open(tmp_path / "base"))
    assert swapped.complete and len(swapped.pairs) == 3


def test_inner_model_and_inner_wrappers(tmp_path: Path) -> None:
    inner = Q.removeprefix("model.").replace("layers.0.", "layers.0._checkpoint_wrapped_module.")
    pairing = pair_of(tmp_path, {Q: bf16(4, 8)}, {inner: bf16(4, 8)})
    assert pairing.complete and pairing.pairs[0].tuned.name == inner


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    pairing = pair_of(tmp_path, {"a.w": bf16(2, 2)}, {"module.a.w": bf16(2, 2), "_orig_mod.a.w": bf16(2, 2, seed=1)})
    assert not pairing.pairs and not pairing.complete
    assert pairing.counts() == {"base": {"refused": 1}, "tuned": {"refused": 2}}
    for name in ("module.a.w", "_orig_mod.a.w"):
        assert "base a.w, " in reason(pairing, "tuned", name) and "tuned _orig_mod.a.w" in reason(
            pairing, "tuned", name
        )


def test_an_exact_name_goes_before_a_stripped_one(tmp_path: Path) -> None:
    pairing = pair_of(tmp_path, {"a.w": bf16(2, 2)}, {"a.w": bf16(2, 2), "module.a.w": bf16(2, 2)})
    assert status(pairing, "base", "a.w") == "compared" and status(pairing, "tuned", "a.w") == "compared"
    assert status(pairing, "tuned", "module.a.w") == "unmatched"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_float_dtypes_are_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    pairing = pair_of(tmp_path, {"w": bf16(3, 5)}, {"w": bf16(3, 5).to(dtype)})
    assert status(pairing, "base", "w") == status(pairing, "tuned", "w") == "cast" and pairing.complete
    tag = "F32" if dtype == torch.float32 else "F16"
    assert pairing.pairs[0].note == f"tuned {tag} rounded to bf16"
    assert pairing.pairs[0].tuned.torch_dtype == dtype
    assert pairing.pairs[0].tuned.row_bytes == 5 * dtype.itemsize == pairing.pairs[0].tuned.stored_row_bytes
    with Checkpoint.open(tmp_path / "tuned") as tuned:
        assert torch.equal(pairing.pairs[0].tuned.read(tuned, 1, 3), bf16(3, 5).to(dtype)[1:3])
        with pytest.raises(IndexError, match="rows 1 to 4 of w, of which 3"):
            pairing.pairs[0].tuned.read(tuned, 1, 4)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"])
def test_vocabulary_padding(tmp_path: Path, name: str) -> None:
    pairing = pair_of(tmp_path, {name: bf16(10, 4)}, {name: bf16(16, 4).float()})
    found = pairing.pairs[0]
    assert status(pairing, "base", name) == "partial" and pairing.complete
    assert found.base.rows == found.tuned.rows == 10
    assert "10 common rows compared, base has 10, tuned 16" in found.note and "F32 rounded" in found.note


@pytest.mark.parametrize(
    ("name", "base", "tuned"),
    [
        (Q, (4, 8), (6, 8)),
        (Q, (4, 8), (4, 9)),
        (Q, (4, 8), (2, 2, 8)),
        ("lm_head.weight", (4, 8), (6, 9)),
        ("v", (4,), (5,)),
        ("v", (1, 4), (4,)),
        ("v", (), (1,)),
    ],
)
def test_other_shapes_are_refused_naming_both(tmp_path: Path, name: str, base: tuple, tuned: tuple) -> None:
    pairing = pair_of(tmp_path, {name: bf16(*base)}, {name: bf16(*tuned)})
    assert not pairing.pairs and not pairing.complete
    for side in ("base", "tuned"):
        assert status(pairing, side, name) == "refused"
        assert f"shape {list(base)} in base, {list(tuned)} in tuned" in reason(pairing, side, name)


def test_unmatched_on_both_sides(tmp_path: Path) -> None:
    pairing = pair_of(tmp_path, {"a": bf16(2), "c": bf16(2)}, {"b": bf16(2), "c": bf16(2)})
    assert pairing.counts() == {
        "base": {"compared": 1, "unmatched": 1},
        "tuned": {"compared": 1, "unmatched": 1},
    }
    assert reason(pairing, "base", "a") == "tuned has no tensor of this name"
    assert not pairing.complete


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, 2, dtype=torch.int8), "I8 holds packed values or integers"),
        (torch.ones(2, 2, dtype=torch.int32), "I32 holds packed values or integers"),
        (torch.ones(2, 2, dtype=torch.uint8), "U8 holds packed values or integers"),
        (torch.ones(2, 2, dtype=torch.float64), "F64 is not supported; save the checkpoint as fp32 or bf16"),
        (torch.ones(2, 2, dtype=torch.complex64), r"complex numbers \(C64\) are not supported"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "fp8 without its scale"),
    ],
)
def test_dtypes_that_are_not_compared(tmp_path: Path, tensor: torch.Tensor, words: str) -> None:
    for base, tuned in (({"w": bf16(2, 2)}, {"w": tensor}), ({"w": tensor}, {"w": tensor}), ({"w": tensor}, {})):
        folder = tmp_path / f"{len(base)}{len(tuned)}{base['w'].dtype}"
        pairing = pair_of(folder, base, tuned or {"other": bf16(1)})
        assert not pairing.pairs and status(pairing, "base", "w") == "refused" and not pairing.complete
        assert re.search(words, reason(pairing, "base", "w"))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [("F4", "F4 is a packed format"), ("F8_E8M0", "F8_E8M0 is a packed format"), ("X1", "dtype X1 is unknown here")],
)
def test_dtypes_that_cannot_be_made_here(tmp_path: Path, dtype: str, words: str) -> None:
    size = 1 if dtype == "F4" else 2
    header = {"w": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}}
    (tmp_path / "odd.safetensors").write_bytes(raw(header, bytes(size)))
    odd, plain = Checkpoint.open(tmp_path / "odd.safetensors"), Checkpoint.open(save(tmp_path / "b", {"w": bf16(2)}))
    pairing = checked(odd, plain)
    assert status(pairing, "tuned", "w") == "refused" and f"base: {words}" in reason(pairing, "tuned", "w")


def test_buffers_are_not_weights(tmp_path: Path) -> None:
    buffers = {
        "embeddings.position_ids": torch.arange(5)[None],
        "rotary_emb.inv_freq": torch.ones(4),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "h.0.mask": torch.ones(2, 2, dtype=torch.bool),
        "x.input_scale": torch.ones(1),
        "x.k_scale": torch.ones(1),
        "x.num_batches_tracked": torch.tensor(3),
    }
    pairing = pair_of(tmp_path, {"w": bf16(2, 2), **buffers}, {"w": bf16(2, 2)})
    assert pairing.complete and pairing.counts()["base"] == {"compared": 1, "not_weight": len(buffers)}


def test_packed_weights_and_their_parts(tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.up_proj"
    packed = {
        "gptq": {
            f"{stem}.qweight": torch.ones(2, 8, dtype=torch.int32),
            f"{stem}.qzeros": torch.ones(1, 1, dtype=torch.int32),
            f"{stem}.g_idx": torch.ones(16, dtype=torch.int32),
            f"{stem}.scales": torch.ones(1, 8, dtype=torch.float16),
        },
        "compressed": {
            f"{stem}.weight_packed": torch.ones(2, 8, dtype=torch.int32),
            f"{stem}.weight_scale": bf16(2, 1),
            f"{stem}.weight_shape": torch.tensor([2, 64]),
        },
        "bitsandbytes": {
            f"{stem}.weight": torch.ones(64, 1, dtype=torch.uint8),
            f"{stem}.weight.absmax": torch.ones(2),
            f"{stem}.weight.quant_map": torch.ones(16),
            f"{stem}.weight.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8),
        },
        "mxfp4": {
            f"{stem}_blocks": torch.ones(2, 3, 16, dtype=torch.uint8),
            f"{stem}_scales": torch.ones(2, 3, dtype=torch.uint8),
        },
        "int8": {f"{stem}.weight": torch.ones(2, 8, dtype=torch.int8), f"{stem}.weight_scale": torch.ones(2, 1)},
    }
    for kind, tensors in packed.items():
        base = {f"{stem}.weight" if kind != "mxfp4" else stem: bf16(2, 8)}
        pairing = pair_of(tmp_path / kind, base, tensors)
        assert not pairing.pairs and not pairing.complete
        assert pairing.counts() == {"base": {"refused": 1}, "tuned": {"refused": len(tensors)}}, kind
        assert "dequantize" in reason(pairing, "base", next(iter(base)))


def test_adapters(tmp_path: Path) -> None:
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tuned = {
        f"{stem}.base_layer.weight": bf16(4, 8),
        f"{stem}.lora_A.default.weight": bf16(2, 8),
        f"{stem}.lora_B.default.weight": bf16(4, 2),
    }
    pairing = pair_of(tmp_path, {Q: bf16(4, 8)}, tuned)
    assert status(pairing, "base", Q) == "compared" and not pairing.complete
    assert "merge_and_unload" in reason(pairing, "tuned", f"{stem}.lora_A.default.weight")


def test_globs(tmp_path: Path) -> None:
    tensors = {Q: bf16(4, 8), N: bf16(8), "lm_head.weight": bf16(3, 8)}
    tuned = {f"module.{name}": tensor for name, tensor in tensors.items()} | {"module.extra": bf16(2)}
    assert {p.name for p in pair_of(tmp_path, tensors, tuned, include=["*q_proj*"]).pairs} == {Q}
    pairing = pair_of(tmp_path, tensors, tuned, exclude=["lm_head.*", "module.model.norm.weight", "extra"])
    assert {p.name for p in pairing.pairs} == {Q} and pairing.complete
    assert pairing.counts() == {"base": {"compared": 1, "excluded": 2}, "tuned": {"compared": 1, "excluded": 3}}
    both = pair_of(tmp_path, tensors, tuned, include=["layers.*"], exclude=["*q_proj*"])
    assert not both.pairs and both.complete
    shapes = pair_of(tmp_path, {"w": bf16(2, 2)}, {"w": bf16(3, 3)}, exclude=["w"])
    assert shapes.complete and shapes.counts()["base"] == {"excluded": 1}


def test_zero_sizes_and_scalars(tmp_path: Path) -> None:
    tensors = {"none": bf16(0, 4), "thin": bf16(4, 0), "scalar": torch.tensor(1.0)}
    pairing = pair_of(tmp_path, tensors, tensors)
    assert pairing.complete and len(pairing.pairs) == 3
    base = Checkpoint.open(tmp_path / "base")
    for found in pairing.pairs:
        assert found.base.read(base).shape == (found.base.rows, found.base.columns)


PREFIX = st.sampled_from(["", "module.", "_orig_mod.", "model.", "base_model.model."])
NAME = st.sampled_from(
    [Q, N, "lm_head.weight", "model.embed_tokens.weight", "x.qweight", "x.scales", "x.weight", "x.weight_scale"]
    + [f"mlp.experts.{e}.{part}_proj.weight" for e in range(2) for part in ("gate", "up", "down")]
    + ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.experts.gate_up_proj_bias"]
)
DTYPE = st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.int32, torch.bool, torch.float8_e4m3fn])
SHAPE = st.sampled_from([(2, 4), (4, 2), (2, 2), (2, 4, 2), (2, 2, 2), (4,), (), (3, 4), (0, 4)])
TENSOR = st.builds(lambda shape, dtype: torch.zeros(shape).to(dtype), SHAPE, DTYPE)
STATE = st.dictionaries(st.builds(str.__add__, PREFIX, NAME), TENSOR, min_size=1, max_size=8)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STATE, STATE, st.lists(st.sampled_from(["*proj*", "lm_head*", "*"]), max_size=1))
def test_any_two_checkpoints_are_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, base: dict, tuned: dict, exclude: list[str]
) -> None:
    pairing = pair_of(tmp_path_factory.getbasetemp() / "any", base, tuned, exclude=exclude)
    folder = tmp_path_factory.getbasetemp() / "any"
    one, two = Checkpoint.open(folder / "base"), Checkpoint.open(folder / "tuned")
    for found in pairing.pairs:
        assert found.base.read(one).shape == found.tuned.read(two).shape
    assert pair(one, two, exclude=exclude) == pairing
