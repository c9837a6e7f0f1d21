"""LoRA adapters as the model that merging them gives: against peft's own merge, row by row, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offprin_kernels import numerics
from offprin_kernels.checkpoint import Checkpoint, CheckpointError, Slab, pair

from .adapters import Q, changed, check_merged, make, tensors
from .distributed import check_analysis
from .files import save


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    make(folder, torch.bfloat16)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear", "r": 3},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2, r"layers.\d+.mlp.down_proj": 5}},
        {"alpha_pattern": {"q_proj": 32, "model.layers.1.self_attn.v_proj": 1}},
        {"rank_pattern": {"v_proj": 7}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["input_layernorm", "embed_tokens"]},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_equals_pefts_merge(tmp_path: Path, options: dict) -> None:
    make(tmp_path, **options)
    checkpoint = check_merged(tmp_path)
    assert len(checkpoint.notes) == 1, "nothing is missing and nothing is strange"


def test_bf16_base_with_fp32_factors_rounds_once_as_peft_does(bf16: Path) -> None:
    checkpoint, expected = Checkpoint.open(bf16 / "adapter"), tensors(bf16 / "merged")
    before = tensors(bf16 / "base")
    for name, tensor in expected.items():
        got = checkpoint.read(name).view(tensor.shape)
        # The order of four sums can turn a tie of the one rounding: one code, and rarely.
        apart = (numerics.bf16_codes(got) - numerics.bf16_codes(tensor)).abs()
        assert apart.max() <= 1 and apart.count_nonzero() <= max(1, tensor.numel() // 1000), name
    assert not torch.equal(checkpoint.read(Q), before[Q])


def test_bf16_factors_differ_by_pefts_second_rounding(tmp_path: Path) -> None:
    make(tmp_path, torch.bfloat16, factors="bf16")
    checkpoint, expected, before = (
        Checkpoint.open(tmp_path / "adapter"),
        tensors(tmp_path / "merged"),
        tensors(tmp_path / "base"),
    )
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in factors.values()} == {torch.bfloat16}
    for name, tensor in expected.items():
        got = checkpoint.read(name).view(tensor.shape)
        update = (tensor.float() - before[name].float()).abs()
        # Half a unit of peft's rounded update, and half a unit of each of the two results.
        bound = update * 2**-8 + tensor.float().abs() * 2**-7 + 2**-20
        assert ((got.float() - tensor.float()).abs() <= bound).all(), name


def test_definition(bf16: Path) -> None:
    """W + scaling B A in fp32 (here from fp64, which may turn a tie), rounded by the integer helper."""
    factors = load_file(bf16 / "adapter" / "adapter_model.safetensors")
    stem = f"base_model.model.{Q.removesuffix('.weight')}"
    a, b = (factors[f"{stem}.lora_{side}.weight"].double() for side in "AB")
    merged = (tensors(bf16 / "base")[Q].double() + 6 / 4 * (b @ a)).float()
    got = Checkpoint.open(bf16 / "adapter").read(Q)
    apart = (numerics.bf16_codes(got) - numerics.round_to_bf16_codes(merged)).abs()
    assert apart.max() <= 1 and apart.count_nonzero() <= 1


def test_pytorchs_rounding_is_that_of_numerics() -> None:
    bits = torch.arange(0, 1 << 32, 65537 * 3, dtype=torch.int64)
    ties = (torch.arange(0, 1 << 16, dtype=torch.int64) << 16) | 0x8000
    values = torch.cat([bits, ties, ties - 1, ties + 1])
    floats = torch.where(values >= 1 << 31, values - (1 << 32), values).to(torch.int32).view(torch.float32)
    numbers = floats[~floats.isnan()]
    assert torch.equal(numerics.bf16_codes(numbers.to(torch.bfloat16)), numerics.round_to_bf16_codes(numbers))
    assert numbers.to(torch.bfloat16).isnan().sum() == 0 and floats[floats.isnan()].to(torch.bfloat16).isnan().all()


def test_rows_do_not_depend_on_the_slab(tmp_path: Path) -> None:
    make(tmp_path, torch.bfloat16, target_modules=["embed_tokens", "down_proj"])
    for io in ("mmap", "read"):
        base = Checkpoint.open(tmp_path / "base", io=io)
        checkpoint = Checkpoint.open(tmp_path / "adapter", base=base, io=io)
        name = "model.embed_tokens.weight"  # 300 rows: one whole block and a part
        assert checkpoint.info(name).rows == 300 > 256
        whole = checkpoint.read(name)
        for start, stop in ((0, 1), (250, 260), (256, 300), (255, 256), (299, 300), (7, 7)):
            assert torch.equal(checkpoint.read(name, start, stop), whole[start:stop])
        down = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(checkpoint.read(down, 5, 9, slab=Slab()), checkpoint.read(down)[5:9])


def test_files_names_and_notes(plain: Path) -> None:
    base = Checkpoint.open(plain / "base")
    checkpoint = Checkpoint.open(plain / "adapter", base=base)
    names = [file.path.name for file in checkpoint.files]
    assert names == ["model.safetensors", "adapter_model.safetensors", "adapter_config.json"]
    assert checkpoint.files[0] == base.files[0] and checkpoint.files[-1].format == "peft"
    assert list(checkpoint.tensors) == list(base.tensors) and checkpoint.config == base.config
    assert checkpoint.root == plain / "adapter" and checkpoint.adapted is base
    assert checkpoint.info(Q) == base.info(Q) and checkpoint.path_of(Q) == base.path_of(Q)
    assert len(checkpoint.notes) == 1 and "6 weights merged in fp32" in checkpoint.notes[0]
    pairing = pair(base, checkpoint)
    assert pairing.complete and pairing.counts()["tuned"].keys() <= {"compared", "cast"}


def test_a_base_of_another_name_is_noted(plain: Path, tmp_path: Path) -> None:
    adapter = changed(plain, tmp_path, base_model_name_or_path="org/Other-Model")
    base = Checkpoint.open(plain / "base")
    notes = Checkpoint.open(adapter, base=base).notes
    assert notes[-1] == f"adapter_config.json of adapter names org/Other-Model as its base; {base.source} was used"


def test_old_names_and_formats_of_factors(plain: Path, tmp_path: Path) -> None:
    """A trainer's own state dict: the adapter's name inside, .bin, and a base under other prefixes."""
    adapter = changed(plain, tmp_path)
    factors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({n.replace(".weight", ".default.weight"): t for n, t in factors.items()}, adapter / "adapter_model.bin")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors(plain / "base").items()}
    base = Checkpoint.open(save(tmp_path / "bare", bare))
    expected = Checkpoint.open(plain / "adapter")
    found = Checkpoint.open(adapter, base=base)
    assert torch.equal(found.read(Q.removeprefix("model.")), expected.read(Q))
    assert torch.equal(
        Checkpoint.open(adapter / "adapter_model.bin", base=base).read("lm_head.weight"), bare["lm_head.weight"]
    )


def test_two_adapters_on_one_model_and_one_upon_another(plain: Path, tmp_path: Path) -> None:
    first = Checkpoint.open(plain / "adapter")
    second = Checkpoint.open(changed(plain, tmp_path), base=first)
    assert second.adapted is first.adapted and torch.equal(second.read(Q), first.read(Q))
    shutil.rmtree(tmp_path / "adapter")
    stacked = Checkpoint.open(changed(plain, tmp_path, base_model_name_or_path=str(plain / "adapter")), base=first)
    assert stacked.adapted is first
    update = first.read(Q) - tensors(plain / "base")[Q]
    assert torch.allclose(stacked.read(Q), first.read(Q) + update, atol=1e-6)
    with pytest.raises(CheckpointError, match="itself an adapter; merge it first"):
        Checkpoint.open(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="an adapter on org/x, and its base was to be"):
        Checkpoint.open(changed(plain, tmp_path, base_model_name_or_path="org/x"), base=first)


def test_analysis_equals_that_of_the_merged_model(plain: Path, bf16: Path, tmp_path: Path) -> None:
    # Merged here rather than by peft, whose sums may differ in their last bit.
    found = Checkpoint.open(bf16 / "adapter")
    merged = {name: found.read(name).reshape(info.shape) for name, info in found.tensors.items()}
    target = save(tmp_path / "merged", merged, json.loads((bf16 / "base" / "config.json").read_text()))
    check_analysis(tmp_path, bf16 / "base", bf16 / "adapter", target)


def test_resolution_of_the_base(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert Checkpoint.open(plain / "adapter").adapted is not None
    for name, expected in (
        ("org/none", r"is an adapter on org/none, which is needed to read it: no file or directory"),
        (None, "is an adapter that names no base; give the base, or merge it first"),
        ("", "is an adapter that names no base"),
    ):
        adapter = changed(plain, tmp_path, base_model_name_or_path=name)
        with pytest.raises(CheckpointError, match=expected):
            Checkpoint.open(adapter)
        shutil.rmtree(adapter)
    snapshot = tmp_path / "cache" / "models--org--kept" / "snapshots" / "main"
    shutil.copytree(plain / "base", snapshot)
    assert Checkpoint.open(changed(plain, tmp_path, base_model_name_or_path="org/kept")).adapted.revision == "main"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"peft_type": "LOHA"}, "an adapter of type LOHA, of which only LORA is read; merge it first"),
        ({"peft_type": None}, "an adapter of type None"),
        ({"use_dora": True}, "sets use_dora: DoRA also rescales"),
        ({"fan_in_fan_out": True}, r"sets fan_in_fan_out, and the square model\..* does not show"),
        ({"target_modules": "("}, r"target_modules '\(' is no regular expression"),
        ({"lora_bias": True}, "sets lora_bias"),
        ({"target_parameters": ["x"]}, "sets target_parameters"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "sets layer_replication"),
        ({"init_lora_weights": "pissa_niter_16"}, r"init_lora_weights='pissa_niter_16'.*path_initial_model_for_weight"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": ["a"]}, "init_lora_weights="),
        ({"bias": "some"}, "sets bias='some'"),
        ({"r": 5}, "says rank 5 for module .* whose factors have 4"),
        ({"lora_alpha": "six"}, "gives lora_alpha = 'six' for module"),
        ({"alpha_pattern": {"(": 3}}, r"alpha_pattern '\(' is no regular expression"),
        ({"rank_pattern": [3]}, "rank_pattern that is no object"),
    ],
    ids=str,
)
def test_refused_settings(plain: Path, tmp_path: Path, settings: dict, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected) as caught:
        Checkpoint.open(changed(plain, tmp_path, **settings))
    assert "\n" not in str(caught.value)


def test_dora_made_by_peft(tmp_path: Path) -> None:
    make(tmp_path, use_dora=True)
    with pytest.raises(CheckpointError, match="sets use_dora"):
        Checkpoint.open(tmp_path / "adapter")


STEM = f"base_model.model.{Q.removesuffix('.weight')}"


def put(factors: dict, leaf: str, *shape: int, stem: str = STEM) -> None:
    factors[f"{stem}.{leaf}"] = torch.zeros(shape)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: f.pop(f"{STEM}.lora_B.weight"), "holds one factor of module .*q_proj and not the other"),
        (lambda f: put(f, "lora_A.weight", 4, 31), r"A \[4, 31\] and B \[32, 4\] .* do not fit"),
        (lambda f: put(f, "lora_A.weight", 5, 32), r"A \[5, 32\] and B \[32, 4\] .* do not fit"),
        (lambda f: put(f, "lora_A.weight", 4), "do not fit"),
        (lambda f: f.update({f"{STEM}.lora_A.weight": torch.zeros(4, 32).double()}), "has dtype F64; save the adapter"),
        (lambda f: put(f, "lora_A.x.weight", 4, 32), "holds two adapters for module"),
        (lambda f: put(f, "lora_magnitude_vector", 4), "which plain LoRA has no use for"),
        (
            lambda f: [put(f, f"lora_{side}.weight", 4, 4, stem="x") for side in "AB"],
            r"module x, .* no x\.weight",
        ),
        (lambda f: put(f, "weight", 32, 32), r"changes tensor .*q_proj\.weight twice"),
    ],
)
def test_factors_that_do_not_fit(plain: Path, tmp_path: Path, change, expected: str) -> None:
    adapter = changed(plain, tmp_path)
    factors = load_file(adapter / "adapter_model.safetensors")
    change(factors)
    save_file(factors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint.open(adapter)


def test_a_quantised_base_is_refused(plain: Path, tmp_path: Path) -> None:
    base = tensors(plain / "base") | {Q: torch.zeros(32, 32).to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=r"q_proj\.weight, whose dtype F8_E4M3 takes no update"):
        Checkpoint.open(plain / "adapter", base=Checkpoint.open(save(tmp_path / "base", base)))


def test_damaged_adapter_directories(plain: Path, tmp_path: Path) -> None:
    for number, (damage, expected) in enumerate(
        (
            (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_config.json without adapter_model"),
            (lambda d: (d / "adapter_model.safetensors").write_bytes(b"123"), "is truncated"),
            (lambda d: (d / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
            (lambda d: (d / "adapter_config.json").unlink(), None),
        )
    ):
        adapter = changed(plain, tmp_path / str(number))
        damage(adapter)
        if expected is None:
            # Without its config it is a file of tensors like any other; the pairing then says what these are.
            assert all("lora_" in name for name in Checkpoint.open(adapter).tensors)
        else:
            with pytest.raises(CheckpointError, match=expected):
                Checkpoint.open(adapter)


def test_adapter_beside_a_whole_model(plain: Path, tmp_path: Path) -> None:
    adapter = changed(plain, tmp_path)
    shutil.copy(plain / "base" / "model.safetensors", adapter)
    checkpoint = Checkpoint.open(adapter)
    assert torch.equal(checkpoint.read(Q), tensors(plain / "base")[Q]) and checkpoint.adapted is None
    assert checkpoint.notes == ["adapter_config.json lies beside a whole model, which was read without the adapter"]
