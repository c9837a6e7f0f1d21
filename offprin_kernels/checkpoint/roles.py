"""What each tensor of one checkpoint is: a weight to compare, a scale, a buffer, or something to refuse, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import dtypes, fp8
from .ledger import Status, TensorRef
from .reader import Checkpoint, TensorInfo

ADAPTER = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?:\.|$)")
BUFFER = re.compile(
    r"(?:^|\.)(?:position_ids|token_type_ids|num_batches_tracked|inv_freq|masked_bias|causal_mask)$"
    r"|(?:^|[._])(?:input|output|activation|act|k|v|kv|q)_scale(?:_inv|_ub)?$"
)
# Parts of packed weights by the last segment of their names, and the segment that holds the packed numbers.
PACKED_PARTS = {
    "scales": "qweight",
    "qzeros": "qweight",
    "g_idx": "qweight",
    "weight_scale": "weight_packed",
    "weight_zero_point": "weight_packed",
    "weight_shape": "weight_packed",
    "weight_g_idx": "weight_packed",
    "weight_global_scale": "weight_packed",
}
BITSANDBYTES = re.compile(r"\.weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\S+)$|\.SCB$")
PACKED_WEIGHT = ("qweight", "weight_packed")


@dataclass(frozen=True)
class Role:
    """``ref`` for a weight that can be compared; else a status and its reason."""

    ref: TensorRef | None = None
    status: Status = Status.REFUSED
    reason: str = ""


def role_of(checkpoint: Checkpoint, info: TensorInfo) -> Role:
    """The role of one stored tensor."""
    name, dtype = info.name, info.dtype
    if ADAPTER.search(name):
        return Role(reason="an adapter, not a weight: merge it first with merge_and_unload")
    if BUFFER.search(name) or dtype == "BOOL" or _is_causal_mask(info):
        return Role(status=Status.NOT_WEIGHT, reason="a buffer or an activation scale, not a weight")
    owner = _scaled_weight(checkpoint, name)
    if owner is not None:
        return Role(status=Status.SCALE, reason=f"scale of {owner}")
    packed = _packed_weight(checkpoint, name)
    if packed is not None:
        return Role(reason=f"a part of the packed weight {packed}; dequantize the checkpoint first")
    scale = None
    if dtype in dtypes.FP8:
        found = fp8.scale_of(checkpoint, info)
        if isinstance(found, str):
            return Role(reason=found)
        scale = found
    elif dtype not in dtypes.COMPARABLE:
        return Role(reason=_refusal(dtype))
    return Role(TensorRef(name, dtype, info.shape, 0, info.rows, info.columns, scale))


def _refusal(dtype: str) -> str:
    if dtype in dtypes.INTEGER:
        return f"{dtype} holds packed values or integers, which are not compared as numbers; dequantize them first"
    if dtype == "F64":
        return "F64 is not supported; save the checkpoint as fp32 or bf16"
    if dtype.startswith("C") or "complex" in dtype:
        return f"complex numbers ({dtype}) are not supported; save real and imaginary parts apart"
    if dtype in dtypes.BITS:
        return f"{dtype} is a packed format, which is not compared as numbers; dequantize the checkpoint first"
    return f"dtype {dtype} is unknown here; save the checkpoint as bf16"


def _is_causal_mask(info: TensorInfo) -> bool:
    # GPT-2 and NeoX once stored their causal mask as attn.bias, [1, 1, n, n]; no bias of a layer has four dimensions.
    return info.name.endswith(("attn.bias", "attention.bias")) and len(info.shape) == 4


def _scaled_weight(checkpoint: Checkpoint, name: str) -> str | None:
    for suffix in fp8.SCALE_SUFFIXES:
        owner = checkpoint.tensors.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if owner is not None and owner.dtype in dtypes.FP8:
            return owner.name
    return None


def _packed_weight(checkpoint: Checkpoint, name: str) -> str | None:
    """The packed tensor that this one belongs to, or None."""
    match = BITSANDBYTES.search(name)
    if match is not None:
        return name[: match.start()] + ".weight"
    stem, _, leaf = name.rpartition(".")
    packed = f"{stem}.{PACKED_PARTS[leaf]}" if leaf in PACKED_PARTS else None
    if packed in checkpoint.tensors:
        return packed
    # Scales, zero points and MXFP4 scales that stand beside a weight of integers.
    for suffix in (*fp8.SCALE_SUFFIXES, "_zero_point", "_scale_2"):
        owner = checkpoint.tensors.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if owner is not None and owner.dtype in dtypes.INTEGER:
            return owner.name
    return None


def packed_counterpart(checkpoint: Checkpoint, name: str) -> str | None:
    """Where this checkpoint holds weight ``name`` packed, or None."""
    stem, _, leaf = name.rpartition(".")
    candidates = [f"{stem}.{packed}" for packed in PACKED_WEIGHT] if leaf == "weight" else [f"{name}_blocks"]
    return next((candidate for candidate in candidates if candidate in checkpoint.tensors), None)
