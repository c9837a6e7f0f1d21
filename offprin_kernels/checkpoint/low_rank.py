"""The merged rows of an adapted weight, ``W + scaling * B @ A``, and which way round its factors lie.

The product is made for blocks of rows at fixed places, so that a row's numbers do not depend on the rows that are asked
for with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import numerics
from . import dtypes
from .adapter_config import CONFIG, MERGE, scaling
from .errors import CheckpointError
from .rows import Rows, TensorInfo
from .storage import Files, Slab

if TYPE_CHECKING:
    from .reader import Checkpoint

BLOCK = 256  # rows of one product
# transformers' Conv1D, a linear layer whose weight is stored as (in, out): the models and the names under which it is.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


class Of:
    """Rows of a tensor of another checkpoint, the base or the adapter's file."""

    def __init__(self, checkpoint: Checkpoint, stored: str) -> None:
        self.checkpoint, self.stored = checkpoint, stored

    def read(self, files: Files, info: TensorInfo, start: int, stop: int, slab: Slab | None) -> torch.Tensor:
        return self.checkpoint.read(self.stored, start, stop, slab=slab)

    def whole(self) -> torch.Tensor:
        return numerics.to_fp32(self.checkpoint.read(self.stored))


class LowRank:
    """Rows of below + scaling * left @ right; of a transposed weight both factors are stored transposed."""

    def __init__(self, below: Rows, left: Of, right: Of, transposed: bool, scaling: float) -> None:
        self.below, self.left, self.right = below, left, right
        self.transposed, self.scaling = transposed, scaling

    def read(self, files: Files, info: TensorInfo, start: int, stop: int, slab: Slab | None) -> torch.Tensor:
        dtype, columns = dtypes.TORCH[info.dtype], info.columns
        nbytes = (stop - start) * columns * dtypes.BITS[info.dtype] // 8
        memory = torch.empty(nbytes, dtype=torch.uint8) if slab is None else slab.take(nbytes)
        out = memory.view(dtype).view(stop - start, columns)
        left, right = self.left.whole(), self.right.whole()
        if self.transposed:
            left, right = left.t().contiguous(), right.t().contiguous()
        # Whole blocks at multiples of BLOCK, whatever part of them is asked for.
        for block in range(start // BLOCK * BLOCK, stop, BLOCK):
            update = (left[block : block + BLOCK] @ right).mul_(self.scaling)
            low, high = max(start, block), min(stop, block + BLOCK)
            merged = update[low - block : high - block]
            merged += numerics.to_fp32(self.below.read(files, info, low, high, None))
            # PyTorch's rounding on the CPU is to nearest even; a test holds it to numerics.round_to_bf16_codes.
            out[low - start : high - start].copy_(merged)
        return out


def conv1d_names(base: Checkpoint) -> frozenset[str]:
    """Names of the base's modules whose weights are stored transposed; peft looks at their class, not at the config."""
    configs = (base.config, *(part for part in base.config.values() if isinstance(part, dict)))
    if any(config.get("model_type") in CONV1D_MODELS for config in configs):
        return CONV1D_NAMES
    for name, info in base.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module.rpartition(".")[2] in CONV1D_NAMES and len(info.shape) == 2:
            bias = base.tensors.get(f"{module}.bias")
            # Without a config its own biases tell: as long as its rows are, and not as many as these.
            if bias is not None and bias.shape == info.shape[1:] and info.shape[0] != info.shape[1]:
                return CONV1D_NAMES
    return frozenset()


def low_rank(
    path: Path,
    config: Mapping[str, object],
    module: str,
    found: Mapping[str, str],
    factors: Checkpoint,
    weight: TensorInfo,
    below: Rows,
    conv1d: frozenset[str],
) -> LowRank:
    """The rows of one adapted weight; ``found`` are the stored names of its factors.

    Raises:
        CheckpointError: factors that are incomplete, of another shape than the weight or of a dtype without numbers.
    """
    if set(found) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
        raise CheckpointError(f"{path} holds one factor of module {module} and not the other; copy this file again")
    embedding = "embedding_A" in found
    one, two = (factors.tensors[found[side]] for side in sorted(found))
    shapes = {False: (two.shape[:1] + one.shape[1:]), True: (one.shape[1:] + two.shape[:1])}
    matrices = len(weight.shape) == len(one.shape) == len(two.shape) == 2 and one.shape[0] == two.shape[1]
    transposed = embedding or module.rpartition(".")[2] in conv1d
    if config.get("fan_in_fan_out") and matrices and not transposed and not conv1d:
        # Of a class that is not known here: its shape tells, unless it is square.
        if shapes[False] == shapes[True]:
            raise CheckpointError(
                f"{path.parent / CONFIG} sets fan_in_fan_out, and the square {weight.name} of the base does not show "
                f"whether it is stored transposed; {MERGE}"
            )
        transposed = weight.shape == shapes[True]
    if not matrices or weight.shape != shapes[transposed]:
        raise CheckpointError(
            f"{path}: A {list(one.shape)} and B {list(two.shape)} of module {module} do not fit {weight.name} "
            f"of shape {list(weight.shape)}; give the base of this adapter"
        )
    for info in (one, two):
        if info.dtype not in dtypes.COMPARABLE:
            raise CheckpointError(f"{path}: {info.name} has dtype {info.dtype}; save the adapter as fp32 or bf16")
    if weight.dtype not in dtypes.COMPARABLE:
        raise CheckpointError(
            f"{path} adapts {weight.name}, whose dtype {weight.dtype} takes no update; "
            f"give the base in bf16, fp16 or fp32"
        )
    scale = scaling(path.parent / CONFIG, config, module, one.shape[0])
    # Rows of the update come from the left factor: B of a linear layer, A transposed of an embedding or a Conv1D.
    order = (one.name, two.name) if transposed else (two.name, one.name)
    return LowRank(below, Of(factors, order[0]), Of(factors, order[1]), transposed, scale)
