"""What ``adapter_config.json`` says: the base, settings that are not computed here, scaling, and what was trained."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from .errors import CheckpointError
from .json_file import load_json

CONFIG = "adapter_config.json"
MERGE = "merge it first with merge_and_unload and save_pretrained"
# Settings that change what merging would give, and that are not computed here.
UNSUPPORTED = {
    "use_dora": "DoRA also rescales every column by a trained magnitude",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "its factors are block-diagonal",
    "lora_bias": "its factors have biases of their own",
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


def base_revision(root: Path) -> str | None:
    """``revision``, which is the base's and not the adapter's; None where it is the default or the base is a path."""
    revision, name = load_json(root / CONFIG).get("revision"), base_name(root)
    if revision is None or name is None or "@" in name or os.path.exists(os.path.expanduser(name)):
        return None
    if not isinstance(revision, str):
        raise CheckpointError(f"{root / CONFIG} gives the revision of its base as {revision!r:.80}, which is no text")
    return revision or None


def base_source(root: Path) -> str | None:
    """The base as ``Checkpoint.open`` takes it, with its revision; None where the adapter names none."""
    name, revision = base_name(root), base_revision(root)
    return f"{name}@{revision}" if revision else name


def check(root: Path, config: Mapping[str, object]) -> None:
    """Raises CheckpointError for another kind than LoRA and for settings that are not computed here."""
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


def scaling(path: Path, config: Mapping[str, object], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), with the patterns that apply to this module; r must be the factors' own."""
    values = []
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        patterns = config.get(pattern) or {}
        assert isinstance(patterns, dict)
        value = config.get(default, 8)
        for key in patterns:
            # As peft matches them: the whole name, or its end from a dot on.
            if _matches(path, pattern, key, rf"(.*\.)?({key})$", module):
                value = patterns[key]
                break
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{path} gives {default} = {value!r} for module {module}, which is no number")
        values.append(value)
    stated, alpha = values
    if stated != rank:
        raise CheckpointError(f"{path} says rank {stated} for module {module}, whose factors have {rank}; {MERGE}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def targeted(path: Path, config: Mapping[str, object], modules: Iterable[str]) -> list[str]:
    """Those of the modules that ``target_modules`` matches as peft does; none where the config does not name them."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return []
        return [
            module
            for module in modules
            if _matches(path, "target_modules", targets, rf"(?:{targets})\Z", module)
            and not _left_out(path, config, module)
        ]
    named, found = _names(targets), []
    for module in modules:
        # Layers are chosen only among modules that are named by their ends.
        if module not in named and (
            named.isdisjoint(_ends(module)) or not (layers in (None, []) or _in_layers(path, config, module))
        ):
            continue
        if not _left_out(path, config, module):
            found.append(module)
    return found


def kept_whole(config: Mapping[str, object], module: str) -> bool:
    """Whether ``modules_to_save`` names a module or one that it is inside of."""
    named = _names(config.get("modules_to_save"))
    if not named:
        return False
    parts = module.split(".")
    return any(not named.isdisjoint(_ends(".".join(parts[:stop]))) for stop in range(1, len(parts) + 1))


def _left_out(path: Path, config: Mapping[str, object], module: str) -> bool:
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str):
        if excluded and _matches(path, "exclude_modules", excluded, rf"(?:{excluded})\Z", module):
            return True
    elif not _names(excluded).isdisjoint(_ends(module)):
        return True
    return kept_whole(config, module)


def _in_layers(path: Path, config: Mapping[str, object], module: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    named = [patterns] if isinstance(patterns, str) and patterns else sorted(_names(patterns))
    for pattern in named or [r"[^.]*"]:
        before = r"(?:^|.*?\.)" if named else r".*?\."
        found = _matches(path, "layers_pattern", pattern, rf"{before}{pattern}\.(?P<layer>\d+)\.", module)
        if found:
            return int(found["layer"]) in (layers if isinstance(layers, list) else [layers])
    return False


def _names(value: object) -> set[str]:
    return {item for item in value if isinstance(item, str)} if isinstance(value, list | tuple) else set()


def _ends(module: str) -> Iterator[str]:
    """The name, and every end of it from a dot on."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def _matches(path: Path, setting: str, key: str, pattern: str, name: str) -> re.Match[str] | None:
    """The match of a pattern that was made from a setting's ``key``."""
    try:
        return re.match(pattern, name)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: {setting} {key!r} is no regular expression ({error})") from None
