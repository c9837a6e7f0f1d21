"""Tiny models of any supported type, made on the spot: every parameter is random, norms and biases too."""

from __future__ import annotations

from pathlib import Path

import torch

SHAPES = [(4, 4), (4, 2), (4, 1), (8, 2)]  # query heads, KV heads
# Linear layers with biases where the type has them: on q, k, v (Qwen2), on all four (Llama).
FOUR = ["qwen3", "llama", "mistral", "qwen2"]


def model(kind: str, heads: int = 4, kv: int = 2, size: int = 8, dtype=torch.float32, layers: int = 3):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=size, max_position_embeddings=64, attention_bias=True,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            wide = parameter.dim() > 1
            parameter.copy_(torch.randn_like(parameter) * (0.2 if wide else 0.3) + (0 if wide else 1))
    return made.to(dtype)


def state(kind: str, heads: int = 4, kv: int = 2, size: int = 8, dtype=torch.float32):
    """(tensors, config) of such a model."""
    made = model(kind, heads, kv, size, dtype)
    return {name: tensor.clone() for name, tensor in made.state_dict().items()}, made.config.to_dict()


def logits(made) -> torch.Tensor:
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return made(input_ids=tokens, use_cache=False).logits.double()


def saved(path: Path, kind: str = "qwen3", shards: bool = True, **how) -> Path:
    """A directory as transformers writes it, with what else lies in such directories."""
    model(kind, **how).save_pretrained(path, max_shard_size="20KB" if shards else "1GB")
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "merges.txt").write_text("a b\n")
    (path / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    (path / ".cache").mkdir()
    return path


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
