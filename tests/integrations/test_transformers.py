"""MaskedAdamW inside transformers' Trainer and TRL's, with models made on the spot."""

from __future__ import annotations

import copy

import pytest
import torch

from offprin_kernels import low_magnitude_mask
from offprin_kernels.integrations.masks import MasksOf
from offprin_kernels.integrations.transformers import (
    UpdateLogger,
    UpdateWatchCallback,
    masked_optimizer,
    optimizer_cls_and_kwargs,
)
from offprin_kernels.optim import MaskedAdamW

from .models import model, sentences, tokenizer

LAYER = "model.layers.0.self_attn.q_proj.weight"


def masks_of(net):
    return {
        name: low_magnitude_mask(p.detach(), 0.3)
        for name, p in net.named_parameters()
        if p.dim() == 2 and "layers" in name
    }


def settings(folder, kind, **options):
    return kind(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **options,
    )  # fmt: skip


def rows(count: int = 8):
    token_ids = torch.randint(4, 64, (count, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in token_ids]


def check(net, before, masks) -> None:
    """What the masks cover moved inside them and nowhere else; the rest moved as a whole."""
    for (name, p), old in zip(net.named_parameters(), before.parameters(), strict=True):
        moved = p.detach() != old
        if name in masks:
            dense = masks[name].to_dense()
            assert not bool(moved[~dense].any()) and bool(moved[dense].any()), name
        else:
            assert bool(moved.any()), name


@pytest.mark.parametrize("built", ["by the trainer", "by us"])
def test_trainer(tmp_path, built) -> None:
    from transformers import Trainer, TrainingArguments

    net = model()
    before, masks = copy.deepcopy(net), masks_of(net)
    args = settings(tmp_path, TrainingArguments)
    logger = UpdateLogger(energies=[LAYER], k=4)
    options = {"rounding": "master", "track_visible": True}
    if built == "by us":
        given = {"optimizers": (masked_optimizer(net, args, masks, **options), None)}
    else:
        given = {"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs(net, args, masks, **options)}
    trainer = Trainer(net, args, train_dataset=rows(), callbacks=[logger], **given)
    trainer.train()
    check(net, before, masks)
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, MaskedAdamW) and [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert len(optimizer.state[net.get_parameter(LAYER)]["exp_avg"]) == masks[LAYER].count()
    logs = [log for log in trainer.state.log_history if "visible_fraction" in log]
    assert len(logs) >= 3 and all(0 < log["visible_fraction"] < 1 for log in logs[:3])
    total = sum(mask.count() for mask in masks.values())
    total += sum(p.numel() for name, p in net.named_parameters() if name not in masks)
    assert logs[0]["masked_weights"] == total
    assert logs[2][f"energy/{LAYER}/isotropic_left"] == 4 / 32 and 0 < logs[2][f"energy/{LAYER}/left"] < 1


def test_trainer_checkpoints_resume(tmp_path) -> None:
    """Stopped after two steps and resumed from its checkpoint, a run ends where one without a stop does."""
    from transformers import Trainer, TrainingArguments

    ends = []
    for interrupted in (False, True):
        net = model()
        args = settings(tmp_path / str(interrupted), TrainingArguments, lr_scheduler_type="constant")
        args.save_strategy, args.save_steps = "steps", 2
        masks = masks_of(net)
        chosen = optimizer_cls_and_kwargs(net, args, masks, rounding="stochastic", seed=4)
        Trainer(net, args, train_dataset=rows(), optimizer_cls_and_kwargs=chosen).train()
        if interrupted:
            net = model()
            chosen = optimizer_cls_and_kwargs(net, args, masks, rounding="stochastic", seed=4)
            trainer = Trainer(net, args, train_dataset=rows(), optimizer_cls_and_kwargs=chosen)
            trainer.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-2"))
        ends.append(net)
    assert all(torch.equal(p, q) for p, q in zip(ends[0].parameters(), ends[1].parameters(), strict=True))


def test_sft_trainer(tmp_path) -> None:
    trl = pytest.importorskip("trl", reason="a peer that users have and the package does not need")
    from datasets import Dataset

    net = model()
    before, masks = copy.deepcopy(net), masks_of(net)
    args = settings(tmp_path, trl.SFTConfig, max_length=16, bf16=False)
    chosen = optimizer_cls_and_kwargs(net, args, masks, rounding="kahan", track_visible=True)
    data = Dataset.from_dict({"text": sentences(8)})
    trainer = trl.SFTTrainer(
        net,
        args,
        train_dataset=data,
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=chosen,
        callbacks=[UpdateLogger()],
    )
    trainer.train()
    check(net, before, masks)
    assert any(log.get("visible_fraction", 0) > 0 for log in trainer.state.log_history)


def test_grpo_trainer(tmp_path) -> None:
    trl = pytest.importorskip("trl", reason="a peer that users have and the package does not need")
    from datasets import Dataset

    net = model()
    before, masks = copy.deepcopy(net), masks_of(net)
    args = settings(tmp_path, trl.GRPOConfig, num_generations=2, max_completion_length=6, bf16=False)
    optimizer = masked_optimizer(net, args, masks, rounding="master", track_visible=True)
    data = Dataset.from_dict({"prompt": sentences(8)})

    def reward(completions, **_):
        """Differs between samples, so that advantages are not all zero."""
        return [float(sum(map(ord, text)) % 7) for text in completions]

    trainer = trl.GRPOTrainer(
        net, reward, args, train_dataset=data, processing_class=tokenizer(), optimizers=(optimizer, None)
    )
    UpdateLogger().install(trainer)
    UpdateWatchCallback(every=2, energies="linear", k=4).install(trainer)
    trainer.train()
    watched = [log for log in trainer.state.log_history if "update/changed" in log]
    # TRL logs step 2 with the measurement after it; step 3 is none of every second
    assert [log["step"] for log in watched] == [2]
    assert 0 < watched[0]["update/linear/visible_fraction"] < 1
    assert watched[0][f"update/energy/{LAYER}/isotropic_left"] == 4 / 32
    moved = {n: p.detach() != q for (n, p), q in zip(net.named_parameters(), before.parameters(), strict=True)}
    assert any(bool(m.any()) for m in moved.values())
    assert all(not bool(moved[name][~mask.to_dense()].any()) for name, mask in masks.items())
    assert all("visible_fraction" in log for log in trainer.state.log_history[:3])


def test_masks_that_do_not_fit_the_model() -> None:
    net = model()
    masks = masks_of(net)
    with pytest.raises(ValueError, match=r"nobody: the model has no such parameter"):
        MasksOf(net, {**masks, "nobody": masks[LAYER]})
    with pytest.raises(ValueError, match=r"lm_head.weight: the mask is"):
        MasksOf(net, {"lm_head.weight": masks[LAYER]})
    found = MasksOf(torch.nn.parallel.DataParallel(net), masks)
    assert found("", net.get_parameter(LAYER)) is masks[LAYER] and found("", net.lm_head.weight) is None


def test_energies_of_unknown_layers(tmp_path) -> None:
    from transformers import TrainerState

    with pytest.raises(KeyError, match="nobody"):
        UpdateLogger(energies=["nobody"]).on_train_begin(None, TrainerState(), None, model=model())


def visible(before, net) -> tuple[int, int]:
    """Changed and all weights in bf16."""
    pairs = [
        (p.detach().bfloat16(), q.detach().bfloat16())
        for p, q in zip(before.parameters(), net.parameters(), strict=True)
    ]
    return sum(int((p != q).sum()) for p, q in pairs), sum(p.numel() for p, _ in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_watch_in_trainers_with_their_own_optimizer(tmp_path, dtype) -> None:
    """What the last log says is what the finished model shows; what is logged reaches callbacks that report."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Report(TrainerCallback):
        seen = []

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            self.seen.append(dict(logs))

    net = model(dtype)
    before = copy.deepcopy(net)
    trainer = Trainer(net, settings(tmp_path, TrainingArguments), train_dataset=rows(), callbacks=[Report])
    UpdateWatchCallback(every=1, energies=[LAYER], k=4).install(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "update/changed" in log]
    assert [log["step"] for log in logs] == [1, 2, 3]
    changed, total = visible(before, net)
    assert (logs[2]["update/changed"], logs[2]["update/total"]) == (changed, total)
    assert logs[0]["update/relative_update"] < logs[2]["update/relative_update"]
    assert 0 < logs[2][f"update/energy/{LAYER}/both"] < logs[2][f"update/energy/{LAYER}/left"] < 1
    assert [log.get("update/changed") for log in Report.seen[:3]] == [log["update/changed"] for log in logs]


def test_watch_of_a_resumed_run(tmp_path) -> None:
    """It needs the base that training began from, and then goes on as if nothing had happened."""
    from transformers import Trainer, TrainingArguments

    def train(watch, folder, **options):
        args = settings(folder, TrainingArguments, lr_scheduler_type="constant")
        args.save_strategy, args.save_steps = "steps", 2
        trainer = Trainer(model(), args, train_dataset=rows(), callbacks=[watch])
        trainer.train(**options)
        return [log for log in trainer.state.log_history if "update/changed" in log][-1]

    model().save_pretrained(tmp_path / "base")
    basis = tmp_path / "basis.safetensors"
    options = {"every": 3, "energies": [LAYER], "k": 4, "basis": basis}
    whole = train(UpdateWatchCallback(**options), tmp_path / "run")
    again = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2")}
    with pytest.raises(ValueError, match=r"resumes at step 2.*base="):
        train(UpdateWatchCallback(**options), tmp_path / "resumed", **again)
    with pytest.raises(ValueError, match=r"resumes at step 2.*base="):
        train(UpdateLogger(options["energies"]), tmp_path / "resumed", **again)
    resumed = train(UpdateWatchCallback(**options, base=tmp_path / "base"), tmp_path / "resumed", **again)
    keys = [key for key in whole if key.startswith("update/")]
    assert len(keys) > 20 and [resumed[key] for key in keys] == [whole[key] for key in keys]
    with pytest.raises(ValueError, match="at least 1"):
        UpdateWatchCallback(every=0)


def test_replicas_are_watched_by_one_process() -> None:
    from types import SimpleNamespace

    watch = UpdateWatchCallback(every=1)
    state = SimpleNamespace(global_step=0, is_world_process_zero=False, log_history=[])
    watch.on_train_begin(None, state, None, model=model())
    watch.on_step_end(None, state, None)
    assert watch.watch is None and watch.found() == {}
