"""Sampling many completions at once, with a cache of keys and values that finished sequences leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .model import END_ID, PAD_ID, decode, encode


@dataclass
class Rollout:
    """Sequences ``[prompt | completion]``: prompts end, and completions begin, at column ``start``."""

    tokens: torch.Tensor  # int64 [sequences, length], padded on both sides
    present: torch.Tensor  # bool [sequences, length]: no padding
    start: int
    log_probs: torch.Tensor  # fp32 [sequences, length - start]: of the completion's tokens when they were sampled

    @property
    def completion(self) -> torch.Tensor:
        """bool ``[sequences, length - start]``: the completion's tokens, with the one that ends it."""
        return self.present[:, self.start :]

    def texts(self) -> list[str]:
        return [decode(row) for row in self.tokens[:, self.start :].tolist()]

    def __getitem__(self, rows: torch.Tensor | slice) -> Rollout:
        """Some of the sequences, without columns that are padding in all of them."""
        present = self.present[rows]
        used = present.any(0).nonzero()
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, self.start)
        return Rollout(
            self.tokens[rows, first:last], present[:, first:last], self.start - first,
            self.log_probs[rows, : last - self.start],
        )  # fmt: skip


def positions(present: torch.Tensor) -> torch.Tensor:
    """Of every token in its own sequence, whatever the padding before it."""
    return (present.long().cumsum(-1) - 1).clamp(min=0)


def batch(pairs: list[tuple[str, str]]) -> Rollout:
    """Prompts with given completions, ended, as if they had been sampled with probability 1."""
    prompts, completions = encode([p for p, _ in pairs]), [[*ids, END_ID] for ids in encode([c for _, c in pairs])]
    start, most = max(map(len, prompts)), max(map(len, completions))
    rows = [
        [PAD_ID] * (start - len(p)) + p + c + [PAD_ID] * (most - len(c))
        for p, c in zip(prompts, completions, strict=True)
    ]
    tokens = torch.tensor(rows)
    return Rollout(tokens, tokens != PAD_ID, start, torch.zeros(len(rows), most))


@torch.no_grad()
def sample(
    model: Any, prompts: list[str], *, most: int, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Rollout:
    """One completion per prompt, of at most ``most`` tokens.

    Args:
        temperature: 0 takes the likeliest token each time.
        generator: where randomness comes from; on the CPU, whatever the model's device.

    Log-probabilities are those of the distribution at temperature 1.
    """
    device = next(model.parameters()).device
    ids = encode(prompts)
    start = max(map(len, ids))
    tokens = torch.full((len(ids), start + most), PAD_ID)
    for row, own in zip(tokens, ids, strict=True):
        row[start - len(own) : start] = torch.tensor(own)
    present = tokens != PAD_ID
    log_probs = torch.zeros(len(ids), most)
    rows = torch.arange(len(ids))  # the sequences in the cache
    going = torch.ones(len(ids), dtype=torch.bool)  # which of them have not ended
    cache, fresh = None, tokens[:, :start].to(device)
    for at in range(start, start + most):
        seen = present[rows, :at].to(device)
        output = model(
            input_ids=fresh, attention_mask=seen.long(), position_ids=positions(seen)[:, -fresh.shape[1] :],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache, logits = output.past_key_values, output.logits[:, -1].float().cpu()
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            chosen = logits.argmax(-1)
        own = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        tokens[rows, at] = chosen.where(going, PAD_ID)
        log_probs[rows, at - start] = own.where(going, 0.0)
        present[rows, at] = going
        going = going & (chosen != END_ID)
        if not going.any():
            break
        # leaving the cache costs a copy of it: worth it when an eighth has ended
        if going.sum() <= 0.875 * len(rows):
            cache.batch_select_indices(going.nonzero()[:, 0].to(device))
            rows, chosen, going = rows[going], chosen[going], going[going]
        fresh = chosen[:, None].to(device)
    return Rollout(tokens[:, : at + 1], present[:, : at + 1], start, log_probs[:, : at + 1 - start])
