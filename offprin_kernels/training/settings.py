# ruff: noqa: RUF009  # setting() is dataclasses.field with help for the command line
"""Settings of the stages; what is not said here is not configurable. All have defaults that work."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from .tasks import MIXTURE, Mixture


def setting(default, text: str, choices: tuple[str, ...] = ()):
    """A field with the help that the command line shows."""
    metadata = {"help": text, "choices": choices}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Size:
    """Shape of the decoder. Defaults: 0.8 M parameters in linear layers."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 384


@dataclass(frozen=True)
class Common:
    """What all stages share."""

    seed: int = setting(0, "of problems, sampling, and what is drawn at the start")
    steps: int = setting(100, "optimizer steps (pretrain, sft) or rounds of sampling (rlvr)")
    lr: float = setting(1e-3, "learning rate")
    tasks: Mixture = setting(MIXTURE, "families and sizes, such as add:2-4,sort:5")
    threads: int = setting(2, "of the CPU; results depend on it in the last bits")
    device: str = setting("cpu", "on cuda, weights are bf16 with exact masters", ("cpu", "cuda"))
    eval_every: int = setting(20, "steps between evaluations on held-out problems; the last step has one, too")
    eval_problems: int = setting(512, "held-out problems, one sample at temperature 1 each")
    save_every: int = setting(20, "steps between checkpoints, from which an interrupted run goes on")
    most: int = setting(88, "tokens of a completion at most")

    def __post_init__(self) -> None:
        for name in ("steps", "threads", "eval_every", "eval_problems", "save_every", "most"):
            positive(self, name)
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"unknown device {self.device!r}; choose cpu or cuda")
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"lr must not be negative, got {self.lr}")


@dataclass(frozen=True)
class Pretrain(Common):
    """A base from nothing, on solutions of which a share is worked and the rest are answers alone."""

    steps: int = setting(800, "optimizer steps")
    lr: float = setting(2e-3, "peak learning rate; warms up over 50 steps, then falls linearly to a twentieth")
    batch: int = setting(64, "solutions per step")
    worked_share: float = setting(0.3, "share of solutions that show their steps")
    save_every: int = setting(200, "steps between checkpoints, from which an interrupted run goes on")
    eval_every: int = setting(200, "steps between evaluations; the last step has one, too")
    hidden: int = setting(128, "width of the decoder")
    layers: int = setting(4, "of the decoder")
    heads: int = setting(4, "query heads")
    kv_heads: int = setting(2, "key/value heads")
    head_dim: int = setting(32, "size of a head")
    intermediate: int = setting(384, "width of the gated MLP")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch", *(f.name for f in fields(Size))):
            positive(self, name)
        share(self, "worked_share")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    @property
    def size(self) -> Size:
        return Size(*(getattr(self, f.name) for f in fields(Size)))


@dataclass(frozen=True)
class Tune(Common):
    """A stage that begins from a base."""

    base: str = setting("", "checkpoint to begin from, such as RUN/final")
    masks: str = setting("", "file of masks (`offprin mask`): linear layers move only there, all else stays")
    k: int = setting(16, "of the principal subspaces that update energies are logged for")
    adapter: str = setting("", "train its factors instead of the weights", ("lora", "pissa"))
    rank: int = setting(8, "of the adapter")
    alpha: float = setting(8.0, "of the adapter: its product is scaled by alpha / rank")
    linear_only: bool = setting(False, "leave embeddings, norms and the head as they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.base:
            raise ValueError("a base is needed: --base RUN/final, made by `offprin train pretrain`")
        if self.adapter not in ("", "lora", "pissa"):
            raise ValueError(f"unknown adapter {self.adapter!r}; choose lora or pissa")
        if self.adapter and self.masks:
            raise ValueError("masks are for weights and an adapter trains none of them; give one of the two")
        positive(self, "rank")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")


@dataclass(frozen=True)
class RLVR(Tune):
    """Reinforcement learning with verifiable rewards."""

    steps: int = setting(80, "rounds of sampling")
    lr: float = setting(3e-5, "constant learning rate")
    objective: str = setting("dapo", "how advantages become a loss", ("dapo", "grpo"))
    prompts: int = setting(32, "per step")
    samples: int = setting(8, "completions per prompt")
    minibatches: int = setting(2, "optimizer steps per round of sampling")
    clip_low: float = setting(0.2, "the ratio to the old policy is clipped below 1 - clip_low")
    clip_high: float = setting(0.28, "and above 1 + clip_high")
    beta: float = setting(-1.0, "weight of the KL to the base; -1: 0 for dapo, 0.02 for grpo")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in ("dapo", "grpo"):
            raise ValueError(f"unknown objective {self.objective!r}; choose dapo or grpo")
        for name in ("prompts", "samples", "minibatches"):
            positive(self, name)
        if self.samples < 2:
            raise ValueError("samples must be at least 2: advantages compare completions of one prompt")
        if self.minibatches > self.prompts:
            raise ValueError(f"minibatches ({self.minibatches}) cannot exceed prompts ({self.prompts})")
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ValueError(f"clip_low must be in (0, 1) and clip_high positive: {self.clip_low}, {self.clip_high}")
        if not (self.beta >= 0 or self.beta == -1) or self.beta == float("inf"):
            raise ValueError(f"beta must not be negative (-1: the objective's own), got {self.beta}")

    @property
    def kl_weight(self) -> float:
        return self.beta if self.beta >= 0 else (0.02 if self.objective == "grpo" else 0.0)


@dataclass(frozen=True)
class SFT(Tune):
    """Supervised fine-tuning on worked solutions."""

    steps: int = setting(300, "optimizer steps at most")
    lr: float = setting(3e-4, "constant learning rate")
    batch: int = setting(64, "solutions per step")
    eval_every: int = setting(5, "steps between evaluations; the last step has one, too")
    target: float = setting(0.0, "stop at the first evaluation with this accuracy; 0: go on to the end")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "batch")
        share(self, "target")


STAGES = {"pretrain": Pretrain, "rlvr": RLVR, "sft": SFT}


def positive(settings, name: str) -> None:
    if getattr(settings, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")


def share(settings, name: str) -> None:
    if not 0 <= getattr(settings, name) <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {getattr(settings, name)}")
