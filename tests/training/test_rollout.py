"""Sampling against transformers' own generation, and frequencies against probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from offprin_kernels.training import model as models
from offprin_kernels.training import objectives
from offprin_kernels.training.rollout import batch, sample
from offprin_kernels.training.tasks import problems

from . import tiny

MOST = 24


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    texts = ["1", "s21=", *(p.prompt for p in problems(30, "prompts"))]
    assert len({len(text) for text in texts}) > 5
    return texts


@torch.no_grad()
def test_greedy_is_what_transformers_generates(prompts) -> None:
    net = tiny.lively()
    found = sample(net, prompts, most=MOST, temperature=0)
    lengths = found.completion.sum(1).tolist()
    # so many ends that finished sequences leave the cache more than once, and some that never come to one
    assert len(set(lengths)) > 5 and max(lengths) == MOST
    for i, prompt in enumerate(prompts):
        ids = torch.tensor(models.encode([prompt]))
        wanted = net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MOST)[0]
        assert found.tokens[i][found.present[i]].tolist() == wanted.tolist()
        assert found.texts()[i] == models.decode(wanted[ids.shape[1] :].tolist())


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_log_probs_are_those_of_a_full_forward(prompts, temperature) -> None:
    net = tiny.lively()
    found = sample(net, prompts, most=MOST, temperature=temperature, generator=torch.Generator().manual_seed(0))
    assert len(set(found.completion.sum(1).tolist())) > 5
    logits = objectives.completion_logits(net, found)
    again = objectives.log_probs_of(logits, found)
    bound = 2 * tiny.rounding(net, logits)
    assert bound < 0.01
    assert float((again - found.log_probs)[found.completion].abs().max()) <= bound
    assert not bool(found.log_probs[~found.completion].any())
    # prompt by prompt, without any padding
    for i in range(0, len(prompts), 7):
        ids = found.tokens[i][found.present[i]][None]
        alone = net(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        own = found.log_probs[i][found.completion[i]]
        torch.testing.assert_close(alone[-len(own) :], own, rtol=0, atol=bound)


@torch.no_grad()
def test_some_of_the_sequences(prompts) -> None:
    net = tiny.lively()
    found = sample(net, prompts, most=MOST, generator=torch.Generator().manual_seed(1))
    short = found.present.sum(1).argsort()[:5]
    for rows in (torch.tensor([3, 0, 7]), slice(2, 6), short):
        part = found[rows]
        assert part.texts() == [found.texts()[i] for i in torch.arange(len(prompts))[rows].tolist()]
        logits = objectives.completion_logits(net, part)
        difference = objectives.log_probs_of(logits, part) - part.log_probs
        assert float(difference[part.completion].abs().max()) <= 2 * tiny.rounding(net, logits)
        assert bool(part.present[:, 0].any()) and bool(part.present[:, -1].any())
    assert found[short].tokens.shape[1] < found.tokens.shape[1]


def test_given_completions() -> None:
    given = batch([("s21=", "#12"), ("r345=", "5:34#")])
    assert given.start == 5 and given.texts() == ["#12", "5:34#"]
    assert given.present.sum(1).tolist() == [4 + 3 + 1, 5 + 5 + 1] and not given.present[0, 0]
    assert [int(row[p][-1]) for row, p in zip(given.tokens, given.present, strict=True)] == [models.END_ID] * 2


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_frequencies_are_probabilities(temperature) -> None:
    """Two tokens after one prompt: a chi-squared test over all pairs that are likely enough."""
    net, count, prompt = tiny.lively(), 6000, "s21="
    net.lm_head.weight.mul_(0.5)  # or three tokens take it all
    found = sample(net, [prompt] * count, most=2, temperature=temperature, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor(models.encode([prompt]))
    size = net.lm_head.weight.shape[0]
    first = (net(input_ids=ids).logits[0, -1].double() / temperature).softmax(-1)
    pairs = torch.cat([ids.expand(size, -1), torch.arange(size)[:, None]], 1)
    joint = first[:, None] * (net(input_ids=pairs).logits[:, -1].double() / temperature).softmax(-1)
    # what ends has no second token; count it in the place of padding
    joint[models.END_ID] = 0
    joint[models.END_ID, models.PAD_ID] = first[models.END_ID]
    tokens = found.tokens[:, found.start :]
    seen = torch.bincount(tokens[:, 0] * size + tokens[:, 1], minlength=size * size).double()
    expected = joint.flatten() * count
    often = expected >= 5
    seen = torch.cat([seen[often], seen[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    freedom = len(seen) - 1
    assert freedom > 20 and bool((found.tokens[:, -2] == models.END_ID).any())
    chi = float(((seen - expected).square() / expected).sum())
    assert chi < freedom + 5 * math.sqrt(2 * freedom), (chi, freedom)


def test_the_same_generator_gives_the_same_tokens(prompts) -> None:
    net = tiny.lively()
    first, same, other = (
        sample(net, prompts, most=8, generator=torch.Generator().manual_seed(seed)).texts() for seed in (5, 5, 6)
    )
    assert first == same != other
