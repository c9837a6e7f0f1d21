"""update_scan: every backend against the reference, bit for bit; sums within the rounding of their own order."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offprin_kernels import BackendUnavailable
from offprin_kernels.ops.update_scan import Output, Rule, contract, scan

from .weights import DTYPES, SPECIAL_CODES, all_patterns, from_codes, random_bits, tuned, weights, with_specials

RULES = (
    Rule.parse("bitwise"),
    Rule.parse("ulp", 0),
    Rule.parse("ulp", 3),
    Rule.parse("eta"),
    Rule.parse("eta", 0.1),
    Rule.parse("atol", 1e-5),
    Rule.parse("atol", 0),
    Rule.parse("storage"),
)


def supported(backend: str, outputs: Output) -> Output:
    """The CUDA C++ kernel makes masks and row counts only."""
    return outputs & (Output.MASK | Output.ROWS) if backend == "cuda" else outputs


def assert_same(got: contract.ScanTensors, want: contract.ScanTensors, elements: int) -> None:
    for name in contract.ScanTensors._fields:
        a, b = getattr(got, name).cpu(), getattr(want, name).cpu()
        if name != "norms":
            assert torch.equal(a, b), f"{name}: {a.flatten()[:20]} instead of {b.flatten()[:20]}"
        elif b.numel():
            # products are exact or rounded once in fp64; sums of `elements` terms may differ by their order
            scale = torch.stack([b[:, 0], b[:, 1], (b[:, 0] * b[:, 1]).sqrt(), b[:, 3]], 1).abs()
            slack = torch.tensor([1.0, 1.0, 1.0, 0.0]).double() * max(elements, 1) * 2.0**-52 * scale
            close = ((a - b).abs() <= slack) | (a == b) | (a.isnan() & b.isnan())
            assert bool(close.all()), f"norms: {a} instead of {b}"


def check(base, after, rules, outputs, backend, device, additive=False) -> contract.ScanTensors:
    outputs = supported(backend, outputs)
    got = scan(base.to(device), after.to(device), rules, outputs, additive=additive, backend=backend)
    want = scan(base, after, rules, outputs, additive=additive, backend="reference")
    assert_same(got, want, base.numel())
    return got


@pytest.mark.parametrize("partner", [*SPECIAL_CODES, "next", "negated", "shuffled"])
def test_every_bf16_pattern(backend, device, partner) -> None:
    base = all_patterns()
    codes = torch.arange(65536)
    if partner == "next":
        after = from_codes((codes + 1) % 65536)
    elif partner == "negated":
        after = from_codes(codes ^ 0x8000)
    elif partner == "shuffled":
        after = base[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    else:
        after = from_codes(torch.full((65536,), partner))
    shape = (64, 1024)
    check(base.view(shape), after.view(shape), RULES, Output.all(), backend, device)
    check(after.view(shape), base.view(shape), RULES, Output.all(), backend, device)


@pytest.mark.parametrize(("base_dtype", "tuned_dtype"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("additive", [False, True])
def test_every_pair_of_dtypes(backend, device, base_dtype, tuned_dtype, additive) -> None:
    for seed, make in enumerate((weights, random_bits)):
        base = make((9, 201), dtype=base_dtype, seed=seed)
        after = tuned(base, tuned_dtype) if make is weights else make((9, 201), dtype=tuned_dtype, seed=seed + 9)
        if additive and make is weights:
            after = (after.float() - base.float()).to(tuned_dtype)
        check(base, after, RULES[:-1] if additive else RULES, Output.all(), backend, device, additive)


SHAPES = [(), (1,), (63,), (64,), (65,), (1, 1), (1, 4097), (3, 5), (5, 64), (7, 130), (200, 3), (2, 3, 70), (130, 1)]


@pytest.mark.parametrize("shape", [*SHAPES, (33, 2048)])
def test_shapes(backend, device, shape) -> None:
    base = with_specials(weights(shape), seed=3, share=0.05)
    check(base, with_specials(tuned(base), seed=4, share=0.05), RULES[:1], Output.all(), backend, device)


@pytest.mark.parametrize("shape", [(0,), (0, 7), (5, 0), (0, 0), (3, 0, 2)])
def test_zero_size(backend, device, shape) -> None:
    empty = torch.zeros(shape, dtype=torch.bfloat16)
    got = check(empty, empty, RULES[:2], Output.all(), backend, device)
    assert got.rule_counts[:, 0].tolist() == [0, 0]


@pytest.mark.parametrize("wanted", [Output(0), *Output, Output.MASK | Output.ROWS, Output.COLUMNS | Output.NORMS])
def test_each_output_alone(backend, device, wanted) -> None:
    base = weights((17, 300))
    got = check(base, tuned(base), RULES[:1], wanted, backend, device)
    for flag, name in ((Output.MASK, "mask"), (Output.ROWS, "row_counts"), (Output.NORMS, "norms")):
        assert (getattr(got, name).numel() > 0) == (flag in supported(backend, wanted))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_each_rule_decides_the_mask(backend, device, rule) -> None:
    base = with_specials(weights((11, 333)), seed=5)
    check(base, with_specials(tuned(base), seed=6), (rule,), Output.all(), backend, device)


def test_unchanged_input(backend, device) -> None:
    base = with_specials(weights((8, 256)), seed=7)
    got = check(base, base.clone(), RULES[:1], Output.all(), backend, device)
    assert int(got.rule_counts[0, 0]) == 0


def test_mask_into_given_memory(backend, device) -> None:
    base = weights((19, 333)).to(device)
    after = tuned(base.cpu()).to(device)
    given = torch.full((19, 48), 0xA5, dtype=torch.uint8, device=device)
    version = given._version
    got = scan(base, after, RULES[:1], Output.ROWS, mask_out=given, backend=backend)
    want = scan(base.cpu(), after.cpu(), RULES[:1], Output.MASK | Output.ROWS, backend="reference")
    assert got.mask is given and given._version > version
    assert_same(got, want, base.numel())


def test_bad_memory_for_the_mask() -> None:
    base = torch.zeros(3, 70)
    for bad in (torch.zeros(3, 8, dtype=torch.uint8), torch.zeros(3, 16), torch.zeros(16, 3, dtype=torch.uint8).T):
        with pytest.raises(ValueError, match="mask_out must be a contiguous uint8 tensor"):
            scan(base, base, mask_out=bad)


def test_same_input_same_bits(backend, device) -> None:
    base = weights((64, 3000)).to(device)
    after = tuned(base.cpu()).to(device)
    outputs = supported(backend, Output.all())
    first, second = (scan(base, after, RULES, outputs, backend=backend) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_non_contiguous(backend, device) -> None:
    wide = weights((70, 90)).to(device)
    base, after = wide.T[::2], tuned(wide.cpu()).to(device).T[::2]
    outputs = supported(backend, Output.all())
    got = scan(base, after, RULES, outputs, backend=backend)
    want = scan(base.cpu().contiguous(), after.cpu().contiguous(), RULES, outputs, backend="reference")
    assert_same(got, want, base.numel())


def test_misaligned_storage(backend, device) -> None:
    flat = weights((3001,)).to(device)
    base, after = flat[1:3001].view(5, 600), tuned(flat.cpu()).to(device)[1:3001].view(5, 600)
    outputs = supported(backend, Output.all())
    want = scan(base.cpu().clone(), after.cpu().clone(), RULES, outputs, backend="reference")
    assert_same(scan(base, after, RULES, outputs, backend=backend), want, base.numel())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), columns=st.integers(1, 200), seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES))
def test_random_bits_of_any_shape(backend, device, rows, columns, seed, dtype) -> None:
    base, after = random_bits((rows, columns), dtype, seed), random_bits((rows, columns), dtype, seed + 1)
    after = torch.where(torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5, base, after)
    check(base, after, RULES, Output.all(), backend, device)


@pytest.mark.traced
def test_opcheck(backend, device) -> None:
    base = weights((6, 130)).to(device)
    outputs = int(supported(backend, Output.all()))
    after = tuned(base.cpu()).to(device)
    rules = [0.0, 0.0, 2.0, 1e-3]
    torch.library.opcheck(torch.ops.offprin.update_scan, (base, after, rules, outputs, False, backend))
    mask = torch.zeros(6, 24, dtype=torch.uint8, device=device)
    torch.library.opcheck(torch.ops.offprin.update_scan_into, (base, after, mask, rules, outputs, False, backend))


@pytest.mark.traced
def test_compiles(backend, device) -> None:
    def changed(base, after):
        return scan(base, after, RULES[:1], Output.MASK, backend=backend).rule_counts[0, 0] * 2

    base = weights((6, 130)).to(device)
    after = tuned(base.cpu()).to(device)
    compiled = torch.compile(changed, fullgraph=True, backend="eager")
    assert int(compiled(base, after)) == int(changed(base, after)) > 0


def test_cuda_refuses_outputs_it_does_not_make() -> None:
    base = torch.zeros(4, 4, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailable):
        scan(base, base, RULES[:1], Output.all(), backend="cuda")


@pytest.mark.parametrize(
    ("base", "after", "error", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), ValueError, "shape"),
        (torch.zeros(2, 3).double(), torch.zeros(2, 3), TypeError, "float64"),
        (torch.zeros(2, 3), torch.zeros(2, 3).int(), TypeError, "tuned is torch.int32"),
        (torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3), TypeError, "layout"),
    ],
)
def test_bad_tensors(base, after, error, words) -> None:
    with pytest.raises(error, match=words):
        scan(base, after)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (("nearly",), "unknown rule"),
        (("ulp",), "needs a threshold"),
        (("ulp", -1), "not negative"),
        (("ulp", 0.5), "whole number"),
        (("eta", float("nan")), "finite"),
        (("atol", float("inf")), "finite"),
        (("bitwise", 1), "takes no threshold"),
    ],
)
def test_bad_rules(rule, words) -> None:
    with pytest.raises(ValueError, match=words):
        Rule.parse(*rule)


@pytest.mark.parametrize(
    ("code", "threshold"),
    [("ATOL", -1.0), ("ETA", float("nan")), ("ULP", 0.5), ("BITWISE", 1.0), ("ULP", float("inf"))],
)
def test_rules_made_by_hand_are_checked_too(code, threshold) -> None:
    with pytest.raises(ValueError, match=f"rule '{code.lower()}'"):
        Rule(contract.RuleCode[code], threshold)


def test_names_of_rules_tell_thresholds_apart() -> None:
    assert [str(Rule.parse(*rule)) for rule in (("eta",), ("atol", 1e-5), ("ulp", 2))] == [
        "eta(0.001)", "atol(1e-05)", "ulp(2)",
    ]  # fmt: skip
    assert str(Rule.parse("atol", 1.0000001e-5)) == "atol(1.0000001e-05)"
    assert str(Rule.parse("ulp", 1234567)) == "ulp(1234567.0)" != str(Rule.parse("ulp", 1234568))
    assert Rule.parse("atol", -0.0) == Rule.parse("atol", 0) and str(Rule.parse("atol", -0.0)) == "atol(0)"


@pytest.mark.parametrize("name", ["reference", "cpu", "triton", "cuda"])
def test_more_rules_than_any_backend_takes(name) -> None:
    with pytest.raises(ValueError, match="at most 8 rules, got 9"):
        scan(torch.zeros(2), torch.zeros(2), [Rule.parse("ulp", n) for n in range(9)], backend=name)


def test_storage_of_a_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="has none yet"):
        scan(torch.zeros(2), torch.zeros(2), [Rule.parse("storage")], additive=True)


def test_bad_output() -> None:
    with pytest.raises(ValueError, match="unknown output 'colour'"):
        Output.parse(["mask", "colour"])
