"""offprin intervene on checkpoints: what is written, stays or is refused, and that nothing is left half done."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from offprin_kernels import intervene
from offprin_kernels.checkpoint import Checkpoint
from offprin_kernels.cli import main
from offprin_kernels.intervene import files, verify

from .models import bits, logits, saved


def offprin(*arguments) -> int:
    return main(["intervene", *map(str, arguments), "--quiet"])


def weights(path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "sharded", dtype=torch.bfloat16)


@pytest.mark.parametrize("action", ["rotate", "permute"])
@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_a_checkpoint(tmp_path, capsys, action, shards, kind) -> None:
    source = saved(tmp_path / "source", kind, shards, dtype=torch.bfloat16)
    out = tmp_path / "new" / "out"
    assert len(list(source.glob("*.safetensors"))) > 2 if shards else True
    assert offprin(action, source, "--layers", "0,2", "--seed", 9, "--out", out, "--verify", "always") == 0
    printed = capsys.readouterr().out
    assert "layers 0, 2, seed 9" in printed and "logits of 64 random tokens, fp32" in printed
    assert not [item for item in out.parent.iterdir() if item != out]
    # files: everything but other formats and hidden ones, byte for byte where it is not attention
    kept = {item.name for item in source.iterdir()} - {"pytorch_model.bin", ".cache"}
    assert {item.name for item in out.iterdir()} == kept | {"intervention.json"}
    for name in kept:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (source / name).read_bytes()
    old, new = weights(source), weights(out)
    config = json.loads((source / "config.json").read_text())
    expected = getattr(intervene, action)(old, config, [0, 2], seed=9)
    assert list(new) == list(old)
    for name in old:
        assert torch.equal(bits(new[name]), bits(expected.get(name, old[name]))), name
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as one, safe_open(out / file.name, "pt") as two:
            assert one.keys() == two.keys() and one.metadata() == two.metadata()
    # the record undoes it, and says how it was verified
    record = intervene.Intervention.load(out)
    back = intervene.undo(new, record)
    assert sorted(back) == sorted(expected)
    if action == "permute":
        assert all(torch.equal(bits(back[name]), bits(old[name])) for name in back)
    content = json.loads((out / "intervention.json").read_text())
    assert content["source"] == str(source) and [one["layer"] for one in content["verification"]["layers"]] == [0, 2]
    found = content["verification"]["logits"]
    from transformers import AutoModelForCausalLM

    one, two = (logits(AutoModelForCausalLM.from_pretrained(path).float().eval()) for path in (source, out))
    assert 0 < (one - two).abs().max() < 10 * found["max_difference"]


def test_twice_and_over_an_empty_directory(sharded, tmp_path, capsys) -> None:
    (tmp_path / "one").mkdir()
    assert offprin("permute", sharded, "--out", tmp_path / "one", "--verify", "never") == 0
    assert "logits: not compared (not asked for)" in capsys.readouterr().out
    assert offprin("rotate", tmp_path / "one", "--out", tmp_path / "two", "--verify", "never", "--io", "read") == 0
    content = json.loads((tmp_path / "two" / "intervention.json").read_text())
    assert content["kind"] == "rotate" and content["earlier"]["kind"] == "permute"
    assert content["verification"]["logits_skipped"] == "not asked for"


def refused(tmp_path, capsys, *arguments) -> str:
    """The sentence; nothing may be left beside what was there."""
    before = sorted(item.name for item in tmp_path.iterdir())
    assert offprin(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("offprin: error: ") and message.count("\n") == 1, message
    assert sorted(item.name for item in tmp_path.iterdir()) == before
    return message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layers", "1,7"), "the model has no attention layer 7; its 3 are 0-2"),
        (("--layers", "x"), "--layers x: 'x' is no layer"),
        (("--seed", "-1"), "the seed must be an integer"),
    ],
)
def test_bad_options(sharded, tmp_path, capsys, options, words) -> None:
    assert words in refused(tmp_path, capsys, "permute", sharded, "--out", tmp_path / "out", *options)


@pytest.mark.parametrize("arguments", [("--seed", "one"), ("--verify", "maybe")])
def test_options_that_do_not_parse(sharded, tmp_path, capsys, arguments) -> None:
    with pytest.raises(SystemExit) as stopped:
        offprin("permute", sharded, "--out", tmp_path / "out", *arguments)
    assert stopped.value.code == 2 and "invalid" in capsys.readouterr().err


def test_places_that_are_refused(sharded, tmp_path, capsys) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(sharded)
    for out, words in (
        (tmp_path / "full", "is not empty"),
        (tmp_path / "file", "is a file"),
        (sharded, "is the source"),
        (tmp_path / "link", "is the source"),
        (sharded / "new", "lies in it"),
    ):
        assert words in refused(tmp_path, capsys, "permute", sharded, "--out", out)
    assert (tmp_path / "full" / "note").read_text() == "mine" and not (sharded / "new").exists()


def test_models_that_are_refused(sharded, tmp_path, capsys) -> None:
    source = tmp_path / "source"
    out = ("--out", tmp_path / "out")
    shutil.copytree(sharded, source)
    (source / "config.json").unlink()
    assert "has no config.json" in refused(tmp_path, capsys, "rotate", source, *out)
    (source / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused(tmp_path, capsys, "rotate", source, *out)
    shutil.copy(sharded / "config.json", source)
    shard = next(source.glob("*00001-of*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "is truncated" in refused(tmp_path, capsys, "rotate", source, *out)
    assert "there is no" in refused(tmp_path, capsys, "rotate", source / "no.safetensors", *out)
    assert "give the model's directory" in refused(
        tmp_path, capsys, "rotate", next(sharded.glob("*00001-of*.safetensors")), *out
    )
    torchy = tmp_path / "torchy"
    torchy.mkdir()
    shutil.copy(sharded / "config.json", torchy)
    torch.save({"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}, torchy / "pytorch_model.bin")
    assert "save the model as safetensors first" in refused(tmp_path, capsys, "rotate", torchy, *out)
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_text(json.dumps({"model_type": "phi3", "num_attention_heads": 4, "hidden_size": 32}))
    save_file({"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(96, 32)}, fused / "model.safetensors")
    message = refused(tmp_path, capsys, "permute", fused, *out)
    assert "model.layers.0.self_attn.qkv_proj.weight" in message and "is not supported" in message
    save_file({"transformer.h.0.attn.c_attn.weight": torch.zeros(96, 32)}, fused / "model.safetensors")
    assert "models of type 'phi3' are not supported" in refused(tmp_path, capsys, "permute", fused, *out)


def corrupted(name, tensor, record, inverse=False):
    made = intervene.transform.transformed(name, tensor, record, inverse)
    if "layers.1" in name and "o_proj.weight" in name:
        made[:, :8] = made[:, 8:16]
    return made


@pytest.mark.parametrize("action", ["rotate", "permute"])
def test_a_wrong_head_on_disk_leaves_nothing(sharded, tmp_path, capsys, monkeypatch, action) -> None:
    monkeypatch.setattr(files, "transformed", corrupted)
    message = refused(tmp_path, capsys, action, sharded, "--out", tmp_path / "out", "--verify", "never")
    assert "layer 1: " in message


def test_wrong_logits_leave_nothing(sharded, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(files, "transformed", corrupted)
    monkeypatch.setattr(verify, "check_layer", lambda *rest: verify.LayerCheck(rest[3], 0.0, 0.0))
    message = refused(tmp_path, capsys, "permute", sharded, "--out", tmp_path / "out")
    assert "the logits differ by" in message


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "model.safetensors"), 2, "No space left on device (model.safetensors)"),
        (KeyboardInterrupt(), 3, "interrupted; nothing was written into"),
    ],
)
def test_cut_short(sharded, tmp_path, capsys, monkeypatch, error, code, words) -> None:
    def stop(*_):
        raise error

    monkeypatch.setattr(intervene.Intervention, "save", stop)
    assert offprin("permute", sharded, "--out", tmp_path / "out", "--verify", "never") == code
    assert words in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_logits_are_compared_where_that_is_possible(sharded, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(files, "_available", lambda: 1000)
    assert offprin("permute", sharded, "--out", tmp_path / "small") == 0
    assert "GiB in fp32, and 0.0 are free" in capsys.readouterr().out
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    assert offprin("permute", sharded, "--out", tmp_path / "without") == 0
    assert "logits: not compared (transformers is not installed)" in capsys.readouterr().out
    message = refused(tmp_path, capsys, "permute", sharded, "--out", tmp_path / "must", "--verify", "always")
    assert "pip install 'offprin-kernels[hf]'" in message


def test_models_that_transformers_cannot_run(sharded, tmp_path, capsys, monkeypatch) -> None:
    def broken(*_):
        raise KeyError("rope")

    monkeypatch.setattr(verify, "_loaded", broken)
    assert offprin("permute", sharded, "--out", tmp_path / "auto") == 0
    assert "not compared (transformers cannot run the model: 'rope')" in capsys.readouterr().out
    message = refused(tmp_path, capsys, "permute", sharded, "--out", tmp_path / "must", "--verify", "always")
    assert "transformers cannot run the model to compare logits: 'rope'" in message


def test_the_library_refuses_unknown_verify(sharded, tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown verify 'maybe'"):
        intervene.write(Checkpoint.open(sharded), "permute", tmp_path / "out", verify="maybe")
