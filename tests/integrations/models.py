"""A tiny Qwen3 and a tokenizer, made on the spot."""

from __future__ import annotations

import torch

WORDS = [f"w{i}" for i in range(60)]


def model(dtype: torch.dtype = torch.bfloat16):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=False,
        eos_token_id=1, pad_token_id=0, bos_token_id=2,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(dtype)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def sentences(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [" ".join(WORDS[i] for i in torch.randint(0, 60, (8,), generator=generator).tolist()) for _ in range(count)]
