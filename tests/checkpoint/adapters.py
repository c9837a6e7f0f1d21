"""LoRA adapters made on the spot by peft: a base, an adapter on it, and what peft merges them to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offprin_kernels.checkpoint import Checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Q = "model.layers.0.self_attn.q_proj.weight"


def model(dtype: torch.dtype, tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def make(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    factors: str = "fp32",
    base: torch.nn.Module | None = None,
    **options,
) -> None:
    """``base``, ``adapter`` with factors that are not zero, and ``merged`` as peft merges them."""
    base = model(dtype, tied) if base is None else base
    base.save_pretrained(folder / "base")
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**options), autocast_adapter_dtype=factors == "fp32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                scale = 0.05 if "lora_" in name else 0.02
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
    wrapped.save_pretrained(folder / "adapter")
    wrapped.merge_and_unload().save_pretrained(folder / "merged")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(folder: Path, tmp_path: Path, **settings) -> Path:
    """A copy of the adapter with other settings in its config."""
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | settings
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


def check_merged(folder: Path, exact: bool = False) -> Checkpoint:
    """fp32: a product of rank 4 is 4 products and 3 sums in some order, times a number, then one more sum."""
    base = Checkpoint.open(folder / "base")
    checkpoint = Checkpoint.open(folder / "adapter", base=base)
    expected, before = tensors(folder / "merged"), tensors(folder / "base")
    assert checkpoint.tensors.keys() >= expected.keys()
    for name, tensor in expected.items():
        got = checkpoint.read(name).view(tensor.shape)
        assert got.dtype == tensor.dtype
        if exact or (name in before and torch.equal(tensor, before[name])):
            assert torch.equal(got, tensor), name
        else:
            bound = 2**-21 * (1 + (tensor - before[name]).abs() if name in before else tensor.abs())
            assert ((got - tensor).abs() <= bound).all(), name
            assert name not in before or not torch.equal(tensor, before[name])
    return checkpoint
