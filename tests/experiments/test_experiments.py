"""Every experiment in its quick form: that it runs, what its table holds, what must be true whatever was learned."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("pyarrow")

from offprin_kernels import BitMask, experiments, update_mask
from offprin_kernels.cli import main
from offprin_kernels.experiments import lab as lab_module
from offprin_kernels.experiments.agreement import statistics_of
from offprin_kernels.experiments.compare import fresh
from offprin_kernels.experiments.lab import Lab
from offprin_kernels.experiments.masked import KINDS, thinned
from offprin_kernels.experiments.names import EXPERIMENTS
from offprin_kernels.experiments.results import Result, read_rows
from offprin_kernels.training.model import linear_weights, load_checkpoint
from offprin_kernels.training.runs import read_log
from offprin_kernels.training.settings import Pretrain
from offprin_kernels.training.tasks import problems


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


def carried_out(name: str, root) -> list[dict]:
    result = experiments.run(name, Lab(root, quick=True, workers=1))
    folder = root / name
    assert (folder / "figure.png").stat().st_size > 10_000
    table = (folder / "table.md").read_text()
    assert table.count("\n| ") == len(result.rows) + 1 and table == result.markdown()
    assert len(read_rows(folder)["rows"]) == len(result.rows)
    return result.rows


def weights(path) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in linear_weights(load_checkpoint(path)).items()}


def plain_sparsity(base, tuned) -> float:
    same = sum(int((base[name] == tuned[name]).sum()) for name in base)
    return same / sum(weight.numel() for weight in base.values())


def test_paths(root) -> None:
    rows = carried_out("paths", root)
    arms = [f"{arm}-seed{s}" for arm in ("rlvr", "sft", "sft-slow") for s in (0, 1)]
    assert [row["run"] for row in rows] == ["base", *arms]
    base = weights(root / "runs" / "base" / "final")
    assert rows[0]["kl"] == 0
    goals = {seed: Lab(root, quick=True).evaluated(root / "runs" / f"rlvr-seed{seed}") for seed in (0, 1)}
    for row in rows[1:]:
        path = root / "runs" / row["run"]
        assert row["sparsity"] == pytest.approx(plain_sparsity(base, weights(path / "final")), rel=1e-12)
        assert 0 < row["sparsity"] < 1 and row["nss"] > 0 and 0 < row["energy_both"] < 1 and row["kl"] > 0
        # the null went through the same analysis: its norm and its closed forms hold
        assert row["nss_null"] == pytest.approx(row["nss_isotropic"], rel=0.25)
        null = weights(root / "paths" / "isotropic" / row["run"])
        assert row["sparsity_null"] == pytest.approx(plain_sparsity(base, null), rel=1e-12)
        if row["arm"] != "rlvr":
            evaluations = [line["accuracy"] for line in read_log(path) if "accuracy" in line]
            # the first that reaches the goal is the last
            assert all(a < goals[row["seed"]] for a in evaluations[:-1])
            assert evaluations[-1] >= goals[row["seed"]] or row["steps"] == 4
        else:
            assert row["steps"] <= 8  # two minibatches a round


def test_agreement(root) -> None:
    rows = carried_out("agreement", root)
    kinds = {row["group"]: row for row in rows}
    assert {f"{k}_proj" for k in ("q", "k", "v", "o", "gate", "up", "down")} < kinds.keys()
    types = {group.partition(", ")[2]: row["pairs"] for group, row in kinds.items() if ", " in group}
    assert types == {"other seeds": 3, "with GRPO": 3, "with one task": 3, "with GRPO and one task": 1}
    assert kinds["all linear"]["pairs"] == 10
    data = read_rows(root / "agreement")
    observed, expected = data["consensus"]["coordinates"], data["consensus"]["expected_exponent"]
    assert sum(observed) == pytest.approx(sum(expected)) and len(observed) == 6
    assert [g["step"] for g in data["growth"]] == [2, 4]
    for row in rows:
        assert 0 < row["uniform"] < row["jaccard"] < 1 and 0 < row["kept_uniform"] < row["kept"] < 1
        assert row["excess"] == pytest.approx(row["jaccard"] - row["exponent"], abs=1e-9)


def test_agreement_of_unchanged_weights() -> None:
    a, b = (torch.rand(40, 50, generator=torch.Generator().manual_seed(s)) < 0.7 for s in (0, 1))
    pair = {
        "total": a.numel(), "changed_a": int(a.sum()), "changed_b": int(b.sum()), "intersection": int((a & b).sum()),
        "jaccard": 0, "jaccard_bernoulli": 0, "jaccard_exponent": 0, "jaccard_margin": 0, "excess_over_exponent": 0,
        "intersection_exponent": float(a.sum() * b.sum() / a.numel()),
    }  # fmt: skip
    found = statistics_of(pair)
    assert found["kept"] == pytest.approx(float((~a & ~b).sum() / (~a | ~b).sum()))
    p, q = 1 - float(a.double().mean()), 1 - float(b.double().mean())
    assert found["kept_uniform"] == pytest.approx(p * q / (p + q - p * q))
    assert found["kept_exponent"] == pytest.approx(found["kept_uniform"], rel=1e-6)


def test_precision(root) -> None:
    rows = carried_out("precision", root)
    assert rows[0]["rate"] == "base"
    for row in rows[1:]:
        assert row["fp32"] <= row["fp16"] <= row["bf16"] <= row["fp8"] <= 1
        assert row["bf16_null"] == pytest.approx(row["bf16"], abs=0.2)
    slow, fast = ([row["update"] for row in rows if row["rate"] == rate] for rate in (1e-4, 3e-4))
    assert max(slow) < min(fast)


def test_interventions(root) -> None:
    rows = carried_out("interventions", root)
    labels = [(row["where"], row["pair"]) for row in rows]
    assert len(set(labels)) == len(rows) == 10
    at = dict(zip(labels, rows, strict=True))
    for kind, count in (("rotate", 2), ("permute", 4)):
        for place, matrices in (("touched", count), ("untouched", 14 - count)):
            assert at[f"{place} by {kind}", "from the base, too"]["matrices"] == matrices
    raw, back, same = (at["touched by permute", label] for label in (
        "from the permuted twin", "the same, mapped back", "same seed, mapped back"))  # fmt: skip
    # mapping back moves marks and makes none: what uniform masks would have stays
    assert back["uniform"] == pytest.approx(raw["uniform"], abs=1e-12)
    # AdamW commutes with permutations, but for sums in another order
    assert same["jaccard"] > 0.98 > raw["jaccard"]
    for row in rows:
        assert 0 < row["jaccard"] <= 1 and row["excess"] == pytest.approx(row["jaccard"] - row["exponent"])


def test_masked(root) -> None:
    rows = carried_out("masked", root)
    assert [row["mask"] for row in rows] == ["base", *(kind for kind in ("dense", *KINDS) for _ in range(2))]
    start = load_checkpoint(root / "runs" / "base" / "final").state_dict()
    for row in rows[1:]:
        after = load_checkpoint(
            root / "runs" / f"rlvr-{row['mask']}-seed{row['seed']}".replace("dense", "linear") / "final"
        )
        end, layers = after.state_dict(), linear_weights(after)
        assert all(torch.equal(start[name], end[name]) for name in start if name not in layers)
        if row["mask"] == "dense":
            continue
        masks = BitMask.load(root / "masked" / "masks" / f"{row['mask']}.safetensors")
        moved = {name: update_mask(start[name], end[name]) for name in layers}
        assert all((moved[name] - masks[name]).count() == 0 for name in layers)
        assert any(mask.count() for mask in moved.values())
        assert all(2 * masks[name].count() == layers[name].numel() for name in layers)


def test_thinned() -> None:
    mask = BitMask.from_dense(torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) < 0.8)
    thin = thinned(mask, 0.5, seed=1)
    assert thin.count() == 1000 and (thin - mask).count() == 0 and thin != thinned(mask, 0.5, seed=2)


def test_adapters(root) -> None:
    rows = carried_out("adapters", root)
    arms = [(kind, rate) for kind in ("lora", "pissa") for rate in (1e-3, 3e-3)]
    assert [(row["adapter"], row.get("rate")) for row in rows] == [("base", None), *arms]
    start = load_checkpoint(root / "runs" / "base" / "final").state_dict()
    for row in rows[1:]:
        after = load_checkpoint(root / "runs" / f"rlvr-{row['adapter']}-lr{row['rate']:g}-seed0" / "final")
        layers = linear_weights(after)
        end = after.state_dict()
        assert end.keys() == start.keys()
        assert all(torch.equal(start[name], end[name]) for name in start if name not in layers)
        assert any(not torch.equal(start[name], end[name]) for name in layers)


def test_what_is_complete_is_not_run_again(root, monkeypatch) -> None:
    carried_out("precision", root)
    before = (root / "precision" / "table.md").read_bytes()

    def train(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(lab_module, "train", train)
    carried_out("precision", root)
    assert (root / "precision" / "table.md").read_bytes() == before


def test_runs_of_other_settings_are_refused(root) -> None:
    Lab(root, quick=True, workers=1).base()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.name != ".lock"}
    with pytest.raises(ValueError, match=r"holds another run, which differs in .*hidden"):
        Lab(root, workers=1).base()
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.name != ".lock"}


def test_command_line(root, capsys) -> None:
    arguments = ["train", "experiment", "precision", "--quick", "--jobs", "1", "--quiet", "--out", str(root)]
    assert main(arguments) == 0
    assert "results in" in capsys.readouterr().out
    assert main([*arguments[:-3], "--jobs", "0", "--out", str(root)]) == 2
    assert "at least one run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown experiment 'x'; choose from paths"):
        experiments.run("x", Lab(root))


def test_every_name_has_a_module() -> None:
    assert list(EXPERIMENTS) == ["paths", "agreement", "precision", "interventions", "masked", "adapters"]


def test_cells_without_a_value() -> None:
    result = Result("t", [{"a": None, "b": 1.0}], {"a": ("A", ".2f"), "b": ("B", ".2f")})
    assert result.markdown() == "### t\n\n| A | B |\n|---|---|\n| - | 1.00 |\n"


def test_fresh_problems() -> None:
    settings = Lab("", quick=True).profile["pretrain"]
    asked = {p.prompt for p in problems(32, "held-out", settings["tasks"], held_out=True)}
    found = fresh(Pretrain(**settings), 64)
    assert found and all(p.held_out and p.prompt not in asked for p in found)
    # two digits have some hundred prompts, an eighth of them held out: five hundred draws leave none
    with pytest.raises(ValueError, match="ask every held-out problem"):
        fresh(Pretrain(**{**settings, "eval_problems": 512}), 64)
