"""Proof that an intervention kept the function: each layer's attention in fp64, and the whole model's logits.

The first needs nothing but the weights and always runs. Its tolerance is derived: a permutation must agree to fp64
rounding and give back every bit when undone; a rotation may differ by the noise of rounding each rotated weight once,
predicted from the weights themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .attention import Heads, place
from .record import Intervention
from .transform import head_order, touches, transformed

TOKENS = 8
# Relative; fp64 sums of a few thousand terms, and scores of up to some hundreds in the exponent of softmax.
EXACT = 1e-12
# Predicted noise takes each rounding for the largest it can be: measured ratios lie between 0.5 and 1.2.
NOISE_LIMIT = 3.0
LOGIT_TOKENS = (2, 32)
# Of tiny models the ratio lies between 0.3 and 1.3; routers that flip an expert, and deep models, spread it.
LOGIT_LIMIT = 8.0

Layer = Mapping[str, torch.Tensor]  # "q_proj.weight" -> tensor


class VerificationError(ValueError):
    """The function was not preserved; one sentence says where."""


@dataclass(frozen=True)
class LayerCheck:
    """One layer: the largest relative difference (root mean square) of a head's output or of their sum.

    ``rounding`` is the largest ratio of a difference to the predicted noise of rounding; 0 for permutations.
    """

    layer: int
    difference: float
    rounding: float


@dataclass(frozen=True)
class LogitCheck:
    """Logits of random tokens before and after, in fp32.

    ``control`` is the same root mean square for the model before, its V and O weights moved at random by as much as
    the intervention may have rounded: what ``rms`` is to be compared with.
    """

    tokens: int
    max_difference: float
    max_relative: float  # to the standard deviation of the logits
    rms: float
    control: float


def check_layer(before: Layer, after: Layer, record: Intervention, layer: int, eps: float = 1e-6) -> LayerCheck:
    """Compare one layer's attention, without position embeddings (the same for every head), on random input, in fp64.

    Args:
        before, after: the layer's attention tensors, by place (``"q_proj.weight"``).
        record: the intervention.
        layer: the layer's number.
        eps: of the q/k norms.

    Raises:
        VerificationError: the difference is more than rounding explains, or a permuted bit is not where it belongs.
    """
    if record.kind == "permute":
        _check_bits(before, after, record, layer)
    generator = torch.Generator().manual_seed((record.seed + layer) % (1 << 63))
    x = torch.randn(TOKENS, before["q_proj.weight"].shape[1], generator=generator, dtype=torch.float64)
    old, _ = _outputs(before, record.heads, x, eps, noise=False)
    new, noise = _outputs(after, record.heads, x, eps, noise=record.kind == "rotate")
    if record.kind == "permute":
        old = torch.cat([old[:-1][head_order(record, layer, "q_proj")], old[-1:]])
    size, difference = _rms(old), _rms(new - old)
    allowed = EXACT * size + (NOISE_LIMIT * noise.mean(dim=(1, 2)).sqrt() if noise is not None else 0)
    ratio = difference / noise.mean(dim=(1, 2)).sqrt() if noise is not None else torch.zeros(1)
    relative = difference / size.clamp_min(torch.finfo(torch.float64).tiny)
    # "not less" rather than "more", so that NaN fails.
    wrong = (~(difference <= allowed)).nonzero().flatten().tolist()
    if wrong:
        head = wrong[0]
        what = f"head {head}" if head < record.heads.query else "the sum of all heads"
        raise VerificationError(
            f"layer {layer}: the output of {what} differs by {float(relative[head]):.2e} of its size, and rounding "
            f"explains {float(allowed[head] / size[head]):.2e}; the function was not preserved"
        )
    return LayerCheck(layer, float(relative.max()), float(ratio.max()))


def _check_bits(before: Layer, after: Layer, record: Intervention, layer: int) -> None:
    for rest, tensor in before.items():
        name = f"layers.{layer}.self_attn.{rest}"
        back = after[rest]
        if touches(record, name, back.shape):
            back = transformed(name, back, record, inverse=True)
        if not torch.equal(_bits(back), _bits(tensor)):
            raise VerificationError(f"layer {layer}: {rest} does not have the original's bits when put back in order")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype.itemsize == 4 else torch.int16)


def _rms(x: torch.Tensor) -> torch.Tensor:
    """[heads, tokens, hidden] -> [heads]."""
    return x.square().mean(dim=(1, 2)).sqrt()


def _outputs(
    layer: Layer, heads: Heads, x: torch.Tensor, eps: float, noise: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each head's share of the attention output, and their sum last: fp64 [heads + 1, tokens, hidden].

    With ``noise``, also the variance that rounding V and O once adds to it, to first order.
    """
    queries = _projected(layer, "q", heads, x, eps)
    keys = _projected(layer, "k", heads, x, eps)
    outputs = x.new_zeros(heads.query + 1, *x.shape)
    variances = torch.zeros_like(outputs) if noise else None
    for head in range(heads.query):
        kv = head // heads.group
        probabilities = (queries[:, head] @ keys[:, kv].T / heads.size**0.5).softmax(dim=-1)
        values = layer["v_proj.weight"][kv * heads.size : (kv + 1) * heads.size]
        out = layer["o_proj.weight"][:, head * heads.size : (head + 1) * heads.size]
        mixed = probabilities @ x
        middle = mixed @ values.double().T
        bias = layer.get("v_proj.bias")
        if bias is not None:
            bias = bias[kv * heads.size : (kv + 1) * heads.size]
            middle += bias.double()
        outputs[head] = middle @ out.double().T
        if variances is not None:
            spread = mixed.square() @ _rounding(values).T
            if bias is not None:
                spread += _rounding(bias)
            variances[head] = middle.square() @ _rounding(out).T + spread @ out.double().square().T
    outputs[-1] = outputs[:-1].sum(dim=0)
    if variances is not None:
        variances[-1] = variances[:-1].sum(dim=0)
    return outputs, variances


def _projected(layer: Layer, which: str, heads: Heads, x: torch.Tensor, eps: float) -> torch.Tensor:
    """Queries or keys, fp64 [tokens, heads, size], with bias and norm where the model has them."""
    count = heads.count(f"{which}_proj")
    weight, bias, norm = (layer.get(f"{which}_{rest}") for rest in ("proj.weight", "proj.bias", "norm.weight"))
    assert weight is not None
    # Head by head, so that fp64 copies are never larger than one head's block.
    made = torch.cat([x @ block.double().T for block in weight.split(heads.size)], dim=1)
    if bias is not None:
        made += bias.double()
    if norm is not None:
        shaped = made.view(len(x), -1, norm.numel())
        shaped = shaped * (shaped.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * norm.double()
        made = shaped.reshape(made.shape)
    return made.view(len(x), count, heads.size)


def _rounding(stored: torch.Tensor) -> torch.Tensor:
    """Variance of rounding to the stored value: at most half a unit in the last place, evenly spread."""
    info = torch.finfo(stored.dtype)
    half = (stored.double().abs() * (info.eps / 2)).clamp_min(info.smallest_normal * info.eps / 2)
    return half.square() / 3


def check_logits(before: Path, after: Path, record: Intervention, rounding: float) -> LogitCheck:
    """Load both models with transformers in fp32, one at a time, and compare their logits on seeded random tokens.

    Args:
        before, after: directories.
        record: the intervention.
        rounding: unit roundoff of the stored weights, 2^-8 for bf16.

    Raises:
        VerificationError: the difference is more than rounding explains. Others: whatever transformers raises.
    """
    generator = torch.Generator().manual_seed(record.seed)
    with _loaded(before) as (model, logits):
        tokens = torch.randint(0, model.config.vocab_size, LOGIT_TOKENS, generator=generator)
        old = logits(tokens)
        # Sums of n terms in fp32 in another order: about sqrt(n) unit roundoffs (Higham and Mary, 2019).
        summed = 2.0**-24 * (record.heads.query * record.heads.size) ** 0.5
        scale = max(summed, rounding if record.kind == "rotate" else 0.0)
        for name, parameter in model.named_parameters():
            found = place(name)
            if found and found[0] in record.layers and found[1] in ("v_proj", "o_proj"):
                uniform = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1)
                parameter.data.mul_(uniform.mul_(scale).add_(1))
        control = float((logits(tokens) - old).square().mean().sqrt())
    del model, logits
    with _loaded(after) as (_, logits):
        difference = logits(tokens) - old
    largest, rms = float(difference.abs().max()), float(difference.square().mean().sqrt())
    check = LogitCheck(tokens.numel(), largest, largest / float(old.std()), rms, control)
    if not rms <= LOGIT_LIMIT * control:
        raise VerificationError(
            f"the logits differ by {rms:.2e} (root mean square), and rounding alone by {control:.2e}; the function was "
            "not preserved"
        )
    return check


@contextlib.contextmanager
def _loaded(path: Path) -> Iterator[tuple[Any, Callable[[torch.Tensor], torch.Tensor]]]:
    """The model in fp32, and its logits (fp64, on the CPU); transformers' progress bars are kept quiet."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path), local_files_only=True).float().eval()
    finally:
        if shown:
            logging.enable_progress_bar()

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=False).logits.double()

    yield model, logits
