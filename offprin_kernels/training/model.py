"""The model of the reference loop: a small Qwen3 and a tokenizer of single characters, in Hugging Face's format."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .settings import Size
from .tasks import ALPHABET

PAD, END = "<pad>", "<end>"
PAD_ID, END_ID = 0, 1
IDS = {character: i + 2 for i, character in enumerate(ALPHABET)}


def make_tokenizer() -> Any:
    """A ``PreTrainedTokenizerFast`` with a token per character of the tasks, one to pad and one to end."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {PAD: PAD_ID, END: END_ID, **IDS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left", model_max_length=256
    )


def make_model(size: Size, seed: int) -> torch.nn.Module:
    """A randomly initialised ``Qwen3ForCausalLM`` in fp32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(ALPHABET) + 2, hidden_size=size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, head_dim=size.head_dim,
        intermediate_size=size.intermediate, max_position_embeddings=256, tie_word_embeddings=False,
        pad_token_id=PAD_ID, eos_token_id=END_ID, bos_token_id=None, max_window_layers=size.layers,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config).float()


def encode(texts: list[str]) -> list[list[int]]:
    """Token ids of the tasks' characters; the twin of ``make_tokenizer`` that needs no library."""
    return [[IDS[character] for character in text] for text in texts]


def decode(ids: list[int]) -> str:
    """Characters up to the end token; padding before it, which a model may choose like any token, is ``?``."""
    found = ids[: ids.index(END_ID)] if END_ID in ids else ids
    return "".join("?" if i == PAD_ID else ALPHABET[i - 2] for i in found)


def save_checkpoint(model: torch.nn.Module, path: Path) -> None:
    """A Hugging Face directory of the model in bf16 with its tokenizer, whole or not at all; one that exists stays."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with no_progress_bars():
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(partial)  # type: ignore[operator]
    make_tokenizer().save_pretrained(partial)
    for file in partial.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())  # or a power cut could leave a directory of empty files under its final name
    os.replace(partial, path)


def load_checkpoint(path: str | Path) -> torch.nn.Module:
    """A model of ``save_checkpoint`` in fp32, which holds bf16 exactly.

    Raises:
        ValueError: nothing there, another architecture, or another tokenizer.
    """
    path = Path(path)
    config = read(path / "config.json")
    architectures = config.get("architectures") or ["none"]
    if architectures != ["Qwen3ForCausalLM"]:
        raise ValueError(f"{path} is a {architectures[0]}; the reference loop trains Qwen3ForCausalLM")
    vocabulary = read(path / "tokenizer.json").get("model", {}).get("vocab")
    if vocabulary != {PAD: 0, END: 1, **IDS}:
        raise ValueError(f"{path} has another tokenizer than the tasks'; begin with `offprin train pretrain`")
    from transformers import AutoModelForCausalLM

    with no_progress_bars():
        try:
            return AutoModelForCausalLM.from_pretrained(path).float()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the weights in {path} cannot be read ({str(error).splitlines()[0]})") from None


def round_weights(model: torch.nn.Module) -> None:
    """Weights in bf16; tables such as the rotary embedding's stay as exact as they are, as transformers keeps them."""
    for param in model.parameters():
        param.data = param.data.bfloat16()


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keeps transformers from drawing a bar for every file of a few megabytes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise ValueError(
            f"{path} cannot be read ({reason}); a base is a checkpoint of `offprin train`, such as RUN/final"
        ) from None


def linear_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the decoder's linear layers, which masks and gates are about: no embeddings, no norms, no head."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
