"""Where a model keeps its attention: sizes from its config, tensors by name, and the refusal of what is not known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint import canonical

PLACE = re.compile(r"layers\.(?P<layer>\d+)\.self_attn\.(?P<rest>.+)")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
KNOWN = frozenset([f"{part}.{leaf}" for part in MATRICES for leaf in ("weight", "bias")])
KNOWN |= frozenset(f"{part}.weight" for part in NORMS)
# Position frequencies, the same for all heads, as old Llama checkpoints store them.
IGNORED = frozenset({"rotary_emb.inv_freq"})
DTYPES = ("BF16", "F16", "F32")
# Names alone do not tell what a forward does (gates, clamps, values shared across layers): each type here is tested.
# fmt: off
MODEL_TYPES = (
    "gemma2", "granite", "llama", "mistral", "mixtral", "olmo2", "olmo3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "seed_oss", "smollm3",
)
# fmt: on

Layout = Mapping[str, tuple[str, Sequence[int]]]  # name -> (dtype tag as safetensors spells it, shape)


@dataclass(frozen=True)
class Heads:
    """Sizes of grouped-query attention: query heads, key/value heads, size of one head."""

    query: int
    kv: int
    size: int

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query // self.kv

    def count(self, part: str) -> int:
        """Heads in the tensors of a module such as ``"v_proj"``."""
        return self.query if part in ("q_proj", "o_proj", "q_norm") else self.kv


def place(name: str) -> tuple[int, str, str] | None:
    """(layer, module, leaf) of an attention tensor, as in (3, "q_proj", "weight"); None for any other tensor."""
    found = PLACE.fullmatch(canonical(name))
    if found is None or found["rest"] not in KNOWN:
        return None
    part, leaf = found["rest"].split(".")
    return int(found["layer"]), part, leaf


def heads_of(config: Mapping[str, object]) -> Heads:
    """Sizes from ``config.json``. Raises ValueError where they are missing or do not fit together."""

    def size(key: str) -> int:
        value = config[key]
        if type(value) is not int or value < 1:
            raise ValueError(f"the config's {key} is {value!r}, which is no number of heads or coordinates")
        return value

    for key in ("num_attention_heads", "hidden_size"):
        if config.get(key) is None:
            raise ValueError(f"the config has no {key}; the model's own config.json is needed")
    query = size("num_attention_heads")
    kv = query if config.get("num_key_value_heads") is None else size("num_key_value_heads")
    if query % kv:
        raise ValueError(f"the config has {query} query heads, which {kv} key/value heads do not divide")
    return Heads(query, kv, size("hidden_size") // query if config.get("head_dim") is None else size("head_dim"))


def attention_layers(config: Mapping[str, object], layout: Layout) -> dict[int, dict[str, str]]:
    """For each layer with attention, its tensors' names by place: ``{3: {"q_proj.weight": name, ...}, ...}``.

    Raises:
        ValueError: no such attention, or one that is not known to keep its function; the tensor or type is named.
    """
    heads = heads_of(config)
    found: dict[int, dict[str, str]] = {}
    for name in layout:
        match = PLACE.fullmatch(canonical(name))
        if match is None or match["rest"] in IGNORED:
            continue
        if match["rest"] not in KNOWN:
            raise ValueError(
                f"tensor {name}: attention with {match['rest']} is not supported, only plain q_proj, k_proj, v_proj, "
                "o_proj (with biases) and q_norm, k_norm"
            )
        layer = found.setdefault(int(match["layer"]), {})
        if match["rest"] in layer:
            raise ValueError(f"tensors {layer[match['rest']]} and {name} are one and the same by name; keep one")
        layer[match["rest"]] = name
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"models of type {kind!r} are not supported; supported are {', '.join(MODEL_TYPES)}")
    if not found:
        raise ValueError("the model has no tensor of the form layers.N.self_attn.q_proj.weight")
    for number, layer in sorted(found.items()):
        for part in MATRICES:
            if f"{part}.weight" not in layer:
                raise ValueError(f"layer {number} has no {part}.weight; get the complete checkpoint")
        for name in layer.values():
            if layout[name][0] not in DTYPES:
                raise ValueError(
                    f"tensor {name} has dtype {layout[name][0]}; bf16, fp16 or fp32 is needed, unquantised"
                )
        for rest, name in layer.items():
            _check_shape(name, rest, tuple(layout[name][1]), heads, layout[layer["q_proj.weight"]][1][-1:])
    return dict(sorted(found.items()))


def _check_shape(name: str, rest: str, shape: tuple[int, ...], heads: Heads, hidden: Sequence[int]) -> None:
    part, leaf = rest.split(".")
    wide = heads.count(part) * heads.size
    if part in NORMS:
        allowed: list[tuple[int, ...]] = [(heads.size,), (wide,)]
    elif leaf == "bias":
        allowed = [(*hidden,)] if part == "o_proj" else [(wide,)]
    else:
        allowed = [(*hidden, wide)] if part == "o_proj" else [(wide, *hidden)]
    if shape not in allowed:
        raise ValueError(
            f"tensor {name} has shape {list(shape)}, and the config ({heads.query} query and {heads.kv} key/value "
            f"heads of {heads.size}) asks for {' or '.join(str(list(one)) for one in allowed)}"
        )


def choose_layers(wanted: Iterable[int] | None, available: Iterable[int]) -> tuple[int, ...]:
    """Sorted numbers of the layers asked for; None means all. Raises ValueError for one that the model lacks."""
    known = sorted(available)
    if wanted is None:
        return tuple(known)
    chosen = sorted(set(wanted))
    if not chosen:
        raise ValueError("no layers were asked for")
    missing = [number for number in chosen if number not in set(known)]
    if missing:
        raise ValueError(f"the model has no attention layer {missing[0]}; its {len(known)} are {ranges(known)}")
    return tuple(chosen)


def parse_layers(text: str) -> list[int] | None:
    """``"all"`` (None) or numbers and ranges, ``"3,5-7"``. Raises ValueError for anything else."""
    if text == "all":
        return None
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip(), re.ASCII)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f"--layers {text}: {part.strip()!r} is no layer; write all, or numbers as in 3,5-7")
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return numbers


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as a person writes them: ``3, 5-7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
