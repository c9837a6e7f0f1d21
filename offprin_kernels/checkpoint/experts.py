"""Experts stored one by one against experts stored as one tensor per layer: the same rows under other names.

The fused layout that is matched is that of transformers 5: ``gate_up_proj`` [experts, 2 x intermediate, hidden], gate
rows first, and ``down_proj`` [experts, hidden, intermediate]. Other layouts are recognised and refused.
"""

from __future__ import annotations

import re
from collections import defaultdict

from . import names
from .ledger import Status, TensorRef
from .side import Match, Side

SPLIT = re.compile(
    r"(?P<stem>(?:.*\.)?experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
FUSED = re.compile(r"(?P<stem>(?:.*\.)?experts)\.(?P<part>gate_up_proj|down_proj)(?:\.weight)?")
PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
HOLDS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
# transformers stores these as [experts, 2 x intermediate, hidden], gate rows first, square ones too.
# fmt: off
KNOWN_LAYOUT = frozenset({
    "afmoe", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
    "jamba", "lfm2_moe", "longcat_flash", "minimax", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "solar_open",
})
# fmt: on
REMEDY = "save both in the same layout"


def match_experts(base: Side, tuned: Side) -> list[Match]:
    """Matches by row ranges; what cannot be matched for a known reason is settled as refused on both sides."""
    matches: list[Match] = []
    for fused_side, split_side in ((base, tuned), (tuned, base)):
        groups: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
        for name in split_side.open:
            found = SPLIT.fullmatch(name)
            if found:
                groups[names.canonical(found["stem"])][PARTS[found["part"]]][int(found["expert"])] = name
        for name in list(fused_side.open):
            found = FUSED.fullmatch(name)
            if found and names.canonical(found["stem"]) in groups:
                group = groups[names.canonical(found["stem"])]
                members = {part: group[part] for part in HOLDS[found["part"]]}
                if any(members.values()):
                    matches += _match_fused(fused_side, name, split_side, members)
    return matches


def _match_fused(fused_side: Side, fused: str, split_side: Side, parts: dict[str, dict[int, str]]) -> list[Match]:
    reason = _refusal(fused_side, fused, split_side, parts)
    if reason:
        members = [name for experts in parts.values() for name in experts.values()]
        where = f"{split_side.label} holds each expert apart (such as {members[0]}), {fused_side.label} all in {fused}"
        fused_side.settle(fused, Status.REFUSED, _pattern(members), f"{where}: {reason}")
        for name in members:
            split_side.settle(name, Status.REFUSED, fused, f"{where}: {reason}")
        return []
    whole = fused_side.ref(fused)
    assert whole is not None
    note = f"{fused_side.label}'s {fused} holds all experts; matched by rows"
    experts, rows = whole.shape[0], whole.shape[1] // len(parts)
    matches = []
    everything = _pattern([name for members in parts.values() for name in members.values()])
    for expert in range(experts):
        for position, singles in enumerate(parts.values()):
            single = split_side.ref(singles[expert])
            assert single is not None
            start = (expert * len(parts) + position) * rows
            part = TensorRef(fused, whole.dtype, whole.shape, start, rows, whole.columns, whole.scale)
            if fused_side.label == "base":
                # Named as one expert under the base's own prefix, so that the name is the same for every tuned run.
                own = singles[expert]
                name = fused[: fused.index("experts")] + own[own.index("experts") :]
                matches.append(Match(name, part, single, everything, fused, note, False))
            else:
                matches.append(Match(singles[expert], single, part, fused, everything, note, False))
    return matches


def _pattern(members: list[str]) -> str:
    """One name for many: the expert's number and, where they differ, the projections are set open."""
    found = [SPLIT.fullmatch(name) for name in members]
    parts = list(dict.fromkeys(match["part"] for match in found if match))
    stem = members[0][: members[0].index("experts")] + "experts"
    return f"{stem}.*.{parts[0] if len(parts) == 1 else '{' + ','.join(parts) + '}'}.weight"


def _refusal(fused_side: Side, fused: str, split_side: Side, parts: dict[str, dict[int, str]]) -> str:
    """Why these cannot be matched by rows, or an empty string."""
    whole = fused_side.ref(fused)
    if whole is None:
        return fused_side.roles[fused].reason
    for members in parts.values():
        for name in members.values():
            if split_side.ref(name) is None:
                return f"{name}: {split_side.roles[name].reason}"
    if len(whole.shape) != 3:
        return f"shape {list(whole.shape)} is not [experts, rows, columns]; {REMEDY}"
    for part, members in parts.items():
        if sorted(members) != list(range(whole.shape[0])):
            return f"{whole.shape[0]} experts against {len(members)} {part} projections; get the complete checkpoint"
    shapes = {split_side.checkpoint.tensors[name].shape for members in parts.values() for name in members.values()}
    if len(shapes) != 1:
        return f"the single experts differ in shape ({', '.join(str(list(shape)) for shape in sorted(shapes))})"
    shape = shapes.pop()
    if len(shape) != 2:
        return f"a single expert of shape {list(shape)} is not a matrix"
    if f"{fused}_bias" in fused_side.checkpoint.tensors:
        return f"fused with biases, as GPT-OSS interleaves gate and up rows; {REMEDY}"
    rows, columns = shape[0] * len(parts), shape[1]
    straight = whole.shape[1:] == (rows, columns)
    transposed = whole.shape[1:] == (columns, rows)
    if straight and transposed and not any(_known(side) for side in (fused_side, split_side)):
        return f"square, so that the orientation is ambiguous; {REMEDY}, or add config.json with its model_type"
    if straight:
        return ""
    if transposed:
        return f"the fused tensor {list(whole.shape)} is transposed (or interleaved) against {list(shape)}; {REMEDY}"
    return f"shapes {list(whole.shape)} and {list(shape)} do not fit together"


def _known(side: Side) -> bool:
    config = side.checkpoint.config
    inner = config.get("text_config")
    found = {config.get("model_type"), inner.get("model_type") if isinstance(inner, dict) else None}
    return any(isinstance(item, str) and item in KNOWN_LAYOUT for item in found)
