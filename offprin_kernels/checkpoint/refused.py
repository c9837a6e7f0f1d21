"""Formats that are known and not read: each is refused by its name, with the tool that converts it."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import CheckpointError

# What trainers leave beside rank files and shards under the suffixes of weights.
STATE = re.compile(r"(?:optim|extra_state)_world_size_\d+_rank_\d+\.pt|.*_optim_states\.pt|.*_model_states\.pt")
GGUF = (
    "is in GGUF, a quantised format for inference; load it with transformers' "
    "from_pretrained(..., gguf_file=...) and save_pretrained, and compare that with care: its weights are rounded"
)
ZERO = "holds DeepSpeed ZeRO shards; run its zero_to_fp32.py (or deepspeed.utils.zero_to_fp32) and give its output"
MEGATRON = "holds a Megatron checkpoint; convert it with Megatron's (or Megatron Bridge's) export to Hugging Face"
KERAS = "holds TensorFlow or Flax weights; load them with from_pretrained(..., from_tf=True or from_flax=True) and save"
NEMO = "is a NeMo archive; export it to Hugging Face with NeMo's own converter"


def is_state(name: str) -> bool:
    """Whether a file of this name holds a trainer's state, or shards that only its own tool can join."""
    return STATE.fullmatch(name) is not None


def check_file(path: Path) -> None:
    """Raises CheckpointError where a file is of a known format that is not read."""
    if _is_gguf(path):
        raise CheckpointError(f"{path} {GGUF}")
    if path.suffix == ".nemo":
        raise CheckpointError(f"{path} {NEMO}")
    if path.suffix in (".h5", ".msgpack"):
        raise CheckpointError(f"{path} {KERAS}")
    if path.suffix == ".distcp":
        raise CheckpointError(f"{path} is one file of a distributed checkpoint; give the directory with its .metadata")


def check_directory(root: Path) -> None:
    """Raises CheckpointError where a directory without readable weights holds a known format that is not read."""
    names = sorted(item.name for item in root.iterdir())
    if any(name.endswith((".distcp", ".distcp.tmp")) for name in names):
        raise CheckpointError(
            f"{root} holds .distcp files without their .metadata, which is written last; the save was cut short, or "
            f"the copy left hidden files out"
        )
    if "adapter_config.json" in names:
        raise CheckpointError(f"{root} holds adapter_config.json without adapter_model.safetensors; copy that file too")
    if any(name.endswith(".gguf") for name in names):
        raise CheckpointError(f"{root} {GGUF}")
    zero = any(name.endswith(("_optim_states.pt", "_model_states.pt")) or name == "zero_to_fp32.py" for name in names)
    if zero or any(any((root / name).glob("*_optim_states.pt")) for name in names if name.startswith("global_step")):
        raise CheckpointError(f"{root} {ZERO}")
    if "latest_checkpointed_iteration.txt" in names or any(
        re.fullmatch(r"iter_\d+|mp_rank_\d+(?:_\d+)*", name) for name in names
    ):
        raise CheckpointError(f"{root} {MEGATRON}")
    if any(name.endswith((".h5", ".msgpack")) or name.startswith("tf_model") for name in names):
        raise CheckpointError(f"{root} {KERAS}")
    if any(name.endswith(".nemo") for name in names):
        raise CheckpointError(f"{root} {NEMO}")


def _is_gguf(path: Path) -> bool:
    if path.suffix == ".gguf":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False
