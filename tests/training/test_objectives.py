"""Losses against scalar loops and closed forms, divergences against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from offprin_kernels.training import objectives

ROWS, LENGTH, VOCABULARY = 5, 7, 9
LOW, HIGH = 0.2, 0.28


def drawn(seed: int = 0):
    """new, old, advantage, where: ratios on both sides of both clips, advantages of both signs and zero."""
    generator = torch.Generator().manual_seed(seed)
    new = -torch.rand(ROWS, LENGTH, generator=generator, dtype=torch.float64) * 3
    old = new - torch.linspace(-0.6, 0.6, LENGTH, dtype=torch.float64) - 0.01 * new
    advantage = torch.tensor([1.3, -0.7, 0.0, 0.4, -2.0], dtype=torch.float64)
    where = torch.arange(LENGTH) < torch.tensor([7, 3, 5, 1, 6])[:, None]
    return new, old, advantage, where


def scalar_loss(new, old, advantage, where, total) -> float:
    sequences = []
    for i in range(ROWS):
        own = []
        for j in range(LENGTH):
            if where[i][j]:
                ratio, gain = math.exp(new[i][j] - old[i][j]), float(advantage[i])
                # clipped only where going further would pay
                ratio = min(ratio, 1 + HIGH) if gain > 0 else max(ratio, 1 - LOW)
                own.append(ratio * gain)
        sequences.append(own)
    if total is not None:
        return -sum(map(sum, sequences)) / total
    return -sum(sum(own) / len(own) for own in sequences) / ROWS


@pytest.mark.parametrize("total", [None, 22.0, 40.0], ids=["grpo", "dapo", "dapo of a larger batch"])
def test_policy_loss(total) -> None:
    new, old, advantage, where = drawn()
    loss = objectives.policy_loss(new, old, advantage, where, clip_low=LOW, clip_high=HIGH, total=total)
    wanted = scalar_loss(new.tolist(), old.tolist(), advantage, where.tolist(), total)
    assert float(loss) == pytest.approx(wanted, rel=1e-12)


def test_the_gradient_is_zero_exactly_where_it_is_clipped() -> None:
    new, old, advantage, where = drawn()
    new.requires_grad_()
    objectives.policy_loss(new, old, advantage, where, clip_low=LOW, clip_high=HIGH, total=22.0).backward()
    ratio = (new - old).detach().exp()
    gain = advantage[:, None].expand_as(ratio)
    clipped = ((gain > 0) & (ratio > 1 + HIGH)) | ((gain < 0) & (ratio < 1 - LOW))
    silent = clipped | (gain == 0) | ~where
    for side in ((gain > 0) & clipped & where, (gain < 0) & clipped & where, ~silent):
        assert bool(side.any())
    assert not bool(new.grad[silent].any())
    torch.testing.assert_close(new.grad[~silent], (-ratio * gain / 22)[~silent], rtol=1e-12, atol=0)


def test_at_ratio_one_it_is_reinforce() -> None:
    """d(-A log p)/d logits = A (p - one-hot), over all tokens."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    *_, advantage, where = drawn()
    new = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    objectives.policy_loss(
        new, new.detach(), advantage, where, clip_low=LOW, clip_high=HIGH, total=22.0
    ).backward()  # fmt: skip
    one_hot = torch.nn.functional.one_hot(tokens, VOCABULARY)
    wanted = (advantage[:, None] * where / 22)[..., None] * (logits.detach().softmax(-1) - one_hot)
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-10, atol=1e-14)


def test_advantages() -> None:
    rewards = torch.tensor([[1.0, -1, -1, -1], [1, 1, 1, 1], [-1, -1, -1, -1], [1, 1, -1, -1]])
    found = objectives.advantages(rewards)
    assert not bool(found[1].any()) and not bool(found[2].any())
    for i in (0, 3):
        own = rewards[i].tolist()
        mean = sum(own) / 4
        deviation = math.sqrt(sum((r - mean) ** 2 for r in own) / 3)
        torch.testing.assert_close(found[i], torch.tensor([(r - mean) / deviation for r in own]), rtol=2e-6, atol=0)


def two_policies() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    p, q = torch.randn(2, VOCABULARY, generator=generator, dtype=torch.float64) * 2
    return p, q


def test_penalty_is_an_unbiased_estimate_of_the_divergence() -> None:
    """Over a whole vocabulary, each token weighed by how often it is sampled."""
    p, q = two_policies()
    one = torch.ones(1, 1, dtype=torch.bool)
    new, base = p.log_softmax(0), q.log_softmax(0)
    each = [float(objectives.penalty(new[i].view(1, 1), base[i].view(1, 1), one)) for i in range(VOCABULARY)]
    assert min(each) >= 0
    expected = sum(float(new[i].exp()) * each[i] for i in range(VOCABULARY))
    exact = float(kl_divergence(Categorical(logits=p), Categorical(logits=q)))
    assert exact > 0.1 and expected == pytest.approx(exact, rel=1e-12)
    assert float(objectives.penalty(new[None], new[None], torch.ones(1, VOCABULARY))) == 0


@pytest.mark.parametrize("total", [None, 22.0])
def test_penalty_is_averaged_as_the_loss_is(total) -> None:
    new, base, _, where = drawn(4)
    each = [
        [math.exp(b - n) - (b - n) - 1 for n, b, there in zip(*row, strict=True) if there]
        for row in zip(new.tolist(), base.tolist(), where.tolist(), strict=True)
    ]
    wanted = sum(map(sum, each)) / total if total else sum(sum(own) / len(own) for own in each) / ROWS
    assert float(objectives.penalty(new, base, where, total)) == pytest.approx(wanted, rel=1e-12)


def test_divergence_and_entropy() -> None:
    generator = torch.Generator().manual_seed(5)
    p, q = torch.randn(2, ROWS, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64) * 2
    *_, where = drawn()
    wanted = kl_divergence(Categorical(logits=p), Categorical(logits=q))[where].mean()
    assert objectives.divergence(p, q, where) == pytest.approx(float(wanted), rel=1e-12)
    assert objectives.divergence(q, p, where) != pytest.approx(float(wanted), rel=1e-2)
    wanted = Categorical(logits=p).entropy()[where].mean()
    assert objectives.entropy(p, where) == pytest.approx(float(wanted), rel=1e-12)
    assert objectives.divergence(p, p, where) == 0
    assert objectives.divergence(p, q, torch.zeros_like(where)) == objectives.entropy(p, torch.zeros_like(where)) == 0
