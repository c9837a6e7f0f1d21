"""The reference loop: batched sampling against transformers' generate, and the optimizer's share of an RLVR step."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

pytest.importorskip("transformers")

from offprin_kernels.training.model import END_ID, decode, encode
from offprin_kernels.training.rollout import sample
from offprin_kernels.training.runs import read_log
from offprin_kernels.training.settings import RLVR, Pretrain
from offprin_kernels.training.stages import train
from offprin_kernels.training.tasks import problems

PROMPTS, ALONE = 256, 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The default model after some steps: completions that end, though not well."""
    return train(
        "pretrain", Pretrain(steps=120, save_every=120, eval_every=120), tmp_path_factory.mktemp("base") / "run"
    )


def test_sampling(benchmark, record, base) -> None:
    from offprin_kernels.training.model import load_checkpoint

    model = load_checkpoint(base).eval()
    prompts = [problem.prompt for problem in problems(PROMPTS, "benchmark")]

    def together() -> tuple[float, list[str]]:
        began = time.perf_counter()
        found = sample(model, prompts, most=64, temperature=0)
        return int(found.completion.sum()) / (time.perf_counter() - began), found.texts()

    def alone() -> tuple[float, list[str]]:
        began, tokens, texts = time.perf_counter(), 0, []
        for ids in encode(prompts[:ALONE]):
            output = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=END_ID)
            tokens += output.shape[1] - len(ids)
            texts.append(decode(output[0, len(ids) :].tolist()))
        return tokens / (time.perf_counter() - began), texts

    together(), alone()
    rates = [(together(), alone()) for _ in range(5)]
    for (_, ours), (_, theirs) in rates:
        assert ours[:ALONE] == theirs
    record(
        f"sampling {PROMPTS} prompts at once",
        statistics.median(ours / theirs for (ours, _), (theirs, _) in rates),
        5.0,
        "times the tokens per second of transformers' generate, a prompt at a time",
        tokens_per_second=statistics.median(ours for (ours, _), _ in rates),
        peer_tokens_per_second=statistics.median(theirs for _, (theirs, _) in rates),
    )
    benchmark.pedantic(together, rounds=3)


def test_optimizer_share(benchmark, record, base, tmp_path) -> None:
    settings = RLVR(base=str(base), steps=6, save_every=6, eval_every=6, eval_problems=8, tasks={"sort": [3, 4]})
    train("rlvr", settings, tmp_path / "run")
    # steps that had something to learn from
    shares = [row["optimizer_share"] for row in read_log(tmp_path / "run") if row["optimizer_share"] > 0]
    assert shares
    share = statistics.median(shares)
    record(
        f"optimizer's share of an RLVR step: {share:.4f}",
        0.1 / share,
        1.0,
        "times under the budget of 10 % of sampling, training and optimizer together",
    )
    benchmark.pedantic(lambda: None, rounds=1)
