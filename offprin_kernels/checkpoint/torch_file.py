"""PyTorch checkpoints (``.bin``, ``.pt``, ``.pth``), always with ``weights_only=True``: no code from the file runs.

A zip-format file is mapped once to learn where each tensor's bytes lie; from then on it is read like any other file,
by ranges. What has no byte range of its own (the old format, non-contiguous views) stays as a tensor.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from . import dtypes, inert, refused
from .errors import CheckpointError
from .safetensors_file import Entry

PLAIN = (torch.Tensor, torch.nn.Parameter)
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# What torch.load is known to raise on damaged or hostile input; MemoryError comes from absurd sizes in it.
DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    AssertionError,
    MemoryError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
)


class TorchFile(NamedTuple):
    """Tensors of one file: byte ranges where they have one, the rest resident."""

    entries: list[Entry]
    resident: dict[str, torch.Tensor]
    ignored: list[str]
    aliases: dict[str, str]  # name -> earlier name with the same bytes


def read_torch_file(path: Path) -> TorchFile:
    """Raises CheckpointError for a damaged file, one that would run code, and one that holds no tensors."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    refused.check_file(path)
    try:
        loaded = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "torch.distributed.tensor" in str(error):
            raise _not_plain(path, "a tensor", "DTensor") from None
        raise CheckpointError(
            f"{path} holds more than plain tensors and could run code when loaded ({first_line(error)}); "
            f"save its state dict again as safetensors where you trust it"
        ) from None
    except DAMAGE as error:
        raise CheckpointError(
            f"{path} is damaged or not a PyTorch checkpoint ({first_line(error)}); download or copy this file again"
        ) from None
    ignored: list[str] = []
    tensors = _state_dict(path, loaded, ignored)
    offsets = _file_offsets(path, tensors) if zipped else {}
    entries: list[Entry] = []
    resident: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        tag = dtypes.TAGS.get(tensor.dtype, str(tensor.dtype))
        size = tensor.numel() * tensor.element_size()
        if tensor.numel():
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            first = seen.setdefault(key, name)
            if first != name:
                aliases[name] = first
        offset = offsets.get(name, 0)
        if name not in offsets:
            resident[name] = tensor
        entries.append(Entry(name, tag, tuple(tensor.shape), offset, size))
    return TorchFile(entries, resident, ignored, aliases)


def sharing(name: str, first: str) -> str:
    """The note on two names whose bytes are the same bytes of the file."""
    return f"tensor {name} shares its bytes with {first}"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def _state_dict(path: Path, loaded: object, ignored: list[str]) -> dict[str, torch.Tensor]:
    state = loaded
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict; save model.state_dict()")
    for _ in range(3):
        if any(isinstance(value, torch.Tensor) for value in state.values()):
            break
        inner = [key for key in WRAPPERS if _holds_tensors(state.get(key))]
        if len(inner) > 1:
            raise CheckpointError(f"{path} holds several state dicts ({', '.join(inner)}); save the one to be compared")
        if not inner:
            break
        ignored.extend(key if isinstance(key, str) else inert.text(key) for key in state if key != inner[0])
        state = state[inner[0]]
    tensors: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and type(value) not in PLAIN:
            raise _not_plain(path, f"tensor {inert.text(key)}", type(value).__name__)
        if isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided:
            # Bits that negate or conjugate when read are carried out.
            tensors[key] = value.detach().resolve_conj().resolve_neg()
        else:
            ignored.append(key if isinstance(key, str) else inert.text(key))
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors under names; save model.state_dict()")
    return tensors


def _not_plain(path: Path, what: str, kind: str) -> CheckpointError:
    part = ", which is one rank's part of a tensor; give the directory with the files of all ranks" * (
        kind == "DTensor"
    )
    return CheckpointError(f"{path} holds {what} as a {kind}{part or ' and no plain tensor; save plain tensors'}")


def _holds_tensors(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return any(isinstance(item, torch.Tensor) for item in value.values()) or any(
        _holds_tensors(value.get(key)) for key in WRAPPERS
    )


def _file_offsets(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Where each contiguous tensor begins in the file, from the kernel's own list of mappings; empty elsewhere."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return {}
    inode, real = os.stat(path).st_ino, os.path.realpath(path)
    ranges = []
    for line in lines:
        fields = line.split(maxsplit=5)
        # Layered file systems may list the inode of another layer, so that either of the two identifies the file.
        if int(fields[4]) == inode or fields[-1] == real:
            low, high = (int(part, 16) for part in fields[0].split("-"))
            ranges.append((low, high, int(fields[2], 16)))
    offsets = {}
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.numel() == 0:
            continue
        pointer = tensor.data_ptr()
        for low, high, start in ranges:
            if low <= pointer and pointer + tensor.numel() * tensor.element_size() <= high:
                offsets[name] = pointer - low + start
    return offsets
