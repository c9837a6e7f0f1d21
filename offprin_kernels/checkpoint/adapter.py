"""LoRA adapters (peft): ``adapter_config.json`` and the factors, read as the model that merging them would give.

A targeted weight is ``W + scaling * B @ A``: fp32 product, added in fp32 to the base's weight, rounded once, to nearest
even, to the base's dtype. peft's ``merge_and_unload`` does the same where its factors are fp32, as it loads them by
default; with bf16 factors it rounds the update to bf16 before it adds it, and can then differ in the last bit (more
where base and update cancel). The product is made for blocks of rows at fixed places, so that a row's numbers do not
depend on the rows that are asked for with it. Tensors that the adapter leaves alone are the base's own.

Source: LoRA, arXiv 2106.09685, section 4.1; rank-stabilised scaling, arXiv 2312.03732.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import numerics
from . import dtypes, names
from .errors import CheckpointError
from .json_file import load_json
from .rows import Contents, Rows, TensorInfo
from .storage import FileInfo, Files, Slab, file_info

if TYPE_CHECKING:
    from .reader import Checkpoint

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
BLOCK = 256  # rows of one product
FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)
OTHER_LORA = re.compile(r"\.(?:lora_|token_adapter|trainable_tokens)")
# A whole tensor that takes the place of the base's: the wrapper parts of its name.
REPLACED = re.compile(r"\.(?:modules_to_save(?:\.[^.]+(?=\.(?:weight|bias)$))?|original_module|base_layer)(?=\.)")
MERGE = "merge it first with merge_and_unload and save_pretrained"
# Settings that change what merging would give, and that are not computed here.
UNSUPPORTED = {
    "use_dora": "DoRA also rescales every column by a trained magnitude",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "its factors are block-diagonal",
    "lora_bias": "its factors have biases of their own",
    "fan_in_fan_out": "its weights are stored transposed",
    "target_parameters": "its factors belong to parameters and not to linear modules",
    "trainable_token_indices": "it also trains single rows of the embedding",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "arrow_config": "Arrow chooses among adapters token by token",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "its layers are Megatron's",
}
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # the base is left as it is


def base_name(root: Path) -> str | None:
    """``base_model_name_or_path`` of an adapter, or None where it names none."""
    name = load_json(root / CONFIG).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def load(root: Path, factors: Checkpoint, base: Checkpoint) -> Contents:
    """The merged model of an adapter's directory, its own tensors and its base.

    Raises:
        CheckpointError: an adapter of another kind than LoRA, a setting that changes the update in a way that is not
            computed here, or factors that do not fit the base.
    """
    config = load_json(root / CONFIG)
    _check_config(root, config)
    path = factors.files[0].path
    pairs, replacements = _sort(path, factors)
    files: tuple[FileInfo, ...] = (*base.files, *factors.files, file_info(root / CONFIG, "peft"))
    resolve = _Names(base)
    tensors: dict[str, tuple[TensorInfo, Rows]] = {name: (info, _Of(base, name)) for name, info in base.tensors.items()}
    changed: dict[str, str] = {}
    for name, stored in replacements.items():
        own = factors.tensors[stored]
        known = resolve(name) or name
        _claim(path, changed, known, stored)
        info = TensorInfo(known, own.dtype, own.shape, own.nbytes, len(base.files) + own.file, own.offset)
        tensors[known] = info, _Of(factors, stored)
    for module, found in pairs.items():
        known = resolve(f"{module}.weight") or ""
        if not known:
            raise CheckpointError(
                f"{path} adapts module {module}, and {base.source} has no {module}.weight; "
                f"give the base of this adapter"
            )
        # peft saves embeddings that it adapts whole, beside their factors, which then come on top.
        if ".base_layer." not in changed.get(known, ""):
            _claim(path, changed, known, module)
        info, below = tensors[known]
        tensors[known] = info, _low_rank(path, config, module, found, factors, info, below)
    _check_tied(path, base, changed)
    notes = [
        *base.notes,
        f"{root.name} is an adapter on {base.source}: {len(pairs)} weights merged in fp32 and rounded to the base's "
        f"dtype, {len(replacements)} tensors are the adapter's own, {len(tensors) - len(changed)} the base's",
        *_doubts(root, config, base),
    ]
    # Names that shared their bytes in the base's file no longer do where one of them is changed.
    aliases = {name: first for name, first in base.aliases.items() if name not in changed and first not in changed}
    return Contents(files, list(tensors.values()), [], notes, aliases, base.config)


def _check_config(root: Path, config: Mapping[str, object]) -> None:
    path = root / CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path} describes an adapter of type {kind}, of which only LORA is read; {MERGE}")
    for setting, reason in UNSUPPORTED.items():
        if config.get(setting):
            raise CheckpointError(f"{path} sets {setting}: {reason}, which is not computed here; {MERGE}")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise CheckpointError(
            f"{path} says init_lora_weights={start!r}: such an adapter was made on a changed base (its residual) and "
            f"not on the model that it names; save it with path_initial_model_for_weight_conversion in peft's "
            f"save_pretrained, which makes it a plain LoRA, or {MERGE}"
        )
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{path} sets bias={bias!r}, which is unknown here; {MERGE}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(f"{path} has a {name} that is no object; copy this file again")


def _sort(path: Path, factors: Checkpoint) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Module -> "A" and "B" (or "embedding_A" ...) -> stored name; and tensor -> stored name of its replacement."""
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    replacements: dict[str, str] = {}
    for stored in factors.tensors:
        name = stored.removeprefix("base_model.model.")
        found = FACTOR.fullmatch(name)
        if found:
            module, side = found["module"].removesuffix(".base_layer"), (found["embedding"] or "") + found["side"]
            if side in pairs[module]:
                raise CheckpointError(f"{path} holds two adapters for module {module}; save the one to be compared")
            pairs[module][side] = stored
        elif OTHER_LORA.search(f".{name}"):
            raise CheckpointError(f"{path} holds {stored}, which plain LoRA has no use for; {MERGE}")
        else:
            whole = REPLACED.sub("", name)
            if whole in replacements:
                raise CheckpointError(f"{path} holds {stored} and {replacements[whole]}; save the one to be compared")
            replacements[whole] = stored
    return pairs, replacements


class _Names:
    """Stored names of a base: as the adapter says them, or the only one that is equal without wrapper prefixes."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.canonical: dict[str, list[str]] = defaultdict(list)
        for name in base.tensors:
            self.canonical[names.canonical(name)].append(name)

    def __call__(self, name: str) -> str | None:
        if name in self.base.tensors:
            return name
        found = self.canonical.get(names.canonical(name), [])
        return found[0] if len(found) == 1 else None


def _claim(path: Path, changed: dict[str, str], name: str, by: str) -> None:
    if name in changed:
        raise CheckpointError(f"{path} changes tensor {name} twice, as {changed[name]} and {by}; {MERGE}")
    changed[name] = by


def _low_rank(
    path: Path,
    config: Mapping[str, object],
    module: str,
    found: Mapping[str, str],
    factors: Checkpoint,
    weight: TensorInfo,
    below: Rows,
) -> _LowRank:
    if set(found) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
        raise CheckpointError(f"{path} holds one factor of module {module} and not the other; copy this file again")
    embedding = "embedding_A" in found
    one, two = (factors.tensors[found[side]] for side in sorted(found))
    # Rows of the update come from the left factor: B of a linear layer, A transposed of an embedding.
    fits = (
        len(weight.shape) == len(one.shape) == len(two.shape) == 2
        and one.shape[0] == two.shape[1]
        and weight.shape == ((one.shape[1], two.shape[0]) if embedding else (two.shape[0], one.shape[1]))
    )
    if not fits:
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
    scaling = _scaling(path.parent / CONFIG, config, module, one.shape[0])
    # Of an embedding A's columns are the rows: both factors are transposed and change places.
    order = ("embedding_A", "embedding_B") if embedding else ("B", "A")
    left, right = (_Of(factors, found[side]) for side in order)
    return _LowRank(below, left, right, embedding, scaling)


def _scaling(path: Path, config: Mapping[str, object], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), with the patterns that apply to this module; r must be the factors' own."""
    values = []
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        patterns = config.get(pattern) or {}
        assert isinstance(patterns, dict)
        value = config.get(default, 8)
        for key in patterns:
            try:
                # As peft matches them: the whole name, or its end from a dot on.
                if re.match(rf"(.*\.)?({key})$", module):
                    value = patterns[key]
                    break
            except re.error as error:
                raise CheckpointError(f"{path}: {pattern} {key!r} is no regular expression ({error})") from None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{path} gives {default} = {value!r} for module {module}, which is no number")
        values.append(value)
    stated, alpha = values
    if stated != rank:
        raise CheckpointError(f"{path} says rank {stated} for module {module}, whose factors have {rank}; {MERGE}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_tied(path: Path, base: Checkpoint, changed: Mapping[str, str]) -> None:
    """A head tied to its embedding is one weight: changing one stored copy of two would untie them unseen."""
    inner = base.config.get("text_config")
    tied = any(isinstance(c, dict) and c.get("tie_word_embeddings") is True for c in (base.config, inner))
    outer = {
        kind: [n for n in base.tensors if n.endswith("weight") and names.describe(n) == (None, kind)]
        for kind in ("embedding", "head")
    }
    both = outer["embedding"] + outer["head"]
    if tied and all(outer.values()) and sum(name in changed for name in both) == 1:
        name = next(name for name in both if name in changed)
        raise CheckpointError(
            f"{path} changes {name}, which {base.source} ties to another tensor that it also stores; {MERGE}"
        )


def _doubts(root: Path, config: Mapping[str, object], base: Checkpoint) -> list[str]:
    """What a reader should look at: a base of another name, and settings that are younger than this code."""
    stated = config.get("base_model_name_or_path")
    notes = []
    if isinstance(stated, str) and stated:
        last = stated.rstrip("/").rpartition("/")[2].lower()
        known = {part.lower() for place in (base.source, str(base.root), str(base.config.get("_name_or_path", "")))
                 for part in re.split(r"[/@]|--", place)}  # fmt: skip
        if last not in known:
            notes.append(f"{CONFIG} of {root.name} names {stated} as its base; {base.source} was used")
    return notes


class _Of:
    """Rows of a tensor of another checkpoint, the base or the adapter's file."""

    def __init__(self, checkpoint: Checkpoint, stored: str) -> None:
        self.checkpoint, self.stored = checkpoint, stored

    def read(self, files: Files, info: TensorInfo, start: int, stop: int, slab: Slab | None) -> torch.Tensor:
        return self.checkpoint.read(self.stored, start, stop, slab=slab)

    def whole(self) -> torch.Tensor:
        return numerics.to_fp32(self.checkpoint.read(self.stored))


class _LowRank:
    """Rows of below + scaling * left @ right; of an embedding both factors are stored transposed."""

    def __init__(self, below: Rows, left: _Of, right: _Of, transposed: bool, scaling: float) -> None:
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
