"""Experts stored as one tensor are measured expert by expert, as where each is stored by itself."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch

from offprin_kernels import BitMask, Rule, update_mask
from offprin_kernels.analysis import Options, make_plan
from offprin_kernels.checkpoint import Checkpoint

from ..ops.weights import tuned, weights
from .checkpoints import files, offprin, save

STEM = "model.layers.0.mlp.experts"
EXPERTS, INNER, HIDDEN = 3, 24, 40
ALL = ("--metrics", "spectrum,masks,energy", "--k", "4")
BITWISE = (Rule.parse("bitwise"),)


def split(seed: int | None = None) -> dict[str, torch.Tensor]:
    """Experts one by one, of the base or (by seed) of a run."""
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    found = {}
    for at in range(3 * EXPERTS):
        kind = list(shapes)[at % 3]
        base = weights(shapes[kind], seed=at)
        found[f"{STEM}.{at // 3}.{kind}.weight"] = base if seed is None else tuned(base, seed=100 * seed + at)
    return found


def stacked(single: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as transformers stacks them, the gate's rows first."""
    gate, up, down = (
        [single[f"{STEM}.{expert}.{kind}_proj.weight"] for expert in range(EXPERTS)] for kind in ("gate", "up", "down")
    )
    both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    return {f"{STEM}.gate_up_proj": torch.stack(both), f"{STEM}.down_proj": torch.stack(down)}


@pytest.fixture
def stored(tmp_path):
    """Where base and two runs lie, one by one and stacked."""
    found = {}
    for name, seed in (("base", None), ("one", 1), ("two", 2)):
        single = split(seed)
        found[name] = save(tmp_path / "split" / name, single), save(tmp_path / "stacked" / name, stacked(single))
    return found


def rows(out, table: str) -> dict[tuple, dict]:
    """A table by run and name, without what says how a side stores it."""
    found = pq.read_table(out / f"{table}.parquet").to_pylist()
    keys = ("run", "run_a", "run_b", "name", "axis")
    named = {tuple(row[key] for key in keys if key in row): row for row in found}
    assert len(named) == len(found)
    for row in found:
        for column in ("shape", "tuned_name", "note"):
            row.pop(column, None)
    return named


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (0, 1, 0)])
def test_every_expert_has_the_same_numbers_however_it_is_stored(stored, tmp_path, layout) -> None:
    one_by_one = [stored[name][0] for name in ("base", "one", "two")]
    mixed = [stored[name][side] for name, side in zip(("base", "one", "two"), layout, strict=True)]
    assert offprin(*one_by_one, "--out", tmp_path / "a", "--save-masks", *ALL) == 0
    assert offprin(*mixed, "--out", tmp_path / "b", "--save-masks", *ALL) == 0
    for table in ("tensors", "pairs", "consensus", "stripes", "geometry", "curves"):
        expected, found = (rows(tmp_path / out, table) for out in "ab")
        assert len(expected) == 3 * EXPERTS * {"pairs": 1, "consensus": 1, "stripes": 4}.get(table, 2)
        assert found == expected, table
    for run, seed in (("one", 1), ("two", 2)):
        masks = BitMask.load(tmp_path / "b" / "masks" / f"{run}.safetensors")
        after = split(seed)
        assert masks == {name: update_mask(weight, after[name]) for name, weight in split().items()}


def test_counts_and_ledger_of_stacked_experts(stored, tmp_path) -> None:
    paths = [stored[name][side] for name, side in (("base", 1), ("one", 1), ("two", 0))]
    assert offprin(*paths, "--out", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    total = 3 * EXPERTS * INNER * HIDDEN
    for run in summary["runs"]:
        assert run["linear"]["tensors"] == 3 * EXPERTS and run["linear"]["total"] == run["all"]["total"] == total
    assert summary["pairs"][0]["tensors"] == summary["consensus"]["tensors"] == 3 * EXPERTS
    assert summary["complete"]
    counts = [summary["ledger"][name]["counts"] for name in ("one", "two")]
    assert counts == [
        {"base": {"compared": 2}, "tuned": {"compared": 2}},
        {"base": {"compared": 2}, "tuned": {"compared": 3 * EXPERTS}},
    ]


def test_the_base_is_read_once_for_stacked_and_single_runs(stored, tmp_path, monkeypatch) -> None:
    read = []
    real = Checkpoint.read

    def counted(self, name, start_row=0, stop_row=None, **options):
        found = real(self, name, start_row, stop_row, **options)
        read.append((self.root.name, found.numel()))
        return found

    monkeypatch.setattr(Checkpoint, "read", counted)
    paths = [stored[name][side] for name, side in (("base", 1), ("one", 1), ("two", 0))]
    assert offprin(*paths, "--out", tmp_path / "out", *ALL) == 0
    for root in ("base", "one", "two"):
        assert sum(size for name, size in read if name == root) == 3 * EXPERTS * INNER * HIDDEN


def test_shards_and_slabs_cut_between_and_within_experts(stored, tmp_path, monkeypatch) -> None:
    from offprin_kernels.analysis import plan

    for name, value in (("PART_BYTES", 8_000), ("SMALLEST_PART", 1)):
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(plan, "SLAB_ELEMENTS", 7 * HIDDEN)
    paths = [stored[name][1] for name in ("base", "one", "two")]
    assert offprin(*paths, "--out", tmp_path / "whole", "--save-masks", *ALL) == 0
    for shard in ("2/2", "1/2"):
        assert offprin(*paths, "--out", tmp_path / "shards", "--save-masks", *ALL, "--shard", shard) == 0
    whole, shards = files(tmp_path / "whole"), files(tmp_path / "shards")
    assert whole.keys() == shards.keys()
    assert all(whole[name] == shards[name] for name in whole if name.endswith((".parquet", ".safetensors")))


def units(path, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, int, str]]:
    checkpoint = Checkpoint.open(save(path, tensors))
    found = make_plan(checkpoint, [checkpoint], Options(BITWISE)).units
    assert all(unit.linear and unit.layer == 0 for unit in found)
    return {unit.name: (unit.rows, unit.columns, unit.kind) for unit in found}


def test_other_layouts_are_cut_by_expert_only(tmp_path) -> None:
    """Transposed, with biases, or without the tensor that tells: gate and up stay together."""
    straight = stacked(split())
    gate_up, down = straight.values()
    both = (2 * INNER, HIDDEN, "expert_gate_up_proj")
    together = {f"{STEM}.{expert}.gate_up_proj.weight": both for expert in range(EXPERTS)}
    assert units(tmp_path / "alone", {f"{STEM}.gate_up_proj": gate_up}) == together
    biased = {**straight, f"{STEM}.gate_up_proj_bias": torch.zeros(EXPERTS, 2 * INNER).bfloat16()}
    base = Checkpoint.open(save(tmp_path / "biased", biased))
    names = [unit.name for unit in make_plan(base, [base], Options(BITWISE)).units]
    assert set(together) < set(names) and f"{STEM}.gate_up_proj_bias" in names
    turned = {name: tensor.mT.contiguous() for name, tensor in straight.items()}
    found = units(tmp_path / "turned", turned)
    assert found[f"{STEM}.2.gate_up_proj.weight"] == (HIDDEN, 2 * INNER, "expert_gate_up_proj")
    assert found[f"{STEM}.0.down_proj.weight"] == (INNER, HIDDEN, "expert_down_proj") and len(found) == 6
    other = units(tmp_path / "other", {f"{STEM}.w1.weight": down, "model.layers.0.mlp.up_proj.weight": down[0]})
    assert other[f"{STEM}.1.w1.weight"] == (HIDDEN, INNER, "expert_gate_proj") and len(other) == 4


def test_square_experts_are_cut_where_their_layout_is_sure(tmp_path) -> None:
    """gate_up [E, 2 I, H] with 2 I = H looks alike both ways round; down_proj tells."""
    gate_up, down = torch.zeros(2, 8, 8).bfloat16(), torch.zeros(2, 8, 4).bfloat16()
    found = units(tmp_path / "straight", {f"{STEM}.gate_up_proj": gate_up, f"{STEM}.down_proj": down})
    assert len(found) == 6 and found[f"{STEM}.1.up_proj.weight"] == (4, 8, "expert_up_proj")
    found = units(tmp_path / "turned", {f"{STEM}.gate_up_proj": gate_up, f"{STEM}.down_proj": down.mT.contiguous()})
    assert len(found) == 4 and found[f"{STEM}.1.gate_up_proj.weight"] == (8, 8, "expert_gate_up_proj")


# ---- batches


def test_experts_in_the_order_of_hugging_face_are_batched_by_shape(tmp_path, monkeypatch) -> None:
    """As on a GPU: 16 experts, stored down, gate, up; two batches for base and run. Tables keep their order."""
    from offprin_kernels.analysis import measure, spectral

    shapes = {"down_proj": (40, 24), "gate_proj": (24, 40), "up_proj": (24, 40)}
    base = {
        f"{STEM}.{expert}.{kind}.weight": weights(shape, seed=3 * expert + at)
        for expert in range(16)
        for at, (kind, shape) in enumerate(shapes.items())
    }
    after = {name: tuned(weight, seed=100 + at) for at, (name, weight) in enumerate(base.items())}
    paths = [save(tmp_path / name, tensors, shards=1) for name, tensors in (("base", base), ("after", after))]
    assert offprin(*paths, "--out", tmp_path / "alone", *ALL) == 0
    batches = []
    real = spectral.topk_svd

    def counted(weight, *arguments, **options):
        batches.append(tuple(weight.shape))
        return real(weight, *arguments, **options)

    monkeypatch.setattr(spectral, "topk_svd", counted)
    monkeypatch.setattr(measure, "BATCHING", ("cpu",))
    assert offprin(*paths, "--out", tmp_path / "together", *ALL, "--save-masks") == 0
    assert batches == [(16, 40, 24)] * 2 + [(32, 24, 40)] * 2
    for table in ("tensors", "geometry", "curves", "stripes"):
        one, two = (pq.read_table(tmp_path / out / f"{table}.parquet")["name"] for out in ("alone", "together"))
        assert one == two, table
    tensors = [(tmp_path / out / "tensors.parquet").read_bytes() for out in ("alone", "together")]
    assert tensors[0] == tensors[1]
    masks = BitMask.load(tmp_path / "together" / "masks" / "after.safetensors")
    assert masks == {name: update_mask(weight, after[name]) for name, weight in base.items()}


def test_a_batch_keeps_to_its_memory_and_its_dtypes(tmp_path, monkeypatch) -> None:
    from offprin_kernels.analysis import measure

    base = {f"{STEM}.{expert}.up_proj.weight": weights((24, 40), seed=expert) for expert in range(6)}
    base[f"{STEM}.2.up_proj.weight"] = base[f"{STEM}.2.up_proj.weight"].float()
    checkpoint = Checkpoint.open(save(tmp_path / "base", base, shards=1))
    plan = make_plan(checkpoint, [checkpoint], Options(BITWISE, metrics=("energy",)))

    def names(device: str) -> list[list[str]]:
        found = measure.groups(plan.units, plan, torch.device(device))
        return [[plan.units[at].name.split(".")[-3] for at in group] for group in found]

    assert len(names("cpu")) == 6
    others = [list("01345"), ["2"]]
    assert sorted(names("cuda")) == others
    monkeypatch.setattr(measure, "BATCH_BYTES", 2 * 2 * 2 * 24 * 40)
    assert sorted(names("cuda")) == [["0", "1"], ["2"], ["3", "4"], ["5"]]
    monkeypatch.setattr(measure, "BATCH", 1)
    assert len(names("cuda")) == 6
