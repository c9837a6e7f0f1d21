"""One parameter of an optimizer: its place, its mask, its state, and the part of a step that is made of them."""

from __future__ import annotations

from typing import Any

import torch

from ..bitmask import BitMask
from ..ops import mask_algebra
from ..ops.masked_adamw import Part, Rounding, block_prefix
from . import compact
from .local import Local, is_sharded, local_tensor, place

# What a rounding keeps beside the moments: name in the state, dtype
KEPT = {Rounding.KAHAN: ("compensation", torch.bfloat16), Rounding.MASTER: ("low_bits", torch.int16)}
MAX_COHORTS = 256


class Entry:
    """State lies in ``state``, the dict that the optimizer keeps for the parameter:

    * ``steps`` int64 ``[cohorts]``: how many steps each cohort of coordinates has taken;
    * ``exp_avg``, ``exp_avg_sq`` ``[count]``: moments, one entry per coordinate in the mask, in flat order;
    * ``low_bits`` int16 (master) or ``compensation`` bf16 (kahan), ``[count]``;
    * ``cohort`` uint8 ``[count]``, where there is more than one;
    * ``mask_digest`` int64: which mask this is the state of.
    """

    def __init__(
        self, param: torch.Tensor, name: str, ordinal: int, mask: BitMask | None, rounding: Rounding,
        state_dtype: torch.dtype, track: bool,
    ) -> None:  # fmt: skip
        self.param, self.name, self.ordinal = param, name, ordinal
        self.place: Local = place(param)
        self.rounding = rounding if param.dtype == torch.bfloat16 else Rounding.NEAREST
        self.state_dtype, self.track = state_dtype, track
        if self.rounding == Rounding.STOCHASTIC and not self.place.consecutive:
            raise ValueError(
                f"{name} is sharded along another dimension than its first; stochastic rounding is keyed on flat "
                "coordinates and needs the first: shard that one, or use rounding='nearest', 'kahan' or 'master'"
            )
        self.state: dict[str, Any] = {}
        self.words: torch.Tensor | None = None  # the local part of the mask, flat and padded; None: every coordinate
        self.visible: torch.Tensor | None = None  # packed bits, one per entry
        self.seen: BitMask | None = None  # visible changes under earlier masks
        self.set_mask(mask)

    # ---- the mask

    def set_mask(self, mask: BitMask | None) -> None:
        """Take another mask, of the whole parameter; state of coordinates that stay is kept."""
        old, had = self.words, bool(self.state)
        self.digest = compact.digest(mask)
        device = local_tensor(self.param).device
        if self.visible is not None:
            self.seen = self.visible_mask()
        part = None if mask is None else self.place.part_of(mask).to(device)
        self.words = None if part is None else compact.flat_words(part)
        self.prefix = None if self.words is None else block_prefix(self.words)
        self.numel = local_tensor(self.param).numel()
        self.count = self.numel if self.prefix is None else int(self.prefix[-1])
        if had:
            self.carry(old)
        self.visible = None
        if self.track:
            self.visible = torch.zeros((self.count + 63) // 64 * 8, dtype=torch.uint8, device=device)

    def carry(self, old: torch.Tensor | None) -> None:
        """State under mask ``old`` becomes state under the present one; what arrives is a cohort of its own."""
        state = self.state
        if "cohort" not in state:
            state["cohort"] = torch.zeros(len(state["exp_avg"]), dtype=torch.uint8, device=state["exp_avg"].device)
        newest = self.room_for_cohort()
        names = [name for name in ("exp_avg", "exp_avg_sq", "low_bits", "compensation", "cohort") if name in state]
        fill = [newest if name == "cohort" else 0 for name in names]
        moved = compact.transfer([state[name] for name in names], fill, old, self.words, self.numel, self.count)
        state.update(zip(names, moved, strict=True))
        self.steps = (*self.steps, 0)
        # every process keeps the same cohorts of a shared parameter, whether it has members of them or not
        if not self.sharded:
            self.tidy()
        state["mask_digest"] = torch.tensor(self.digest)

    def room_for_cohort(self) -> int:
        """Number of the next cohort. With 256 taken, the two oldest become one, with the older one's count."""
        if len(self.steps) == MAX_COHORTS:
            first, second = sorted(range(MAX_COHORTS), key=lambda i: -self.steps[i])[:2]
            low, high = min(first, second), max(first, second)
            number = self.state["cohort"]
            number[number == high] = low
            number[number > high] -= 1
            merged = list(self.steps)
            merged[low] = merged[first]
            del merged[high]
            self.steps = tuple(merged)
        return len(self.steps)

    def tidy(self) -> None:
        """Drop cohorts that nobody is in; one cohort needs no numbers.

        The first stays, empty or not: its steps are the parameter's own, which stochastic rounding is keyed on.
        """
        number = self.state["cohort"]
        present = torch.bincount(number.to(torch.int64), minlength=len(self.steps)).gt(0).tolist()
        present[0] = True
        rank = torch.tensor(present).cumsum(0) - 1
        self.steps = tuple(taken for taken, there in zip(self.steps, present, strict=True) if there)
        if len(self.steps) == 1:
            del self.state["cohort"]
        else:
            self.state["cohort"] = rank.to(number.device)[number.to(torch.int64)].to(torch.uint8)

    # ---- state

    @property
    def steps(self) -> tuple[int, ...]:
        """How many steps each cohort has taken."""
        return tuple(self.state["steps"].tolist())

    @steps.setter
    def steps(self, taken: tuple[int, ...]) -> None:
        self.state["steps"] = torch.tensor(taken, dtype=torch.int64)

    def start(self, state: dict[str, Any]) -> None:
        """Make an optimizer's dict the state before the first step."""
        device = local_tensor(self.param).device
        state.clear()
        self.state = state
        self.steps = (0,)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(self.count, dtype=self.state_dtype, device=device)
        if self.rounding in KEPT:
            name, dtype = KEPT[self.rounding]
            state[name] = torch.zeros(self.count, dtype=dtype, device=device)
        state["mask_digest"] = torch.tensor(self.digest)

    def part(self, group: int) -> Part:
        """What a step works on; to be made again when the mask, the state or the parameter's memory changed."""
        kept = KEPT.get(self.rounding)
        return Part(
            # a view, which stays at today's memory and shares the version counter
            param=local_tensor(self.param).detach(),
            exp_avg=self.state["exp_avg"],
            exp_avg_sq=self.state["exp_avg_sq"],
            extra=self.state[kept[0]] if kept else None,
            words=self.words,
            prefix=self.prefix,
            cohort=self.state.get("cohort"),
            changed=self.visible,
            offset=self.place.offset if self.place.consecutive else 0,
            ordinal=self.ordinal,
            group=group,
            name=self.name,
        )

    # ---- visible changes

    def visible_mask(self) -> BitMask:
        """Coordinates (of the local tensor) whose bf16 value changed in a step since the last reset."""
        shape = self.place.shape
        now = BitMask.zeros(shape, local_tensor(self.param).device)
        if self.visible is not None and self.count:
            words = self.visible
            if self.words is not None:
                words = compact.spread_bits(self.visible, self.words, self.numel)
            now = compact.from_flat(words, shape)
        return now if self.seen is None else now | self.seen

    def visible_count(self) -> int:
        """How many coordinates ``visible_mask`` holds."""
        if self.seen is not None or self.visible is None:
            return self.visible_mask().count()
        return int(mask_algebra.pair_counts([self.visible[None]])[0, 0]) if self.count else 0

    def reset_visible(self) -> None:
        self.seen = None
        if self.visible is not None:
            self.visible.zero_()

    @property
    def sharded(self) -> bool:
        return is_sharded(self.param)
