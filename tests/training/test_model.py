"""Tokenizer, checkpoints, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from offprin_kernels.training import model as models
from offprin_kernels.training.tasks import ALPHABET, problems

from . import tiny


@pytest.fixture
def saved(tmp_path):
    net = tiny.lively()
    models.save_checkpoint(net, tmp_path / "checkpoint")
    return net, tmp_path / "checkpoint"


def test_the_saved_tokenizer_is_encode_and_decode(saved) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved[1])
    texts = [ALPHABET, *(p.prompt + p.solution() for p in problems(20, "tokenizer"))]
    assert tokenizer(texts)["input_ids"] == models.encode(texts)
    for text, ids in zip(texts, models.encode(texts), strict=True):
        ended = [*ids, models.END_ID, models.PAD_ID, ids[0]]
        assert models.decode(ended) == tokenizer.decode(ended[:-1], skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    padded = tokenizer(["12", "1"], padding=True)
    assert padded["input_ids"][1] == [0, *models.encode(["1"])[0]] and padded["attention_mask"][1] == [0, 1]
    assert len(tokenizer) == len(ALPHABET) + 2


def test_checkpoints_are_bf16(saved) -> None:
    from safetensors.torch import load_file

    net, path = saved
    stored = load_file(path / "model.safetensors")
    assert {name for name, _ in net.named_parameters()} == set(stored)
    loaded = models.load_checkpoint(path)
    for name, param in net.named_parameters():
        assert param.dtype == torch.float32, "saving must leave the model as it was"
        assert stored[name].dtype == torch.bfloat16 and torch.equal(stored[name], param.detach().bfloat16())
        own = loaded.get_parameter(name)
        assert own.dtype == torch.float32 and torch.equal(own, param.detach().bfloat16().float())
    # tables that no file holds have to be as exact as at the start
    for (_, ours), (_, theirs) in zip(net.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_that_exists_stays(saved) -> None:
    _, path = saved
    before = (path / "model.safetensors").read_bytes()
    models.save_checkpoint(tiny.lively(seed=1), path)
    assert (path / "model.safetensors").read_bytes() == before


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch) -> None:
    net, path = tiny.lively(), tmp_path / "run" / "final"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        models.save_checkpoint(net, path)
    assert not path.exists()
    monkeypatch.undo()
    # half a checkpoint of a killed process is no part of the next one
    (path.with_name("final.partial") / "merges.txt").write_text("half")
    models.save_checkpoint(net, path)
    assert not path.with_name("final.partial").exists() and not (path / "merges.txt").exists()


def change(path, name, change) -> None:
    held = json.loads((path / name).read_text())
    change(held)
    (path / name).write_text(json.dumps(held))


def refused(path) -> str:
    with pytest.raises(ValueError) as error:
        models.load_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bases_that_are_refused(saved, tmp_path) -> None:
    _, path = saved
    assert "nothing/config.json cannot be read (No such file" in refused(tmp_path / "nothing")
    change(path, "tokenizer.json", lambda held: held["model"]["vocab"].update({"!": 19}))
    assert "has another tokenizer than the tasks'" in refused(path)
    change(path, "config.json", lambda held: held.update(architectures=["LlamaForCausalLM"]))
    assert "is a LlamaForCausalLM; the reference loop trains Qwen3ForCausalLM" in refused(path)
    (path / "config.json").write_text("{")
    assert "cannot be read (not JSON)" in refused(path)


def test_a_base_without_weights_is_refused(saved) -> None:
    _, path = saved
    (path / "model.safetensors").unlink()
    assert "cannot be read" in refused(path) and "model.safetensors" in refused(path)
    (path / "model.safetensors").write_bytes(b"half a file")
    assert "the weights in" in refused(path)


def test_rounded_weights_leave_tables_exact() -> None:
    net, same = tiny.lively(), tiny.lively()
    models.round_weights(net)
    for (_, ours), (_, theirs) in zip(net.named_buffers(), same.named_buffers(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    for ours, theirs in zip(net.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_linear_weights_are_those_of_the_decoder() -> None:
    names = list(models.linear_weights(tiny.lively()))
    assert len(names) == 7 * tiny.SIZE.layers and all("_proj.weight" in name for name in names)
