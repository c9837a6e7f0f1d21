"""examples/grpo_trl.py as a user runs it, on a base made on the spot."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from offprin_kernels import BitMask, random_mask
from offprin_kernels.training.model import linear_weights, load_checkpoint
from offprin_kernels.training.settings import Pretrain
from offprin_kernels.training.stages import train

pytest.importorskip("trl", reason="a peer that users have and the package does not need")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "grpo_trl.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """It solves some of the problems, so that samples of one prompt differ."""
    settings = Pretrain(
        steps=60, batch=32, lr=1e-2, worked_share=0.0, tasks={"reverse": [2], "sort": [2]}, hidden=32, layers=2,
        heads=2, kv_heads=1, head_dim=16, intermediate=48, most=16, threads=1, eval_problems=16,
    )  # fmt: skip
    threads = torch.get_num_threads()
    yield train("pretrain", settings, tmp_path_factory.mktemp("base") / "run")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("given", ["file", "low"])
def test_only_masked_weights_move(base, tmp_path, monkeypatch, capsys, given) -> None:
    before = load_checkpoint(base)
    weights = linear_weights(before)
    masks = {name: random_mask(w.shape, 0.3, seed=i) for i, (name, w) in enumerate(weights.items())}
    if given == "file":
        BitMask.save(masks, tmp_path / "masks.safetensors")
        given = str(tmp_path / "masks.safetensors")
    out = tmp_path / "run"
    arguments = f"--base {base} --out {out} --steps 3 --masks {given} --tasks reverse:2,sort:2".split()
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")

    after, moved = load_checkpoint(out / "final"), 0
    for name, old in before.named_parameters():
        changed = after.get_parameter(name).detach() != old.detach()
        if name not in weights:
            assert not bool(changed.any()), name
        elif given == "low":
            assert int(changed.sum()) <= old.numel() // 2
            # nothing above the median moved
            magnitude = old.detach().abs()
            assert not bool((changed & (magnitude > magnitude.median())).any()), name
        else:
            assert not bool(changed[~masks[name].to_dense()].any()), name
        moved += int(changed.sum())
    assert moved

    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    possible = sum(mask.count() for mask in masks.values()) if given != "low" else None
    assert len(rows) == 3
    for row in rows:
        assert -1 <= row["reward"] <= 1 and 0 <= row["visible_fraction"] <= 0.5
        assert possible is None or row["masked_weights"] == possible
    assert rows[0]["visible_fraction"] > 0 and rows[0]["reward_std"] > 0
    assert f"{rows[-1]['masked_weights']:,} weights could move" in capsys.readouterr().out
