"""Trains a tiny Qwen3 from scratch and fine-tunes it three ways, so that `offprin analyze` has something real to read.

Checkpoints are written by transformers' own save_pretrained: bf16, sharded, with an index. Everything is made here;
nothing is downloaded. Takes about half a minute on two cores.

    python examples/demo_checkpoints.py demo-out/models
"""

import argparse
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

VOCABULARY, LENGTH, BATCH = 512, 64, 16


def make_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )


def sequences(generator: torch.Generator, multiplier: int) -> torch.Tensor:
    """Linear recurrences x -> (multiplier * x + step) mod vocabulary: learnable, and different for every multiplier."""
    start = torch.randint(0, VOCABULARY, (BATCH, 1), generator=generator)
    step = torch.randint(1, 8, (BATCH, 1), generator=generator)
    columns = [start]
    for _ in range(LENGTH - 1):
        columns.append((multiplier * columns[-1] + step) % VOCABULARY)
    return torch.cat(columns, 1)


def train(model: Qwen3ForCausalLM, steps: int, lr: float, seed: int, multiplier: int) -> float:
    """fp32 AdamW without decay; returns the last loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    loss = torch.zeros(())
    for _ in range(steps):
        batch = sequences(generator, multiplier)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def save(model: Qwen3ForCausalLM, path: Path) -> None:
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(path, state_dict=weights, max_shard_size="3MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    logging.disable_progress_bar()
    model = make_model()
    loss = train(model, steps=60, lr=1e-3, seed=0, multiplier=1)
    save(model, out / "base")
    print(f"base: {sum(p.numel() for p in model.parameters()):,} weights, loss {loss:.3f}")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # the same task with two data orders at a cautious learning rate, then another task at a bold one
    for name, lr, seed, multiplier in (
        ("cautious-1", 1e-6, 1, 1),
        ("cautious-2", 1e-6, 2, 1),
        ("bold", 1e-4, 3, 3),
    ):
        model.load_state_dict(base)
        loss = train(model, steps=12, lr=lr, seed=seed, multiplier=multiplier)
        save(model, out / name)
        print(f"{name}: 12 AdamW steps at learning rate {lr:g}, loss {loss:.3f}")


if __name__ == "__main__":
    main()
