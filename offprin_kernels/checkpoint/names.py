"""What a tensor's name says: which layer, which kind of module, and the same name without its wrappers."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Path segments that wrappers put into names: DataParallel, torch.compile, FSDP, activation checkpointing, transformers'
# own inner model, peft's wrapped layers.
WRAPPER_SEGMENTS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model", "base_layer"}
)
# transformers' base_model_prefix of GPT-2 and NeoX: absent where the bare model was saved.
LEADING_SEGMENTS = frozenset({"transformer", "gpt_neox", "base_model"})
# Mixtral's own name for what transformers 5 calls mlp.
RENAMED_SEGMENTS = {"block_sparse_moe": "mlp"}

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)(?:\.|$)")
EXPERT = re.compile(r"(?:^|\.)experts(?:\.(?P<index>\d+))?\.")

# Kinds of linear modules, by the last segment of the module's path.
LINEAR = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "o_proj",
    "out_proj": "o_proj",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "qkv_proj": "qkv_proj",
    "c_attn": "qkv_proj",
    "query_key_value": "qkv_proj",
    "Wqkv": "qkv_proj",
    "qkv": "qkv_proj",
    "q_a_proj": "q_a_proj",
    "q_b_proj": "q_b_proj",
    "kv_a_proj_with_mqa": "kv_a_proj",
    "kv_b_proj": "kv_b_proj",
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "gate_up_proj": "gate_up_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "c_fc": "up_proj",
    "fc1": "up_proj",
    "fc2": "down_proj",
    "fc_in": "up_proj",
    "fc_out": "down_proj",
    "dense_h_to_4h": "up_proj",
    "dense_4h_to_h": "down_proj",
}
FEED_FORWARD = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj"})
EMBEDDINGS = frozenset({"embed_tokens", "tok_embeddings", "wte", "embed_in", "word_embeddings"})
POSITIONS = frozenset({"wpe", "embed_positions", "position_embeddings", "embed_pos", "token_type_embeddings"})
HEADS = frozenset({"lm_head", "embed_out", "output"})
ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})
NORM = re.compile(r"norm|^ln_|^ln\d|^ln$")
NOT_LINEAR = frozenset({"embedding", "position_embedding", "head", "norm", "bias"})


def canonical(name: str) -> str:
    """The name without wrapper segments, wherever they stand; names that meet here are one tensor or a collision."""
    segments = [RENAMED_SEGMENTS.get(part, part) for part in name.split(".") if part not in WRAPPER_SEGMENTS]
    while len(segments) > 1 and segments[0] in LEADING_SEGMENTS:
        del segments[0]
    return ".".join(segments)


def describe(name: str) -> tuple[int | None, str]:
    """(layer index or None, kind of module) of a tensor name.

    Kinds: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``qkv_proj``, ``q_a_proj``, ``q_b_proj``, ``kv_a_proj``,
    ``kv_b_proj``, ``gate_proj``, ``up_proj``, ``down_proj``, ``gate_up_proj`` (the last four with ``expert_`` or
    ``shared_expert_`` before them where they belong to one), ``router``, ``embedding``, ``position_embedding``,
    ``head``, ``norm``, ``bias``, ``other``.
    """
    match = LAYER.search(name)
    return (int(match[1]) if match else None), _kind(name)


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the weight of a linear layer: 2-D, or one matrix per expert; routers are, heads are not."""
    kind = _kind(name)
    if kind in NOT_LINEAR:
        return False
    if len(shape) == 3:
        return kind.startswith("expert_")
    return len(shape) == 2 and (kind != "other" or name.endswith(".weight"))


def _kind(name: str) -> str:
    segments = canonical(name).split(".")
    leaf = segments[-1]
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    # A fused expert tensor is a parameter of its own, without ".weight" behind it.
    module = segments[-2] if leaf == "weight" and len(segments) > 1 else leaf
    inside = segments[:-1]
    if module in LINEAR:
        kind = LINEAR[module]
        if kind not in FEED_FORWARD:
            return kind
        if "experts" in inside:
            return f"expert_{kind}"
        if "shared_expert" in inside or "shared_experts" in inside:
            return f"shared_expert_{kind}"
        return kind
    if module in ("c_proj", "dense"):
        attention = any("attn" in part or "attention" in part for part in inside)
        if attention:
            return "o_proj"
        return "down_proj" if module == "c_proj" and "mlp" in inside else "other"
    if module in EMBEDDINGS:
        return "embedding"
    if module in POSITIONS:
        return "position_embedding"
    if module in HEADS and LAYER.search(name) is None:
        return "head"
    if module in ROUTERS:
        return "router"
    if NORM.search(module):
        return "norm"
    return "other"
