"""Small checkpoints on disk for analysis tests, the command, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from offprin_kernels.analysis import store
from offprin_kernels.cli import main

from ..ops.weights import tuned, weights

SHAPES = {
    "model.embed_tokens.weight": (96, 40),
    "model.layers.0.input_layernorm.weight": (40,),
    "model.layers.0.self_attn.q_proj.weight": (40, 40),
    "model.layers.0.mlp.down_proj.weight": (40, 130),
    "model.layers.1.self_attn.q_proj.weight": (40, 40),
    "model.layers.1.mlp.down_proj.weight": (40, 130),
    "lm_head.weight": (96, 40),
}


def base_weights(dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    return {name: weights(shape, dtype, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}


def tuned_weights(base: dict[str, torch.Tensor], seed: int, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    return {name: tuned(tensor, dtype, seed=100 * seed + i) for i, (name, tensor) in enumerate(base.items())}


def save(path: Path, tensors: dict[str, torch.Tensor], shards: int = 2) -> Path:
    """A sharded directory as Hugging Face writes it."""
    path.mkdir(parents=True)
    names = list(tensors)
    index = {}
    for i in range(shards):
        part = {name: tensors[name].contiguous() for name in names[i::shards]}
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (path / "model.safetensors.index.json").write_text(text)
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3", "tie_word_embeddings": False}))
    return path


def offprin(*arguments) -> int:
    """``offprin analyze``, for its tables: the report, made from these, has tests of its own."""
    return main(["analyze", *map(str, arguments), "--quiet", "--no-report"])


def files(out: Path) -> dict[str, bytes]:
    """Everything an analysis leaves behind but the log of times."""
    return {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != store.LOG
    }
