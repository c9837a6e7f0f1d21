"""The stages end to end: what they log, what they leave alone, and that the same seed gives the same bits."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from offprin_kernels import BitMask, random_mask
from offprin_kernels.training import stages
from offprin_kernels.training.model import linear_weights, load_checkpoint, save_checkpoint
from offprin_kernels.training.runs import read_log
from offprin_kernels.training.settings import Size
from offprin_kernels.training.stages import train

from . import tiny

GATES = {
    "kl_old", "kl_base", "entropy", "visible_last_step", "visible_fraction", "update_norm", "energy",
    "energy_isotropic",
}  # fmt: skip
KEYS = {
    "pretrain": {"step", "loss", "tokens", "lr", "tokens_per_second"},
    "sft": {"step", "loss", "tokens", "tokens_per_second", *GATES},
    "rlvr": {"step", "reward", "tokens", "length", "tokens_per_second", "seconds", "optimizer_share", *GATES},
}
ACCURACY = {"accuracy", "accuracy/reverse", "accuracy/sort", "worked"}


@pytest.fixture(scope="module")
def masks(base, tmp_path_factory):
    """A third of every linear layer."""
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    weights = linear_weights(load_checkpoint(base))
    BitMask.save({name: random_mask(w.shape, 0.3, seed=i) for i, (name, w) in enumerate(weights.items())}, path)
    return path


def settings_of(stage: str, base, **given):
    return tiny.pretrain(**given) if stage == "pretrain" else getattr(tiny, stage)(base, **given)


KINDS = [
    ("pretrain", {}), ("sft", {}), ("sft", {"adapter": "pissa"}), ("rlvr", {}), ("rlvr", {"adapter": "lora"}),
    ("rlvr", {"objective": "grpo"}),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "given"), KINDS, ids=["-".join([s, *g.values()]) for s, g in KINDS])
def test_a_stage(base, tmp_path, stage, given) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        final = train(stage, settings_of(stage, base, seed=seed, **given), tmp_path / name)
        assert final == tmp_path / name / "final"
    # the same seed gives the same bits, another one others
    first, same, other = (tiny.ended(tmp_path / name) for name in "abc")
    assert first == same
    assert first[0]["final"] != other[0]["final"] and first[1] != other[1]
    assert set(first[0]) == {"step-00002", "step-00004", "final"} and first[0]["final"] == first[0]["step-00004"]
    assert first[0]["final"] != first[0]["step-00002"]
    # the log has what it promises, in every row
    log = read_log(tmp_path / "a")
    for i, row in enumerate(log):
        evaluated = ACCURACY if i % 2 else set()
        if i == 0 and stage != "pretrain":
            evaluated = {"accuracy_before"}
        # accuracy by style, where the style occurs
        found = set(row) - {"accuracy/worked", "accuracy/direct"}
        assert found == KEYS[stage] | evaluated and row["step"] == i + 1
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row.values())
        assert row["tokens_per_second"] > 0
        if stage != "pretrain":
            assert row["kl_base"] >= -1e-6 and row["kl_old"] >= -1e-6 and row["entropy"] > 0
            assert 0 < row["visible_fraction"] < 1 and 0 <= row["energy"] <= 1
    if stage != "pretrain":
        # before the first step the policy is the base
        assert log[0]["kl_base"] == pytest.approx(log[0]["kl_old"], rel=1e-3, abs=1e-7)
        assert log[0]["update_norm"] > 0


def test_the_final_checkpoint_is_what_was_measured(base, tmp_path) -> None:
    """Logged against the files: visible weights by a comparison of bf16, accuracy by sampling from the checkpoint."""
    settings = tiny.sft(base)
    final = load_checkpoint(train("sft", settings, tmp_path / "run"))
    last = tiny.rows(tmp_path / "run")[-1]
    pairs = list(zip(linear_weights(load_checkpoint(base)).values(), linear_weights(final).values(), strict=True))
    changed = sum(int((a != b).sum()) for a, b in pairs)
    assert last["visible_fraction"] == changed / sum(a.numel() for a, _ in pairs)
    # an evaluation of the rounded weights may differ in a few of its 16 problems
    assert abs(stages.evaluate(final, settings)["accuracy"] - last["accuracy"]) <= 3 / 16


def test_learning(base, tmp_path) -> None:
    """Thirty rounds of reinforcement earn more than the base does, on problems never trained on, too."""
    asked = {"prompts": 16, "samples": 8, "eval_problems": 200}
    train("rlvr", tiny.rlvr(base, steps=30, eval_every=30, save_every=30, **asked), tmp_path / "run")
    log = tiny.rows(tmp_path / "run")
    before = stages.evaluate(load_checkpoint(base), tiny.rlvr(base, **asked))["accuracy"]
    assert sum(r["reward"] for r in log[-5:]) > sum(r["reward"] for r in log[:5])
    assert log[-1]["accuracy"] > before


@pytest.mark.parametrize("stage", ["rlvr", "sft"])
def test_masks_hold(base, masks, tmp_path, stage) -> None:
    """Outside its mask a weight keeps its bits, and so does every tensor that is no linear layer."""
    final = train(stage, settings_of(stage, base, masks=str(masks)), tmp_path / "run")
    found = {name: mask.to_dense() for name, mask in BitMask.load(masks).items()}
    before, after = (tiny.spans(path / "model.safetensors") for path in (base, final))
    exact = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["model"]
    start = load_checkpoint(base).state_dict()
    assert set(before) == set(after) == set(start)
    for name, held in before.items():
        moved = exact[name] != start[name]
        if name not in found:
            assert after[name] == held and not bool(moved.any()), name
            continue
        codes = [torch.frombuffer(bytearray(b), dtype=torch.int16).view(found[name].shape) for b in (held, after[name])]
        changed = codes[0] != codes[1]
        assert not bool(changed[~found[name]].any()) and not bool(moved[~found[name]].any()), name
        assert bool(changed[found[name]].any()), name
    assert all(row["visible_fraction"] < 0.301 for row in tiny.rows(tmp_path / "run"))


def test_linear_only(base, tmp_path) -> None:
    final = train("sft", tiny.sft(base, linear_only=True), tmp_path / "run")
    before, after = (tiny.spans(path / "model.safetensors") for path in (base, final))
    for name, held in before.items():
        assert (after[name] != held) == ("_proj." in name), name


def test_adapters_leave_all_else_alone(base, tmp_path) -> None:
    final = train("rlvr", tiny.rlvr(base, adapter="lora"), tmp_path / "run")
    before, after = (tiny.spans(path / "model.safetensors") for path in (base, final))
    for name, held in before.items():
        assert (after[name] != held) == ("_proj." in name), name


def test_rounds_without_a_difference_move_nothing(base, tmp_path, monkeypatch) -> None:
    """Where all completions of every prompt earn the same there is nothing to learn, and dapo takes no step."""
    monkeypatch.setattr(stages, "reward", lambda problem, completion: -1.0)
    final = train("rlvr", tiny.rlvr(base), tmp_path / "run")
    assert tiny.spans(final / "model.safetensors") == tiny.spans(base / "model.safetensors")
    for row in tiny.rows(tmp_path / "run"):
        assert row["visible_last_step"] == row["visible_fraction"] == row["update_norm"] == row["kl_base"] == 0
        assert row["reward"] == -1 and "energy" not in row


def test_what_the_last_step_showed_is_of_this_round(base, tmp_path, monkeypatch) -> None:
    """A round without a step, after one with steps, has shown nothing."""
    asked = []

    def earned(problem, completion) -> float:
        asked.append(problem)
        return float(len(asked) % 2) if len(asked) <= 32 else -1.0

    monkeypatch.setattr(stages, "reward", earned)
    train("rlvr", tiny.rlvr(base, eval_every=4), tmp_path / "run")
    first, *rest = tiny.rows(tmp_path / "run")
    assert first["visible_last_step"] > 0 and [row["visible_last_step"] for row in rest] == [0, 0, 0]
    assert all(row["visible_fraction"] == first["visible_fraction"] for row in rest)


@pytest.mark.parametrize("stage", KEYS)
def test_every_step_has_problems_of_its_own(base, tmp_path, monkeypatch, stage) -> None:
    drawn, real = {}, stages.problems

    def draw(count, key, mixture, **given):
        found = real(count, key, mixture, **given)
        # none that evaluations ask is trained on, and none of these is held out
        assert all(p.held_out == given.get("held_out", False) for p in found)
        if not given.get("held_out"):
            drawn.setdefault(seed, []).append([p.prompt for p in found])
        return found

    monkeypatch.setattr(stages, "problems", draw)
    for seed in (0, 1):
        train(stage, settings_of(stage, base, seed=seed), tmp_path / str(seed))
    batches = [*drawn[0], *drawn[1]]
    assert len(batches) == 8 and all(a != b for i, a in enumerate(batches) for b in batches[:i])


@pytest.mark.parametrize("objective", ["dapo", "grpo", "sft"])
def test_micro_batches_add_up(base, monkeypatch, objective) -> None:
    """The gradient is that of the whole batch, however it is cut."""
    settings = tiny.rlvr(base, objective="dapo" if objective == "sft" else objective, lr=0.0)
    asked = stages.problems(24, "micro", tiny.TASKS)
    gradients = []
    for size in (64, 7):
        monkeypatch.setattr(stages, "MICRO", size)
        net, optimizer = stages.prepared(settings)
        if objective == "sft":
            solved = [(p.prompt, p.solution(worked=i % 2 > 0)) for i, p in enumerate(asked)]
            stages.imitate(net, optimizer, stages.batch(solved))
        else:
            reference = load_checkpoint(base)
            with torch.no_grad():
                for param in reference.parameters():
                    param.mul_(1.1)  # or the penalty's gradient is zero
            sampled = stages.sample(net, [p.prompt for p in asked], most=16, generator=stages.generator("micro"))
            assert len(set(sampled.completion.sum(1).tolist())) > 1
            advantage = torch.linspace(-1, 2, 24)
            stages.reinforce(settings, net, reference, optimizer, sampled, torch.arange(1, 24), advantage)
        gradients.append([param.grad.clone() for param in net.parameters()])
    for whole, cut in zip(*gradients, strict=True):
        # sums of a few hundred terms in another order, each of which passes through two layers
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))


def test_a_target_ends_sft_early(base, tmp_path) -> None:
    reached = tiny.sft(base, steps=40, target=0.01, save_every=40)
    final = train("sft", reached, tmp_path / "early")
    assert len(tiny.rows(tmp_path / "early")) == 2 and tiny.rows(tmp_path / "early")[-1]["accuracy"] >= 0.01
    # the same as a run of two steps
    train("sft", tiny.sft(base, steps=2), tmp_path / "short")
    assert tiny.spans(final / "model.safetensors") == tiny.spans(tmp_path / "short" / "final" / "model.safetensors")
    # and no step more where only the final checkpoint is missing
    before = tiny.ended(tmp_path / "early")
    shutil.rmtree(final)
    train("sft", reached, tmp_path / "early")
    assert tiny.ended(tmp_path / "early") == before


def test_a_target_out_of_reach(base, tmp_path) -> None:
    train("sft", tiny.sft(base, target=1.0, lr=0.0), tmp_path / "run")
    assert len(tiny.rows(tmp_path / "run")) == 4


# ---- what is refused, in one sentence, before a directory is made


def refused(stage, settings, out) -> str:
    with pytest.raises(ValueError) as error:
        train(stage, settings, out)
    assert "\n" not in str(error.value) and not out.exists()
    return str(error.value)


def test_bases_and_masks_that_do_not_fit(base, masks, tmp_path) -> None:
    out = tmp_path / "run"
    assert "cannot be read" in refused("sft", tiny.sft(tmp_path / "nothing"), out)
    assert "k must be between 1 and 8" in refused("rlvr", tiny.rlvr(base, k=9), out)
    assert "rank 17 exceeds 16" in refused("rlvr", tiny.rlvr(base, adapter="lora", rank=17), out)
    assert "unknown stage 'dpo'; choose from pretrain" in refused("dpo", tiny.rlvr(base), out)
    if not torch.cuda.is_available():
        assert "no CUDA device" in refused("pretrain", tiny.pretrain(device="cuda"), out)

    def with_masks(path) -> str:
        return refused("rlvr", tiny.rlvr(base, masks=str(path)), out)

    found = BitMask.load(masks)
    BitMask.save({**found, "lm_head.weight": BitMask.zeros((19, 32))}, tmp_path / "more")
    train("sft", tiny.sft(base, masks=str(tmp_path / "more"), steps=1), tmp_path / "fits")
    name = next(iter(found))
    BitMask.save({**found, name: BitMask.zeros((3, 3))}, tmp_path / "other")
    assert f"masks of another model: 1 of 14 linear layers have none of their shape, {name} first" in with_masks(
        tmp_path / "other"
    )
    BitMask.save({name: found[name]}, tmp_path / "few")
    assert "13 of 14" in with_masks(tmp_path / "few")
    assert "nowhere" in with_masks(tmp_path / "nowhere")
    assert "holds no masks" in with_masks(base / "model.safetensors")
    assert "cannot be read" in with_masks(base / "config.json")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"base": ""}, "a base is needed"), ({"adapter": "dora"}, "unknown adapter 'dora'; choose lora or pissa"),
        ({"adapter": "lora", "masks": "m"}, "give one of the two"), ({"objective": "ppo"}, "unknown objective 'ppo'"),
        ({"samples": 1}, "at least 2"), ({"minibatches": 9}, "cannot exceed prompts"), ({"steps": 0}, "at least 1"),
        ({"lr": -1.0}, "lr must not be negative"), ({"clip_low": 1.0}, "clip_low"), ({"device": "tpu"}, "device 'tpu'"),
        ({"rank": 0}, "rank must be at least 1"), ({"alpha": 0.0}, "alpha must be positive"),
        ({"lr": float("nan")}, "lr must"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(given, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny.rlvr(**{"base": "somewhere", **given})


def test_sizes_that_are_refused() -> None:
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, got 3 and 2"):
        tiny.pretrain(heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="worked_share must be between 0 and 1"):
        tiny.pretrain(worked_share=1.5)
    assert tiny.pretrain().size == tiny.SIZE != Size()


def test_grpo_has_a_penalty_by_default() -> None:
    assert tiny.rlvr("b").kl_weight == 0 and tiny.rlvr("b", objective="grpo").kl_weight == 0.02
    assert tiny.rlvr("b", objective="grpo", beta=0.0).kl_weight == 0 and tiny.rlvr("b", beta=0.5).kl_weight == 0.5


def test_saving_takes_the_adapters_in(base, tmp_path) -> None:
    """A final checkpoint of an adapter is a plain model, from which the next stage can begin."""
    final = train("sft", tiny.sft(base, adapter="pissa", steps=2), tmp_path / "first")
    save_checkpoint(load_checkpoint(final), tmp_path / "again")
    assert tiny.spans(tmp_path / "again" / "model.safetensors") == tiny.spans(final / "model.safetensors")
    train("rlvr", tiny.rlvr(final, steps=1), tmp_path / "second")


def test_evaluation_by_style(base, monkeypatch) -> None:
    """Shares and accuracies of answers with steps and without, counted by hand on answers that are given."""
    settings = tiny.sft(base, eval_problems=4)
    asked = stages.problems(4, "held-out", settings.tasks, held_out=True)
    texts = [f"steps#{asked[0].answer}", "steps#wrong", f"#{asked[2].answer}", "no mark"]

    class Given:
        def texts(self) -> list[str]:
            return texts

    monkeypatch.setattr(stages, "sample", lambda *_, **__: Given())
    found = stages.evaluate(load_checkpoint(base), settings)
    assert found["accuracy"] == 0.5 and found["worked"] == 0.5
    assert found["accuracy/worked"] == 0.5 and found["accuracy/direct"] == 0.5
