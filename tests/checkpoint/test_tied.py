"""The head that is its embedding: stored once, twice and equal, twice and different."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offprin_kernels.checkpoint import Checkpoint, tied

from .files import bf16, pair_of, reason, save, status

FAMILIES = [
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("tok_embeddings.weight", "output.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
]


@pytest.mark.parametrize(("embedding", "head"), FAMILIES)
@pytest.mark.parametrize("with_head", ["base", "tuned"])
def test_absent_on_one_side(tmp_path: Path, embedding: str, head: str, with_head: str) -> None:
    once, twice = {embedding: bf16(9, 4)}, {embedding: bf16(9, 4, seed=1), head: bf16(9, 4, seed=1)}
    sides = (twice, once) if with_head == "base" else (once, twice)
    pairing = pair_of(tmp_path, *sides)
    assert pairing.complete and [found.name for found in pairing.pairs] == [embedding]
    assert status(pairing, with_head, head) == "tied"
    assert f"identical to {embedding}, counted once" in reason(pairing, with_head, head)


@pytest.mark.parametrize("with_head", ["base", "tuned"])
def test_absent_on_one_side_and_different_on_the_other(tmp_path: Path, with_head: str) -> None:
    embedding, head = FAMILIES[0]
    once, twice = {embedding: bf16(9, 4)}, {embedding: bf16(9, 4), head: bf16(9, 4, seed=2)}
    sides = (twice, once) if with_head == "base" else (once, twice)
    pairing = pair_of(tmp_path, *sides)
    assert not pairing.complete and status(pairing, with_head, head) == "unmatched"
    assert f"stores no head (tied there), and here it differs from {embedding}" in reason(pairing, with_head, head)


def test_absent_although_not_tied(tmp_path: Path) -> None:
    embedding, head = FAMILIES[0]
    twice = {embedding: bf16(9, 4), head: bf16(9, 4)}
    pairing = pair_of(tmp_path, twice, {embedding: bf16(9, 4)}, ({}, {"tie_word_embeddings": False}))
    assert status(pairing, "base", head) == "unmatched"
    assert "config.json says it is not tied" in reason(pairing, "base", head)


def test_twice_and_identical_on_both_sides(tmp_path: Path) -> None:
    embedding, head = FAMILIES[0]
    base, tuned = bf16(9, 4), bf16(9, 4, seed=1)
    pairing = pair_of(tmp_path, {embedding: base, head: base.clone()}, {embedding: tuned, head: tuned.clone()})
    assert pairing.complete and [found.name for found in pairing.pairs] == [embedding]
    for side in ("base", "tuned"):
        assert status(pairing, side, head) == "tied" and status(pairing, side, embedding) == "compared"
    left_out = pair_of(
        tmp_path, {embedding: base, head: base.clone()}, {embedding: tuned, head: tuned.clone()}, exclude=[embedding]
    )
    assert [found.name for found in left_out.pairs] == [head]


@pytest.mark.parametrize("different", ["base", "tuned", "both"])
def test_twice_and_different(tmp_path: Path, different: str) -> None:
    embedding, head = FAMILIES[0]
    sides = [
        {embedding: bf16(9, 4), head: bf16(9, 4, seed=5 if different in (side, "both") else 0)}
        for side in ("base", "tuned")
    ]
    pairing = pair_of(tmp_path, *sides)
    assert pairing.complete and {found.name for found in pairing.pairs} == {embedding, head}


def test_stored_under_the_name_of_the_head(tmp_path: Path) -> None:
    embedding, head = FAMILIES[0]
    sides = {embedding: bf16(9, 4)}, {head: bf16(9, 4)}
    pairing = pair_of(tmp_path / "a", *sides, ({}, {"tie_word_embeddings": True}))
    assert pairing.complete and pairing.pairs[0].tuned.name == head
    assert "under the name of the head" in pairing.pairs[0].note
    guess = pair_of(tmp_path / "b", *sides)
    assert not guess.pairs and guess.counts() == {"base": {"unmatched": 1}, "tuned": {"unmatched": 1}}


def test_embedding_absent_on_one_side(tmp_path: Path) -> None:
    embedding, head = FAMILIES[0]
    pairing = pair_of(tmp_path, {embedding: bf16(9, 4), head: bf16(9, 4)}, {head: bf16(9, 4)})
    assert pairing.complete and [found.name for found in pairing.pairs] == [head]
    assert status(pairing, "base", embedding) == "tied"


def test_bytes_decide_and_reading_stops_at_the_first_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tied, "CHUNK", 64)
    nan = torch.full((40, 4), float("nan"), dtype=torch.bfloat16)
    zero, minus = torch.zeros(40, 4), torch.zeros(40, 4)
    minus[39, 3] = -0.0
    early = torch.zeros(40, 4)
    early[0, 0] = 1
    tensors = {"nan": nan, "nan2": nan.clone(), "zero": zero, "minus": minus, "early": early, "no": bf16(0, 4)}
    checkpoint = Checkpoint.open(save(tmp_path, {**tensors, "no2": bf16(0, 4)}))
    assert tied.identical(checkpoint, "nan", "nan2") and tied.identical(checkpoint, "no", "no2")
    assert not tied.identical(checkpoint, "zero", "minus")
    assert not tied.identical(checkpoint, "zero", "nan")
    reads = []
    real = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda *a, **k: reads.append(a) or real(*a, **k))
    assert not tied.identical(checkpoint, "zero", "early")
    assert len(reads) == 2
