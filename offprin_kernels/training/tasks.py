"""Tasks with answers that a program can check, made in code: a prompt, the answer, and worked steps that lead there.

A model answers with any steps it likes, then ``#`` and the answer; the verifier looks at what follows the last ``#``.
Which problems are held out is decided by the prompt itself, so no run of any seed can train on them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

MARK = "#"  # the answer follows
HELD_OUT_ONE_IN = 8
MAX_SIZE = 9  # digits; longer solutions do not fit the model


@dataclass(frozen=True)
class Problem:
    """One exercise. ``worked`` are its steps, without the answer."""

    family: str
    prompt: str
    answer: str
    worked: str

    @property
    def held_out(self) -> bool:
        """Whether it is kept for evaluation: by a checksum of the prompt."""
        return zlib.crc32(self.prompt.encode()) % HELD_OUT_ONE_IN == 0

    def solution(self, worked: bool = True) -> str:
        """The completion: steps and answer, or the answer alone."""
        return f"{self.worked if worked else ''}{MARK}{self.answer}"


def add(rng: random.Random, size: int) -> Problem:
    """Sum of two numbers of up to ``size`` digits. Steps: digits from the right, with the carry."""
    a, b = (str(rng.randrange(10**size)).zfill(size) for _ in range(2))
    steps, carry = [], 0
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total // 10}{total % 10}")
        carry = total // 10
    return Problem("add", f"{a}+{b}=", str(int(a) + int(b)).zfill(size), ",".join(steps))


def sort(rng: random.Random, size: int) -> Problem:
    """``size`` digits in ascending order. Steps: the smallest, and what is left."""
    left = [rng.choice("0123456789") for _ in range(size)]
    prompt, steps = f"s{''.join(left)}=", []
    answer = "".join(sorted(left))
    while left:
        least = min(left)
        left.remove(least)
        steps.append(f"{least}:{''.join(left)}")
    return Problem("sort", prompt, answer, ",".join(steps))


def reverse(rng: random.Random, size: int) -> Problem:
    """``size`` digits backwards. Steps: the last one, and what is left."""
    left = [rng.choice("0123456789") for _ in range(size)]
    prompt, answer, steps = f"r{''.join(left)}=", "".join(reversed(left)), []
    while left:
        last = left.pop()
        steps.append(f"{last}:{''.join(left)}")
    return Problem("reverse", prompt, answer, ",".join(steps))


FAMILIES: dict[str, Callable[[random.Random, int], Problem]] = {"add": add, "sort": sort, "reverse": reverse}
ALPHABET = "0123456789+=,:#sr"


# What a mixture is made of: families, and the sizes (digits) to draw from
Mixture: TypeAlias = Mapping[str, Sequence[int]]
MIXTURE: Mixture = {"add": range(2, 5), "sort": range(3, 8), "reverse": range(3, 8)}


def parse_mixture(text: str) -> Mixture:
    """``add:2-4,sort:5`` as a mixture; a family alone has its default sizes.

    Raises:
        ValueError: an unknown family, or sizes that are none.
    """
    mixture: dict[str, Sequence[int]] = {}
    for item in filter(None, text.split(",")):
        family, colon, sizes = item.partition(":")
        if family not in FAMILIES:
            raise ValueError(f"unknown task {family!r}; choose from {', '.join(FAMILIES)}")
        low, dash, high = sizes.partition("-")
        last = high if dash else low
        if colon and not (low.isdecimal() and last.isdecimal() and 2 <= int(low) <= int(last) <= MAX_SIZE):
            raise ValueError(f"{item!r}: sizes are digits, from 2 to {MAX_SIZE}, such as {family}:2-4")
        if family in mixture:
            raise ValueError(f"task {family!r} is given twice; give all its sizes at once, such as {family}:2-4")
        mixture[family] = range(int(low), int(last) + 1) if colon else MIXTURE[family]
    if not mixture:
        raise ValueError(f"no tasks given; choose from {', '.join(FAMILIES)}")
    # problems are drawn by place: the same tasks in another order would be another run with the same settings
    return {family: mixture[family] for family in FAMILIES if family in mixture}


def problems(count: int, key: str, mixture: Mixture = MIXTURE, *, held_out: bool = False) -> list[Problem]:
    """``count`` random problems, families and sizes uniform, the same for the same ``key``; all held out, or none.

    Args:
        key: seeds the choice, such as ``"rlvr/3/17"`` for seed 3 and step 17.
    """
    rng = random.Random(key)
    families = list(mixture)
    found: list[Problem] = []
    while len(found) < count:
        family = rng.choice(families)
        problem = FAMILIES[family](rng, rng.choice(mixture[family]))
        if problem.held_out == held_out:
            found.append(problem)
    return found


def reward(problem: Problem, completion: str) -> float:
    """+1 if what follows the last ``#`` is exactly the answer, else -1."""
    _, mark, given = completion.rpartition(MARK)
    return 1.0 if mark and given == problem.answer else -1.0
