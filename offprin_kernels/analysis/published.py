"""Published values, with where they were published: what an analysis may be held against.

Sparsity and Jaccard indices: arXiv 2511.08567, Tables 1 and 2. Angles and spectral shift: arXiv 2606.07082 (Qwen3-8B).
Norms: one pair's layer 13.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PAPER, LATER = "arXiv 2511.08567", "arXiv 2606.07082"

# Share of weights that keep their bf16 value, in percent.
SFT_SPARSITY = {"DS-R1-Distill-1.5B": 2.8, "Klear-SFT": 0.6, "UniReason-SFT": 18.8}
RLVR_SPARSITY = {
    "DeepScaleR": 53.8,
    "DeepCoder": 45.5,
    "Archer-Code": 52.5,
    "ProRL": 38.4,
    "ProRL-v2": 36.3,
    "Klear-RL": 69.5,
    "GT-GRPO": 79.9,
    "DAPO": 79.7,
    "UniReason-RL": 68.3,
    "Polaris (4B)": 79.3,
    "Polaris (7B)": 61.7,
    "UloRL": 91.7,
}
# (mean Jaccard index of five runs, its uniform null), by kind of module in layer 13
JACCARD = {
    "q_proj": (0.580, 0.430),
    "k_proj": (0.580, 0.413),
    "v_proj": (0.597, 0.467),
    "o_proj": (0.552, 0.373),
    "down_proj": (0.585, 0.453),
    "up_proj": (0.578, 0.443),
    "gate_proj": (0.575, 0.437),
}
# (norm of W0, norm of D) of DS-Qwen-1.5B -> DeepScaleR, layer 13, in fp32.
DEEPSCALER_NORMS = {"q_proj": (62.2631, 0.069874), "o_proj": (79.5423, 0.076984), "down_proj": (140.1134, 0.182166)}


@dataclass(frozen=True)
class Range:
    """An interval of published values, its ends included; ``text`` is how it is printed."""

    low: float
    high: float
    text: str

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def holds_below(self, limit: float) -> bool | None:
        """Whether a value known only to lie in 0..limit is inside; None where it may be or not."""
        if self.low <= 0 and limit <= self.high:
            return True
        return False if limit < self.low else None


def _percent(values: dict[str, float]) -> Range:
    low, high = min(values.values()), max(values.values())
    return Range(low / 100, high / 100, f"{low} to {high} %")


def _about(value: float) -> Range:
    """Published as "about": read as within a factor of the square root of ten."""
    return Range(value / math.sqrt(10), value * math.sqrt(10), f"about {value:.0e}".replace("e-0", "e-"))


def _norm_ratios(power: int) -> Range:
    ratios = [(update / base) ** power for base, update in DEEPSCALER_NORMS.values()]
    return Range(min(ratios), max(ratios), f"{min(ratios):.1e} to {max(ratios):.1e}")


# What: (of RLVR, of SFT); None where nothing was published.
SPARSITY = (_percent(RLVR_SPARSITY), _percent(SFT_SPARSITY))
ANGLE = (Range(0.0, 0.5, "below 0.5\N{DEGREE SIGN}"), Range(10.0, 90.0, "above 10\N{DEGREE SIGN}"))
NSS = (_about(1e-5), _about(1e-3))
NORM_RATIO = (_norm_ratios(1), None)
NORM_RATIO_SQUARED = (_norm_ratios(2), None)
NOTHING: tuple[None, None] = (None, None)
