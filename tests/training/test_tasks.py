"""Problems, their worked steps, the verifier, and what is held out."""

from __future__ import annotations

import random
import re

import pytest

from offprin_kernels.training.tasks import ALPHABET, FAMILIES, MIXTURE, Problem, parse_mixture, problems, reward

SIZES = range(2, 10)


def some(family: str):
    rng = random.Random(family)
    return [(size, FAMILIES[family](rng, size)) for size in SIZES for _ in range(50)]


def test_addition() -> None:
    for size, problem in some("add"):
        a, b = re.fullmatch(r"(\d+)\+(\d+)=", problem.prompt).groups()
        assert len(a) == len(b) == size
        assert int(problem.answer) == int(a) + int(b) and len(problem.answer) in (size, size + 1)
        # the digits that the steps write down are the answer, and every step is an equation
        steps = problem.worked.split(",")
        written = []
        for i, step in enumerate(steps):
            x, y, carry, total = map(int, re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d\d)", step).groups())
            assert (x, y) == (int(a[-1 - i]), int(b[-1 - i])) and x + y + carry == total
            assert carry == (int(steps[i - 1][-2]) if i else 0)
            written.append(str(total % 10))
        assert int(steps[-1][-2] + "".join(reversed(written))) == int(problem.answer)


@pytest.mark.parametrize("family", ["sort", "reverse"])
def test_one_digit_at_a_time(family) -> None:
    for size, problem in some(family):
        digits = problem.prompt[1:-1]
        assert problem.prompt == f"{family[0]}{digits}=" and len(digits) == size
        taken, left = "", digits
        for step in problem.worked.split(","):
            digit, rest = step.split(":")
            # what is left is what was there, in order, without the digit that was taken
            place = left.rindex(digit) if family == "reverse" else left.index(digit)
            assert rest == left[:place] + left[place + 1 :]
            taken, left = taken + digit, rest
        assert not left and taken == problem.answer
        wanted = digits[::-1] if family == "reverse" else "".join(d * digits.count(d) for d in "0123456789")
        assert problem.answer == wanted


def test_the_alphabet_holds_every_problem() -> None:
    for family in FAMILIES:
        for _, problem in some(family):
            assert set(problem.prompt + problem.solution()) <= set(ALPHABET)
    assert len(set(ALPHABET)) == len(ALPHABET)


def test_solutions() -> None:
    problem = Problem("sort", "s21=", "12", "1:2,2:")
    assert problem.solution() == "1:2,2:#12" and problem.solution(worked=False) == "#12"


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("#12", 1), ("1:2,2:#12", 1), ("#21#12", 1), ("##12", 1),
        ("", -1), ("12", -1), ("#", -1), ("#12#", -1), ("#12,", -1), ("#12s", -1), ("#012", -1), ("#1", -1),
        ("#12#21", -1), ("# 12", -1), ("#12 ", -1), ("#12\n", -1),
    ],
)  # fmt: skip
def test_the_verifier_wants_the_answer_and_nothing_after_it(completion, wanted) -> None:
    assert reward(Problem("sort", "s21=", "12", "1:2,2:"), completion) == wanted


def test_every_solution_is_right() -> None:
    for problem in problems(200, "solutions"):
        assert reward(problem, problem.solution()) == reward(problem, problem.solution(worked=False)) == 1


def test_held_out_problems_are_never_trained_on() -> None:
    small = {family: [2] for family in FAMILIES}
    trained = {p.prompt for p in problems(3000, "train", small)}
    kept = {p.prompt for p in problems(1500, "kept", small, held_out=True)}
    assert trained.isdisjoint(kept)
    # of the 100 ways to sort two digits, and the 100 to reverse them, all have been seen: about one in 8 is held out
    for letter in "sr":
        ours = {prompt for prompt in trained | kept if prompt[0] == letter}
        assert len(ours) == 100 and 4 <= len(ours & kept) <= 24


def test_the_same_key_gives_the_same_problems() -> None:
    assert problems(40, "rlvr/0/7") == problems(40, "rlvr/0/7")
    assert problems(40, "rlvr/0/7") != problems(40, "rlvr/0/8")
    assert problems(20, "rlvr/0/7") == problems(40, "rlvr/0/7")[:20]


def test_a_mixture_decides_families_and_sizes() -> None:
    found = problems(300, "mixture", {"add": [3], "reverse": range(4, 6)})
    assert {p.family for p in found} == {"add", "reverse"}
    assert {len(p.prompt) - 2 for p in found if p.family == "add"} == {6}
    assert {len(p.answer) for p in found if p.family == "reverse"} == {4, 5}
    assert 100 < sum(p.family == "add" for p in found) < 200


def test_parse_mixture() -> None:
    assert parse_mixture("add:2-4,sort:5") == {"add": range(2, 5), "sort": range(5, 6)}
    assert parse_mixture("reverse") == {"reverse": MIXTURE["reverse"]}
    assert parse_mixture("add:9") == {"add": range(9, 10)}
    # a mixture is the same in whatever order it is written: problems are drawn from it by place
    assert problems(9, "x", parse_mixture("sort:2,add:2")) == problems(9, "x", parse_mixture("add:2,sort:2"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no tasks given"), (",", "no tasks given"), ("divide", "unknown task 'divide'; choose from add, sort"),
        ("add:", "sizes are digits"), ("add:1", "sizes are digits, from 2 to 9, such as add:2-4"),
        ("add:2-10", "sizes"), ("sort:5-3", "sizes"), ("sort:x", "sizes"), ("sort:2-", "sizes"), ("sort:-3", "sizes"),
        ("sort:2-3-4", "sizes"), ("sort:\u00b2", "sizes"), ("add:2,add:3", "given twice"),
    ],
)  # fmt: skip
def test_mixtures_that_are_none(text, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_mixture(text)
