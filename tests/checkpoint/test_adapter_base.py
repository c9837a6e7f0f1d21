"""An adapter against its base: the base's revision, transposed weights, ties, and what is missing from the adapter."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offprin_kernels.checkpoint import Checkpoint, CheckpointError, adapter_config, pair

from .adapters import Q, changed, check_merged, make, peft, tensors, transformers
from .files import save

NORM = "base_model.model.model.norm.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make(folder, modules_to_save=["norm"])
    return folder


def rewritten(folder: Path, tmp_path: Path, change) -> Path:
    """A copy of the adapter with other tensors in it."""
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter", dirs_exist_ok=True)
    factors = load_file(adapter / "adapter_model.safetensors")
    save_file(change(factors), adapter / "adapter_model.safetensors")
    return adapter


@pytest.fixture
def cache(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of one model in the hub's cache; the default is another one than the adapter's."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    kept = tmp_path / "cache" / "models--org--kept"
    shutil.copytree(plain / "base", kept / "snapshots" / "aaaa")
    other = {name: tensor + 1 for name, tensor in tensors(plain / "base").items()}
    save(kept / "snapshots" / "bbbb", other)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("bbbb")
    (kept / "refs" / "tag").write_text("aaaa")
    return kept / "snapshots"


def test_the_revision_of_the_base_is_the_adapters(cache: Path, plain: Path, tmp_path: Path) -> None:
    adapter = changed(plain, tmp_path, base_model_name_or_path="org/kept", revision="aaaa")
    checkpoint = Checkpoint.open(adapter)
    assert checkpoint.adapted.revision == "aaaa" and len(checkpoint.notes) == 1
    assert torch.allclose(checkpoint.read(Q), tensors(plain / "merged")[Q], atol=1e-6)
    for given in ("org/kept@aaaa", "org/kept@tag", cache / "aaaa"):
        assert len(Checkpoint.open(adapter, base=Checkpoint.open(given)).notes) == 1, given
    copy = shutil.copytree(plain / "base", tmp_path / "kept")
    notes = Checkpoint.open(adapter, base=Checkpoint.open(copy)).notes
    assert notes[-1].endswith(f"{copy} was used, whose revision is unknown")
    notes = Checkpoint.open(adapter, base=Checkpoint.open("org/kept")).notes
    assert notes[-1].endswith("names revision aaaa of org/kept as its base; org/kept was used, which is bbbb")
    # A directory has no revisions, and what is said of one is not looked at.
    shutil.rmtree(adapter)
    assert len(Checkpoint.open(changed(plain, tmp_path, revision="aaaa")).notes) == 1
    shutil.rmtree(adapter)
    with pytest.raises(CheckpointError, match="gives the revision of its base as 3, which is no text"):
        Checkpoint.open(changed(plain, tmp_path, base_model_name_or_path="org/kept", revision=3))


def test_adapters_on_two_revisions_share_no_base(cache: Path, plain: Path, tmp_path: Path) -> None:
    first = Checkpoint.open(changed(plain, tmp_path / "1", base_model_name_or_path="org/kept", revision="aaaa"))
    same = changed(plain, tmp_path / "2", base_model_name_or_path="org/kept", revision="tag")
    assert Checkpoint.open(same, base=first).adapted is first.adapted
    other = changed(plain, tmp_path / "3", base_model_name_or_path="org/kept")
    with pytest.raises(CheckpointError, match=r"adapter on org/kept, and its base .* an adapter on org/kept@aaaa"):
        Checkpoint.open(other, base=first)


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=16, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("targets", [["c_attn", "c_fc"], ["attn.c_proj", "lm_head"], ["attn.c_proj", "wte"]])
def test_weights_of_conv1d_lie_transposed_whatever_the_config_says(
    tmp_path: Path, targets: list[str], known: bool
) -> None:
    make(tmp_path, base=gpt2(), target_modules=targets)
    if not known:
        (tmp_path / "base" / "config.json").unlink()
    for said in (True, False):
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": said}))
        check_merged(tmp_path)


def test_tied_heads(tmp_path: Path) -> None:
    make(tmp_path, tied=True, target_modules=["q_proj", "embed_tokens"])
    checkpoint = check_merged(tmp_path)
    assert "lm_head.weight" not in checkpoint.tensors and len(checkpoint.notes) == 1
    base = tensors(tmp_path / "base")
    both = base | {"lm_head.weight": base["model.embed_tokens.weight"].clone()}
    for config in ({"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}, {}):
        # Without a word of the config the equal numbers count.
        twice = Checkpoint.open(save(tmp_path / "twice", both, config))
        with pytest.raises(CheckpointError, match=r"changes model\.embed_tokens\.weight, which .* ties to another"):
            Checkpoint.open(tmp_path / "adapter", base=twice)
    apart = Checkpoint.open(save(tmp_path / "apart", both | {"lm_head.weight": both["lm_head.weight"] + 1}, {}))
    assert torch.equal(
        Checkpoint.open(tmp_path / "adapter", base=apart).read("lm_head.weight"), apart.read("lm_head.weight")
    )


def test_adapted_head_of_a_base_that_stores_none(tmp_path: Path) -> None:
    make(tmp_path, tied=True, target_modules=["q_proj", "lm_head"])
    with pytest.raises(
        CheckpointError, match=r"adapts lm_head, and .* stores model\.embed_tokens\.weight alone, to which"
    ):
        Checkpoint.open(tmp_path / "adapter")


def test_embedding_trained_apart_from_its_head_is_noted(tmp_path: Path) -> None:
    make(tmp_path, tied=True, modules_to_save=["embed_tokens"])
    notes = Checkpoint.open(tmp_path / "adapter").notes
    assert len(notes) == 2 and notes[1].startswith("model.embed_tokens.weight was trained as a copy of its own")


def test_shared_bytes_of_the_base_are_one_weight_unless_its_config_says_two(tmp_path: Path) -> None:
    make(tmp_path, target_modules=["lm_head"])
    state = tensors(tmp_path / "base")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    (tmp_path / "shared").mkdir()
    torch.save(state, tmp_path / "shared" / "pytorch_model.bin")
    base = Checkpoint.open(tmp_path / "shared")
    assert base.aliases and base.notes
    with pytest.raises(CheckpointError, match=r"changes lm_head\.weight, which .* stores, model\.embed_tokens\.weight"):
        Checkpoint.open(tmp_path / "adapter", base=base)
    (tmp_path / "shared" / "config.json").write_text('{"tie_word_embeddings": false}')
    parted = Checkpoint.open(tmp_path / "adapter", base=Checkpoint.open(tmp_path / "shared"))
    assert not parted.aliases and not any("shares its bytes" in note for note in parted.notes)
    # Other shared weights are one in every model, whatever is said of head and embedding.
    state["model.layers.1.self_attn.q_proj.weight"] = state[Q]
    torch.save(state, tmp_path / "shared" / "pytorch_model.bin")
    make(tmp_path, target_modules=["q_proj"], layers_to_transform=[0])
    with pytest.raises(CheckpointError, match=r"changes .*layers\.\d\.self_attn\.q_proj.* ties to another"):
        Checkpoint.open(tmp_path / "adapter", base=Checkpoint.open(tmp_path / "shared"))


def test_what_was_trained_and_is_not_there_is_noted(plain: Path, tmp_path: Path) -> None:
    lacking = rewritten(plain, tmp_path, lambda f: {n: t for n, t in f.items() if "v_proj" not in n and n != NORM})
    notes = Checkpoint.open(lacking).notes
    assert len(notes) == 2
    assert "holds nothing for 3 tensors of it (model.layers.0.self_attn.v_proj.weight, ...)" in notes[1]


@pytest.mark.parametrize(
    ("settings", "lost"),
    [
        ({"target_modules": r".*\.(q|k)_proj"}, 2),
        ({"target_modules": ["q_proj", "model.layers.0.self_attn.k_proj", "lm_head"]}, 2),
        ({"target_modules": ["k_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, 1),
        ({"target_modules": ["k_proj"], "layers_to_transform": 1, "layers_pattern": ["h"]}, 0),
        ({"target_modules": ["k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]}, 1),
        ({"target_modules": ["k_proj"], "exclude_modules": ".*"}, 0),
        ({"target_modules": ["k_proj"], "modules_to_save": ["norm"]}, 2),
        ({"modules_to_save": ["lm_head", "self_attn"]}, 13),
        ({"target_modules": "all-linear"}, 0),
        ({"target_modules": None}, 0),
    ],
    ids=str,
)
def test_targets_are_matched_as_peft_matches_them(plain: Path, tmp_path: Path, settings: dict, lost: int) -> None:
    adapter = changed(plain, tmp_path, **settings)
    notes = Checkpoint.open(adapter).notes
    assert len(notes) == 1 + bool(lost)
    assert not lost or f"holds nothing for {lost} tensors" in notes[1], notes
    config = peft.LoraConfig(**settings)
    if "k_proj" in str(config.target_modules):
        modules = [name.removesuffix(".weight") for name in tensors(plain / "base") if name.endswith("weight")]
        expected = [module for module in modules if peft.tuners.tuners_utils.check_target_module_exists(config, module)]
        assert adapter_config.targeted(adapter, settings, modules) == expected


def test_experts_that_the_model_fuses_are_not_missed(plain: Path, tmp_path: Path) -> None:
    base = tensors(plain / "base") | {
        f"model.layers.0.mlp.experts.{n}.down_proj.weight": torch.ones(2, 2) for n in (0, 1)
    }
    assert len(Checkpoint.open(plain / "adapter", base=Checkpoint.open(save(tmp_path / "base", base))).notes) == 1


def test_names_and_shapes_of_replacements(plain: Path, tmp_path: Path) -> None:
    renamed = rewritten(
        plain, tmp_path, lambda f: {n.replace("model.norm", "model.final_norm"): t for n, t in f.items()}
    )
    notes = Checkpoint.open(renamed).notes
    assert "holds nothing for 1 tensors of it (model.norm.weight)" in notes[1]
    assert "final_norm.weight, which" in notes[2] and "it was added as model.final_norm.weight" in notes[2]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of shape \[7, 3\] in place of .* of shape \[32\]"):
        Checkpoint.open(rewritten(plain, tmp_path, lambda f: f | {NORM: torch.ones(7, 3)}))
    head = "base_model.model.lm_head.weight"
    more = Checkpoint.open(rewritten(plain, tmp_path, lambda f: f | {head: torch.ones(310, 32)}))
    assert more.info("lm_head.weight").shape == (310, 32) and len(more.notes) == 1
    with pytest.raises(CheckpointError, match=r"of shape \[300, 31\] in place of lm_head\.weight"):
        Checkpoint.open(rewritten(plain, tmp_path, lambda f: f | {head: torch.ones(300, 31)}))
    # A head of another task is no part of the base.
    score = Checkpoint.open(
        rewritten(plain, tmp_path, lambda f: f | {"base_model.model.score.weight": torch.ones(2, 32)})
    )
    assert "score.weight" in score.tensors and len(score.notes) == 1


@pytest.mark.parametrize("adapter", ["", ".default"])
@pytest.mark.parametrize("inner", ["mlp.modules_to_save{}.gate_proj", "mlp.gate_proj.modules_to_save{}"])
def test_modules_to_save_inside_of_modules(plain: Path, tmp_path: Path, inner: str, adapter: str) -> None:
    stored = f"base_model.model.model.layers.0.{inner.format(adapter)}.weight"
    checkpoint = Checkpoint.open(rewritten(plain, tmp_path, lambda f: f | {stored: torch.full((56, 32), 3.0)}))
    assert (checkpoint.read("model.layers.0.mlp.gate_proj.weight") == 3).all()
    assert pair(Checkpoint.open(plain / "base"), checkpoint).complete


def test_adapter_beside_another_weight_file(plain: Path, tmp_path: Path) -> None:
    adapter = changed(plain, tmp_path)
    save_file({"v_head.summary.weight": torch.zeros(1, 32)}, adapter / "value_head.safetensors")
    checkpoint = Checkpoint.open(adapter)
    assert checkpoint.adapted is not None and len(checkpoint.tensors) == len(tensors(plain / "base"))
    assert checkpoint.notes[-1] == "value_head.safetensors lies beside the adapter and was not read"
    torch.save(tensors(plain / "base"), adapter / "pytorch_model.bin")
    (adapter / "value_head.safetensors").unlink()
    assert Checkpoint.open(adapter).adapted is None


def opened(folder: Path) -> list[str]:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    found = [os.readlink(link) for link in links if os.path.lexists(link)]
    return sorted(Path(name).name for name in found if name.startswith(str(folder)))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are listed there")
def test_closing_closes_the_factors_and_a_base_opened_here(plain: Path) -> None:
    with Checkpoint.open(plain / "adapter", io="read") as checkpoint:
        checkpoint.read(Q)
        assert opened(plain) == ["adapter_model.safetensors", "model.safetensors"]
    assert opened(plain) == []
    base = Checkpoint.open(plain / "base", io="read")
    with Checkpoint.open(plain / "adapter", io="read", base=base) as checkpoint:
        checkpoint.read(Q)
    assert opened(plain) == ["model.safetensors"]
    base.close()
