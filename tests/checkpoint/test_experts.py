"""Experts one by one against experts in one tensor: matched by rows where the layout is sure, else refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offprin_kernels.checkpoint import Checkpoint, Pairing

from .files import bf16, checked, pair_of, reason, status

E, INNER, HIDDEN = 3, 5, 8
STEM = "model.layers.0.mlp.experts"


def single(inner: int = INNER, hidden: int = HIDDEN, names=("gate_proj", "up_proj", "down_proj"), stem=STEM) -> dict:
    gate, up, down = names
    tensors = {}
    for expert in range(E):
        tensors[f"{stem}.{expert}.{gate}.weight"] = bf16(inner, hidden, seed=3 * expert)
        tensors[f"{stem}.{expert}.{up}.weight"] = bf16(inner, hidden, seed=3 * expert + 1)
        tensors[f"{stem}.{expert}.{down}.weight"] = bf16(hidden, inner, seed=3 * expert + 2)
    return tensors


def fused(tensors: dict, stem: str = STEM) -> dict:
    values = list(tensors.values())
    both = [torch.cat(values[3 * expert : 3 * expert + 2]) for expert in range(E)]
    return {f"{stem}.gate_up_proj": torch.stack(both), f"{stem}.down_proj": torch.stack(values[2::3])}


def assert_equal_rows(folder: Path, pairing: Pairing) -> None:
    base, tuned = Checkpoint.open(folder / "base"), Checkpoint.open(folder / "tuned")
    for found in pairing.pairs:
        assert torch.equal(found.base.read(base, 1, 4), found.tuned.read(tuned, 1, 4)), found.name


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
@pytest.mark.parametrize("fused_side", ["base", "tuned"])
def test_matched_by_rows(tmp_path: Path, names: tuple, fused_side: str) -> None:
    split = single(names=names)
    sides = (fused(split), split) if fused_side == "base" else (split, fused(split))
    pairing = pair_of(tmp_path, *sides)
    assert pairing.complete and {found.name for found in pairing.pairs} == set(split)
    assert_equal_rows(tmp_path, pairing)
    assert {found.base.rows for found in pairing.pairs} == {INNER, HIDDEN}
    assert status(pairing, fused_side, f"{STEM}.gate_up_proj") == "compared"
    entry = next(item for item in pairing.ledger if item.name == f"{STEM}.gate_up_proj")
    assert entry.partner == f"{STEM}.*.{{{names[0]},{names[1]}}}.weight"
    assert pairing.counts()[fused_side] == {"compared": 2}


def test_under_wrappers_and_mixtrals_own_names(tmp_path: Path) -> None:
    split = single(names=("w1", "w3", "w2"), stem="module.model.layers.0.block_sparse_moe.experts")
    pairing = pair_of(tmp_path, fused(split), split)
    assert pairing.complete and len(pairing.pairs) == 9
    assert {found.name for found in pairing.pairs} >= {f"{STEM}.0.w1.weight", f"{STEM}.2.w2.weight"}
    assert_equal_rows(tmp_path, pairing)


def test_globs_reach_single_experts(tmp_path: Path) -> None:
    split = single()
    pairing = pair_of(tmp_path, fused(split), split, include=["*.experts.1.*"])
    assert {found.name for found in pairing.pairs} == {name for name in split if ".1." in name}
    assert status(pairing, "base", f"{STEM}.gate_up_proj") == "compared" and pairing.complete
    pairing = pair_of(tmp_path, fused(split), split, exclude=["*gate_proj*", "*up_proj*"])
    assert status(pairing, "base", f"{STEM}.gate_up_proj") == "excluded" and len(pairing.pairs) == E


def test_both_fused(tmp_path: Path) -> None:
    tensors = fused(single())
    pairing = pair_of(tmp_path, tensors, tensors)
    assert pairing.complete and {found.base.rows for found in pairing.pairs} == {E * 2 * INNER, E * HIDDEN}


def assert_refused(pairing: Pairing, words: str, tensors: int) -> None:
    refused = [entry for entry in pairing.ledger if entry.status == "refused"]
    assert len(refused) == tensors and not pairing.complete
    for entry in refused:
        assert words in entry.reason and "experts" in entry.reason, entry


def test_transposed_layouts(tmp_path: Path) -> None:
    split = single()
    tensors = {name: tensor.transpose(1, 2) for name, tensor in fused(split).items()}
    assert_refused(pair_of(tmp_path, tensors, split), "is transposed (or interleaved)", 2 + 3 * E)


def test_layout_with_biases_is_gpt_oss(tmp_path: Path) -> None:
    split = single()
    tensors = fused(split) | {
        f"{STEM}.gate_up_proj_bias": bf16(E, 2 * INNER),
        f"{STEM}.down_proj_bias": bf16(E, HIDDEN),
    }
    pairing = pair_of(tmp_path, split, tensors)
    assert_refused(pairing, "GPT-OSS", 2 + 3 * E)
    assert status(pairing, "tuned", f"{STEM}.down_proj_bias") == "unmatched"


def test_square_matrices_are_ambiguous_unless_the_model_is_known(tmp_path: Path) -> None:
    split = single(inner=4, hidden=8)
    pairing = pair_of(tmp_path / "a", fused(split), split)
    # gate_up_proj is square here, down_proj is not.
    assert status(pairing, "base", f"{STEM}.gate_up_proj") == "refused"
    assert "ambiguous" in reason(pairing, "base", f"{STEM}.gate_up_proj")
    assert status(pairing, "base", f"{STEM}.down_proj") == "compared"
    for config in ({"model_type": "qwen3_moe"}, {"text_config": {"model_type": "mixtral"}}):
        known = pair_of(tmp_path / "b", fused(split), split, (config, None))
        assert known.complete and len(known.pairs) == 3 * E
        assert_equal_rows(tmp_path / "b", known)
    assert not pair_of(tmp_path / "c", fused(split), split, ({"model_type": "other"}, None)).complete


def test_missing_and_odd_experts(tmp_path: Path) -> None:
    split = single()
    whole = fused(split)
    fewer = {name: tensor for name, tensor in split.items() if not name.startswith(f"{STEM}.2.up")}
    pairing = pair_of(tmp_path / "a", whole, fewer)
    assert "3 experts against 2 up projections" in reason(pairing, "base", f"{STEM}.gate_up_proj")
    assert status(pairing, "base", f"{STEM}.down_proj") == "compared"
    odd = split | {f"{STEM}.1.gate_proj.weight": bf16(INNER + 1, HIDDEN)}
    assert "differ in shape" in reason(pair_of(tmp_path / "b", whole, odd), "base", f"{STEM}.gate_up_proj")
    flat = whole | {f"{STEM}.down_proj": whole[f"{STEM}.down_proj"].flatten(0, 1)}
    assert "is not [experts, rows, columns]" in reason(
        pair_of(tmp_path / "c", flat, split), "base", f"{STEM}.down_proj"
    )
    integers = split | {f"{STEM}.1.gate_proj.weight": torch.ones(INNER, HIDDEN, dtype=torch.int8)}
    assert "I8 holds packed" in reason(pair_of(tmp_path / "d", whole, integers), "base", f"{STEM}.gate_up_proj")
    packed = whole | {f"{STEM}.down_proj": torch.ones(E, HIDDEN, INNER, dtype=torch.uint8)}
    assert "U8 holds packed" in reason(pair_of(tmp_path / "e", packed, split), "tuned", f"{STEM}.0.down_proj.weight")
    other = whole | {f"{STEM}.down_proj": bf16(E, 2, 3)}
    assert "do not fit together" in reason(pair_of(tmp_path / "f", other, split), "base", f"{STEM}.down_proj")


def test_transformers_own_two_layouts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base", save_original_format=True)
    model.save_pretrained(tmp_path / "tuned", save_original_format=False)
    one, two = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    assert f"{STEM}.3.up_proj.weight" in one.tensors and f"{STEM}.gate_up_proj" in two.tensors
    pairing = checked(one, two)
    # hidden = 2 x intermediate: only the model type settles the orientation of the square gate_up_proj.
    assert pairing.complete and len(pairing.pairs) == len(one.tensors)
    for found in pairing.pairs:
        assert torch.equal(found.base.read(one), found.tuned.read(two)), found.name
