"""What RLVR and SFT minimise, and the divergences they are watched by.

Shapes: ``[sequences, tokens]`` over completions; ``where`` says which tokens are there.
Source: DAPO, arXiv 2503.14476; GRPO, arXiv 2402.03300; as used in arXiv 2511.08567, section 3.1 and appendix C.
"""

from __future__ import annotations

from typing import Any

import torch

from .rollout import Rollout, positions


def completion_logits(model: Any, rollout: Rollout) -> torch.Tensor:
    """fp32 ``[sequences, tokens, vocabulary]``: what the model says before each token of the completions."""
    device = next(model.parameters()).device
    present = rollout.present.to(device)
    output = model(
        input_ids=rollout.tokens.to(device), attention_mask=present.long(), position_ids=positions(present),
        use_cache=False, logits_to_keep=rollout.tokens.shape[1] - rollout.start + 1,
    )  # fmt: skip
    return output.logits[:, :-1].float()


def log_probs_of(logits: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    """Log-probability of each token of the completions."""
    tokens = rollout.tokens[:, rollout.start :].to(logits.device)
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards ``[prompts, samples]`` less the mean of their prompt, over its standard deviation; 0 where all agree."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + 1e-6)


def policy_loss(
    new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, where: torch.Tensor, *,
    clip_low: float, clip_high: float, total: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Clipped policy gradient, to be minimised.

    Args:
        new, old: log-probabilities of the tokens now and when they were sampled.
        advantage: ``[sequences]``.
        clip_low, clip_high: the ratio new / old is clipped to ``[1 - clip_low, 1 + clip_high]``.
        total: weigh all tokens alike, and divide by this many (DAPO). None: the mean over each sequence, then over
            sequences (GRPO).
    """
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    return -averaged(gain, where, total)


def penalty(new: torch.Tensor, base: torch.Tensor, where: torch.Tensor, total: float | None = None) -> torch.Tensor:
    """Unbiased, non-negative estimate of KL(new | base) from the sampled tokens (Schulman's k3), averaged likewise."""
    toward = base - new
    return averaged(toward.exp() - toward - 1, where, total)


def averaged(x: torch.Tensor, where: torch.Tensor, total: float | None) -> torch.Tensor:
    x = x * where
    return x.sum() / total if total is not None else (x.sum(-1) / where.sum(-1).clamp(min=1)).mean()


def divergence(p: torch.Tensor, q: torch.Tensor, where: torch.Tensor) -> float:
    """KL(p | q) over the whole vocabulary, in nats, mean over the tokens where ``where``; p, q are logits."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float(((p.exp() * (p - q)).sum(-1) * where).sum() / where.sum().clamp(min=1))


def entropy(logits: torch.Tensor, where: torch.Tensor) -> float:
    """Nats per token, mean over the tokens where ``where``."""
    p = logits.log_softmax(-1)
    return float((-(p.exp() * p).sum(-1) * where).sum() / where.sum().clamp(min=1))
