"""Names of real models: layer, kind, linear or not, and the same name without its wrappers."""

from __future__ import annotations

import pytest

from offprin_kernels.checkpoint import canonical, describe, is_linear

NAMES = {
    "model.embed_tokens.weight": (None, "embedding"),
    "model.layers.13.self_attn.q_proj.weight": (13, "q_proj"),
    "model.layers.13.self_attn.k_proj.weight": (13, "k_proj"),
    "model.layers.0.self_attn.v_proj.weight": (0, "v_proj"),
    "model.layers.0.self_attn.v_proj.bias": (0, "bias"),
    "model.layers.0.self_attn.o_proj.weight": (0, "o_proj"),
    "model.layers.0.self_attn.q_norm.weight": (0, "norm"),
    "model.layers.0.input_layernorm.weight": (0, "norm"),
    "model.layers.5.mlp.gate_proj.weight": (5, "gate_proj"),
    "model.layers.5.mlp.gate.weight": (5, "router"),
    "model.layers.5.mlp.gate.e_score_correction_bias": (5, "bias"),
    "model.layers.5.mlp.experts.7.up_proj.weight": (5, "expert_up_proj"),
    "model.layers.5.mlp.experts.gate_up_proj": (5, "expert_gate_up_proj"),
    "model.layers.5.mlp.experts.down_proj": (5, "expert_down_proj"),
    "model.layers.5.mlp.shared_experts.down_proj.weight": (5, "shared_expert_down_proj"),
    "model.layers.5.mlp.shared_expert_gate.weight": (5, "router"),
    "model.layers.5.self_attn.q_a_proj.weight": (5, "q_a_proj"),
    "model.layers.5.self_attn.q_a_layernorm.weight": (5, "norm"),
    "model.layers.5.self_attn.kv_a_proj_with_mqa.weight": (5, "kv_a_proj"),
    "model.layers.5.self_attn.kv_b_proj.weight": (5, "kv_b_proj"),
    "model.layers.3.block_sparse_moe.experts.2.w1.weight": (3, "expert_gate_proj"),
    "model.layers.3.block_sparse_moe.gate.weight": (3, "router"),
    "model.norm.weight": (None, "norm"),
    "lm_head.weight": (None, "head"),
    "output.weight": (None, "head"),
    "tok_embeddings.weight": (None, "embedding"),
    "layers.2.attention.wo.weight": (2, "o_proj"),
    "layers.2.feed_forward.w3.weight": (2, "up_proj"),
    "layers.2.attention_norm.weight": (2, "norm"),
    "transformer.wte.weight": (None, "embedding"),
    "transformer.wpe.weight": (None, "position_embedding"),
    "transformer.h.4.attn.c_attn.weight": (4, "qkv_proj"),
    "transformer.h.4.attn.c_proj.weight": (4, "o_proj"),
    "transformer.h.4.mlp.c_fc.weight": (4, "up_proj"),
    "transformer.h.4.mlp.c_proj.weight": (4, "down_proj"),
    "transformer.h.4.ln_1.weight": (4, "norm"),
    "transformer.ln_f.bias": (None, "bias"),
    "gpt_neox.embed_in.weight": (None, "embedding"),
    "embed_out.weight": (None, "head"),
    "gpt_neox.layers.9.attention.query_key_value.weight": (9, "qkv_proj"),
    "gpt_neox.layers.9.attention.dense.weight": (9, "o_proj"),
    "gpt_neox.layers.9.mlp.dense_h_to_4h.weight": (9, "up_proj"),
    "gpt_neox.layers.9.mlp.dense_4h_to_h.weight": (9, "down_proj"),
    "gpt_neox.final_layer_norm.weight": (None, "norm"),
    "model.layers.1.self_attn.dense.weight": (1, "o_proj"),
    "model.layers.1.mlp.fc1.weight": (1, "up_proj"),
    "model.layers.1.mlp.fc2.weight": (1, "down_proj"),
    "model.layers.1.self_attn.qkv_proj.weight": (1, "qkv_proj"),
    "model.layers.1.mlp.gate_up_proj.weight": (1, "gate_up_proj"),
    "model.layers.1.mixer.A_log": (1, "other"),
    "model.visual.merger.linear.weight": (None, "other"),
    "x": (None, "other"),
    "": (None, "other"),
}


@pytest.mark.parametrize("name", NAMES)
def test_layer_and_kind(name: str) -> None:
    assert describe(name) == NAMES[name]
    assert describe("base_model.model." + name)[1] == NAMES[name][1]


def test_linear_layers() -> None:
    linear = {name for name in NAMES if is_linear(name, (8, 8))}
    assert linear == {
        name
        for name, (_, kind) in NAMES.items()
        if kind not in ("embedding", "position_embedding", "head", "norm", "bias", "other") or "merger" in name
    }
    assert not any(is_linear(name, (8,)) for name in NAMES)
    assert {name for name in NAMES if is_linear(name, (4, 8, 8))} == {
        name for name, (_, kind) in NAMES.items() if kind.startswith("expert_")
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module._orig_mod.model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("model.layers.0._orig_mod.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "layers.0.q_proj.weight"),
        ("_fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.mlp.w.weight", "layers.0.mlp.w.weight"),
        ("language_model.model.layers.0.w", "language_model.layers.0.w"),
        ("model.language_model.layers.0.w", "language_model.layers.0.w"),
        ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("submodule.models.weight", "submodule.models.weight"),
    ],
)
def test_names_without_wrappers(name: str, expected: str) -> None:
    assert canonical(name) == expected
    assert canonical(canonical(name)) == expected
