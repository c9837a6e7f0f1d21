"""LoRA adapters (peft): ``adapter_config.json`` and the factors, read as the model that merging them would give.

A targeted weight is ``W + scaling * B @ A``: fp32 product, added in fp32 to the base's weight, rounded once, to nearest
even, to the base's dtype. peft's ``merge_and_unload`` does the same where its factors are fp32, as it loads them by
default; with bf16 factors it rounds the update to bf16 before it adds it, and can then differ in the last bit (more
where base and update cancel). Tensors that the adapter leaves alone are the base's own.

Source: LoRA, arXiv 2106.09685, section 4.1; rank-stabilised scaling, arXiv 2312.03732.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING

from . import adapter_config, hub, names
from .adapter_config import CONFIG, MERGE
from .errors import CheckpointError
from .json_file import load_json
from .low_rank import Of, conv1d_names, low_rank
from .rows import Contents, Rows, TensorInfo
from .storage import FileInfo, file_info
from .torch_file import sharing

if TYPE_CHECKING:
    from .reader import Checkpoint

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)
OTHER_LORA = re.compile(r"\.(?:lora_|token_adapter|trainable_tokens)")
# A whole tensor that takes the place of the base's: the wrapper parts of its name, with and without the adapter's name.
REPLACED = tuple(
    re.compile(rf"\.(?:modules_to_save{name}|original_module|base_layer)(?=\.)") for name in (r"(?:\.[^.]+(?=\.))?", "")
)
# Heads that a base may lack, and whose rows (as those of embeddings) another task may count otherwise.
TASK_HEADS = frozenset({"score", "classifier", "qa_outputs", "v_head", "value_head", "summary"})


def load(root: Path, factors: Checkpoint, base: Checkpoint) -> Contents:
    """The merged model of an adapter's directory, its own tensors and its base.

    Raises:
        CheckpointError: an adapter of another kind than LoRA, a setting that changes the update in a way that is not
            computed here, or factors that do not fit the base.
    """
    config = load_json(root / CONFIG)
    adapter_config.check(root, config)
    path = factors.files[0].path
    resolve = _Names(base)
    pairs, replacements = _sort(path, factors, resolve)
    files: tuple[FileInfo, ...] = (*base.files, *factors.files, file_info(root / CONFIG, "peft"))
    tensors: dict[str, tuple[TensorInfo, Rows]] = {name: (info, Of(base, name)) for name, info in base.tensors.items()}
    changed: dict[str, str] = {}
    for name, stored in replacements.items():
        own = factors.tensors[stored]
        known = resolve(name) or name
        _claim(path, changed, known, stored)
        _check_shape(path, own, tensors[known][0] if known in tensors else None, _is_outer(known))
        info = TensorInfo(known, own.dtype, own.shape, own.nbytes, len(base.files) + own.file, own.offset)
        tensors[known] = info, Of(factors, stored)
    conv1d = conv1d_names(base)
    adapted = set()
    for module, found in pairs.items():
        known = resolve(f"{module}.weight") or ""
        if not known:
            _refuse_unknown(path, base, module)
        # peft saves embeddings that it adapts whole, beside their factors, which then come on top.
        if ".base_layer." not in changed.get(known, ""):
            _claim(path, changed, known, module)
        info, below = tensors[known]
        tensors[known] = info, low_rank(path, config, module, found, factors, info, below, conv1d)
        adapted.add(known)
    ended = _ended_sharing(path, base, changed)
    notes = [
        *(note for note in base.notes if note not in ended),
        f"{root.name} is an adapter on {base.source}: {len(pairs)} weights merged in fp32 and rounded to the base's "
        f"dtype, {len(replacements)} tensors are the adapter's own, {len(tensors) - len(changed)} the base's",
        *_doubts(root, config, base),
        *_missing(root, config, base, changed, adapted),
        *_strange(root, path, base, changed, adapted),
    ]
    aliases = {name: first for name, first in base.aliases.items() if sharing(name, first) not in ended}
    return Contents(files, list(tensors.values()), [], notes, aliases, base.config)


def _sort(path: Path, factors: Checkpoint, resolve: _Names) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
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
            # Without the adapter's name only where the base says so: modules_to_save.default or a module inside.
            options = [pattern.sub("", name) for pattern in REPLACED]
            whole = next((option for option in options if resolve(option)), options[0])
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


def _kind(name: str) -> str | None:
    """What an outermost parameter belongs to, "embedding" or "head"; None for every other."""
    layer, kind = names.describe(f"{name.rpartition('.')[0]}.weight")
    return kind if layer is None and kind in ("embedding", "head") else None


def _is_outer(name: str) -> bool:
    """Whether a tensor belongs to an embedding or a head, of which a new vocabulary or task changes the rows."""
    return _kind(name) is not None or not TASK_HEADS.isdisjoint(name.split("."))


def _check_shape(path: Path, own: TensorInfo, before: TensorInfo | None, outer: bool) -> None:
    if before is None or own.shape == before.shape:
        return
    if not outer or len(own.shape) != len(before.shape) or own.shape[1:] != before.shape[1:]:
        raise CheckpointError(
            f"{path} holds {own.name} of shape {list(own.shape)} in place of {before.name} of shape "
            f"{list(before.shape)}; give the base of this adapter"
        )


def _refuse_unknown(path: Path, base: Checkpoint, module: str) -> None:
    kind = _kind(f"{module}.weight")
    other = next((name for name in base.tensors if kind and _kind(name) not in (None, kind)), None)
    if other and _says_tied(base) is not False:
        raise CheckpointError(
            f"{path} adapts {module}, and {base.source} stores {other} alone, to which it is tied: adapting one of the "
            f"two changes both or parts them, as peft decides; {MERGE}"
        )
    raise CheckpointError(
        f"{path} adapts module {module}, and {base.source} has no {module}.weight; give the base of this adapter"
    )


def _says_tied(base: Checkpoint) -> bool | None:
    """What the config says about ``tie_word_embeddings``, the text model's included; True where either does."""
    configs = [config for config in (base.config, base.config.get("text_config")) if isinstance(config, dict)]
    said = [config.get("tie_word_embeddings") for config in configs]
    return True if True in said else False if False in said else None


def _ended_sharing(path: Path, base: Checkpoint, changed: Mapping[str, str]) -> set[str]:
    """Notes on shared bytes that hold no more, where a config says that head and embedding are two.

    Raises:
        CheckpointError: one of two names of a tied or shared weight is changed, which would part them unseen.
    """
    from .tied import identical  # which imports the reader, which imports this

    said, shared = _says_tied(base), dict(base.aliases)
    outer = {
        kind: [n for n in base.tensors if n.endswith("weight") and _kind(n) == kind] for kind in ("embedding", "head")
    }
    for embedding in outer["embedding"]:
        for head in outer["head"]:
            parted = (embedding in changed) != (head in changed)
            if parted and (said or (said is None and identical(base, embedding, head))):
                shared[head] = embedding
    ended = set()
    for name, first in shared.items():
        if (name in changed) == (first in changed):
            if name in changed:
                ended.add(sharing(name, first))
            continue
        if said is False and {_kind(name), _kind(first)} == {"embedding", "head"}:
            ended.add(sharing(name, first))
            continue
        one, other = (name, first) if name in changed else (first, name)
        remedy = ", or where they are two let the base's config.json say tie_word_embeddings: false"
        raise CheckpointError(
            f"{path} changes {one}, which {base.source} ties to another tensor that it also stores, {other}; "
            f"{MERGE}{remedy if said is None else ''}"
        )
    return ended


def _doubts(root: Path, config: Mapping[str, object], base: Checkpoint) -> list[str]:
    """What a reader should look at: a base of another name or of another revision."""
    stated = adapter_config.base_name(root)
    if stated is None:
        return []
    last = stated.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    known = {part.lower() for place in (base.source, str(base.root), str(base.config.get("_name_or_path", "")))
             for part in re.split(r"[/@]|--", place)}  # fmt: skip
    if last not in known:
        return [f"{CONFIG} of {root.name} names {stated} as its base; {base.source} was used"]
    revision, used = adapter_config.base_revision(root), _revision_of(base)
    if os.path.exists(os.path.expanduser(stated)) or (revision is None and used is None):
        return []
    if used in (revision or "main", commit_of(stated, revision)):
        return []
    which = f"revision {revision}" if revision else "the default revision"
    where = f"which is {used}" if used else "whose revision is unknown"
    return [f"{CONFIG} of {root.name} names {which} of {stated} as its base; {base.source} was used, {where}"]


def _revision_of(base: Checkpoint) -> str | None:
    """The commit of a base from the hub's cache, opened by its name or by its path."""
    if base.revision is not None:
        return base.revision
    root = base.root.absolute()
    return root.name if root.parent.name == "snapshots" else None


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a hub id is in the local cache; None where it is not there."""
    try:
        return hub.resolve(f"{name}@{revision}" if revision else name, download=False)[1]
    except CheckpointError:
        return None


def _missing(
    root: Path, config: Mapping[str, object], base: Checkpoint, changed: Mapping[str, str], adapted: Set[str]
) -> list[str]:
    """Says where the config names tensors to be trained for which the adapter holds nothing."""
    modules = {
        name.removesuffix(".weight"): name
        for name, info in base.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
    # Experts that the model fuses have no modules of their own, whatever names their tensors are stored under.
    experts = any(names.EXPERT.search(name) for name in adapted)
    lost = [
        modules[module]
        for module in adapter_config.targeted(root / CONFIG, config, modules)
        if modules[module] not in adapted and (experts or not names.EXPERT.search(module))
    ]
    lost += [
        name
        for name in base.tensors
        if name not in changed and adapter_config.kept_whole(config, name.rpartition(".")[0])
    ]
    if not lost:
        return []
    return [
        f"{CONFIG} of {root.name} names what was trained, and the adapter holds nothing for {len(lost)} tensors of it "
        f"({lost[0]}{', ...' if len(lost) > 1 else ''}); check that it is complete"
    ]


def _strange(root: Path, path: Path, base: Checkpoint, changed: Mapping[str, str], adapted: Set[str]) -> list[str]:
    """Tensors that the base has no place for, an embedding that leaves its tied head behind, weights beside these."""
    notes = [
        f"{path.name} holds {stored}, which {base.source} lacks; it was added as {name}"
        for name, stored in changed.items()
        if name not in base.tensors and not _is_outer(name)
    ]
    whole = next((name for name in changed if _kind(name) == "embedding" and name not in adapted), None)
    if whole and _says_tied(base) is not False and not any(_kind(n) == "head" for n in (*base.tensors, *changed)):
        notes.append(
            f"{whole} was trained as a copy of its own: peft's merge leaves a head that is tied to it as it was, and "
            f"no head is stored here to be compared"
        )
    beside = sorted(item.name for item in root.glob("*.safetensors") if item.name not in WEIGHTS)
    return notes + [f"{name} lies beside the adapter and was not read" for name in beside]
