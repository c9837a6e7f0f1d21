"""The slices: each test file is in one, shares follow from times, wrong answers are not timed, all run on a CPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import registry
from benchmarks.gpu import (
    analyze,
    ceilings,
    machine,
    mask_algebra,
    masked_adamw,
    model_step,
    native_calls,
    principal_mask,
    process,
    project_out,
    sanitizer,
    suite,
    timing,
    topk_svd,
    update_scan,
)
from benchmarks.gpu.runner import Skipped, tell
from benchmarks.gpu.slices import SLICES
from offprin_kernels import _native

CPU = torch.device("cpu")
TESTS = process.ROOT / "tests"


# ---- the list -------------------------------------------------------------------------------------------------------


def test_every_test_file_is_in_one_slice() -> None:
    covered = [
        file
        for paths in suite.PARTS.values()
        for path in paths
        for file in ([TESTS / path] if path.endswith(".py") else sorted((TESTS / path).rglob("test_*.py")))
    ]
    left_out = {file for folder in suite.LEFT_OUT for file in (TESTS / folder).rglob("test_*.py")}
    assert len(covered) == len(set(covered))
    assert set(covered) | left_out == set(TESTS.rglob("test_*.py")) and not set(covered) & left_out


def test_order_and_names() -> None:
    names = [item.name for item in SLICES]
    assert names == ["versions", *(f"tests-{part}" for part in suite.PARTS), "sanitizer", "ceilings", "update_scan",
                     "mask_algebra", "masked_adamw", "model_step", "topk_svd", "principal_mask", "project_out",
                     "analyze"]  # fmt: skip
    assert len(set(names)) == len(names)
    assert max(item.limit for item in SLICES) > suite.LIMIT and len(sanitizer.TOOLS) * sanitizer.LIMIT < 480


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_shares_follow_from_times() -> None:
    # 6 GB in 2 ms are 3000 GB/s, of 4000 that are there
    row = timing.row("op", "case", "triton", {}, [1.0, 2.0, 3.0], nbytes=6 * 10**9, ceiling=("copy", "GB/s", 4000.0),
                     bar=0.76)  # fmt: skip
    assert row["floor_ms"] == 1.5 and row["share"] == 0.75
    assert row["ratios"][0]["met"] is False and row["ratios"][0]["value"] == 0.75
    assert row["ms"] == {"median": 2.0, "min": 1.0, "q1": 1.5, "q3": 2.5, "max": 3.0, "rounds": 3}
    # 8 TFLOP in 20 ms are 400 TFLOP/s, of 800
    rate = timing.row("op", "case", "triton", {}, [20.0], operations=8e12, ceiling=("mm", "TFLOP/s", 800.0), bar=0.5)
    assert rate["share"] == 0.5 and rate["ratios"][0]["met"] is True
    with pytest.raises(ValueError, match="does not say how much"):
        timing.row("op", "case", "triton", {}, [1.0], nbytes=1, ceiling=("mm", "TFLOP/s", 800.0))
    json.dumps(row, allow_nan=False)


def test_ratios_to_peers() -> None:
    found = timing.faster("a peer", [1.0, 2.0, 4.0], [3.0, 8.0, 8.0], 3.5)
    assert found["value"] == 3.0 and found["met"] is False and found["ms"]["median"] == 8.0
    assert timing.ratio("x", 1.2, 1.15, at_most=True)["met"] is False
    assert timing.ratio("x", 1.1, 1.15, at_most=True)["met"] is True
    assert timing.ratio("x", 1.1)["met"] is None


def test_candidates_take_turns_and_a_slow_one_ends_early() -> None:
    seen: list[tuple[str, int]] = []
    found = timing.turns(
        {name: lambda turn, name=name: seen.append((name, turn)) for name in "ab"}, CPU, rounds=3, warm_up=1
    )
    assert seen == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert {name: len(ms) for name, ms in found.items()} == {"a": 3, "b": 3}
    assert len(timing.turns({"a": lambda _: None}, CPU, rounds=9, seconds=-1)["a"]) == 1


def test_inputs_are_larger_than_the_cache() -> None:
    assert timing.copies(machine.L2_BYTES * 100, CPU) == 2
    assert timing.copies(machine.L2_BYTES // 4, CPU) == 16


def test_traffic_of_projections_and_rows() -> None:
    assert registry.project_traffic(100, 200, 8, "right", 2) == registry.Traffic(40_000 + 6400, 40_000)
    assert registry.project_traffic(100, 200, 8, "both", 2) == registry.Traffic(80_000 + 9600, 40_000)
    # U^T (x V) and U c V^T: 2 x 2 m n k, and 2 x 2 m k k between them
    assert registry.project_operations(100, 200, 8, "both") == 4 * 100 * 200 * 8 + 4 * 100 * 64
    # one row of 20 of fp32: weights, gradients and moments of it, bits of all
    assert registry.masked_rows_traffic(1600, 0.05, 4) == registry.Traffic(80 * 8 + 80 * 8 + 200, 80 * 4 + 80 * 8)


# ---- verdicts of other programs -------------------------------------------------------------------------------------


def test_the_suite_is_tallied(tmp_path, monkeypatch) -> None:
    (tmp_path / "tests" / "x").mkdir(parents=True)
    (tmp_path / "tests" / "x" / "test_x.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_skipped(): pytest.skip('no')\n"
        "@pytest.mark.xfail\n"
        "def test_known(): assert False\n"
        "@pytest.fixture\n"
        "def broken(): raise RuntimeError('no fixture')\n"
        "def test_error(broken): pass\n"
    )
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "PARTS", {"x": ("x/test_x.py",), "none": ("x/test_none.py",)})
    found = suite.run("x")
    tests = found["tests"]
    assert found["status"] == "failed" and found["error"] == "2 tests failed"
    assert (tests["passed"], tests["failed"], tests["skipped"], tests["xfailed"]) == (1, 2, 1, 1)
    assert ["one is not two" in failure["says"] for failure in tests["failures"]] == [True, False]
    assert tests["failures"][0]["test"].endswith("test_x.py::test_bad") and tests["unfinished"] is None
    assert suite.run("none")["status"] == "failed"


def test_a_suite_past_its_limit_says_where(monkeypatch) -> None:
    lines = [json.dumps({"test": test, "verdict": verdict, "says": ""}) for test, verdict in
             (("a", "begun"), ("a", "passed"), ("b", "begun"))]  # fmt: skip
    found = suite.verdict(process.Ended(None, ""), suite.count(lines))
    assert found["status"] == "failed" and found["error"].endswith("in b") and found["tests"]["passed"] == 1
    assert suite.verdict(process.Ended(0, ""), suite.count(lines[:2]))["status"] == "ok"
    assert suite.verdict(process.Ended(-11, ""), suite.count(lines))["error"] == "pytest ended with code -11, in b"
    assert suite.verdict(process.Ended(0, ""), suite.count([]))["error"] == "no test ran"


@pytest.mark.parametrize(
    ("tool", "code", "output", "said"),
    [
        ("memcheck", 0, "381 calls made\n========= ERROR SUMMARY: 0 errors\n", "clean"),
        ("racecheck", 0, "381 calls made\n========= RACECHECK SUMMARY: 0 hazards displayed\n", "clean"),
        ("memcheck", 9, "381 calls made\n========= ERROR SUMMARY: 3 errors\n", "3 found"),
        ("memcheck", 0, "========= ERROR SUMMARY: 0 errors\n", "memcheck ended with code 0 and no verdict"),
        ("memcheck", 1, "Device not supported", "memcheck ended with code 1 and no verdict"),
        ("memcheck", None, "", f"ran past {sanitizer.LIMIT} s"),
    ],
)
def test_the_sanitizers_verdict(tool, code, output, said) -> None:
    assert sanitizer.verdict(tool, process.Ended(code, output)) == said


def test_a_missing_sanitizer_is_said(monkeypatch) -> None:
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    with pytest.raises(Skipped, match="not installed"):
        sanitizer.run()


# ---- the ops, tiny --------------------------------------------------------------------------------------------------

needs_cpu_library = pytest.mark.skipif(
    isinstance(_native.load("cpu"), str), reason="these rehearsals take the CPU library for the device"
)
RUNS = {
    "ceilings": lambda: ceilings.run("cpu", 1 << 16, 64, 2),
    "update_scan": lambda: update_scan.run("cpu", (130, 192), (64, 128), ("cpu",), 2),
    "mask_algebra": lambda: mask_algebra.run("cpu", (130, 1024), "cpu", 2),
    "masked_adamw": lambda: masked_adamw.run("cpu", 2, (64, 80), 1 << 16, 2),
    "model_step": lambda: model_step.run("cpu", model_step.shapes_of(1, 64, 96, 128), 2),
    "topk_svd": lambda: topk_svd.run("cpu", (120, 180), 4, 2),
    "principal_mask": lambda: principal_mask.run("cpu", (100, 215), 8, 2),
    "project_out": lambda: project_out.run("cpu", (100, 200), 8, 1 << 16, 64, 2),
    "analyze": lambda: analyze.run(
        "cpu", 2, (64, 96), {"self_attn.q_proj": (96, 96), "mlp.up_proj": (128, 96)}, 4, 1 << 16, 2
    ),
}


@needs_cpu_library
@pytest.mark.parametrize("name", RUNS)
def test_slices_run_on_the_cpu(name, monkeypatch, capsys) -> None:
    monkeypatch.setattr(machine, "L2_BYTES", 1 << 16)
    found = RUNS[name]()
    json.dumps(found, allow_nan=False)
    for row in found.get("rows", []):
        assert row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"] and row["ms"]["rounds"] >= 1
        assert (row["share"] is None) == (row["ceiling"] is None)
    tell(name, {"status": "ok", "seconds": 0.0, "error": None, **found}, print)
    assert capsys.readouterr().out


def test_summaries_are_compared_counts_exactly() -> None:
    ours = {"changed": 7, "norm": 1.0, "rules": {"eta": {"changed": None}}}
    assert analyze.same({**ours, "norm": 1.0 + 1e-12}, ours)
    for wrong in ({**ours, "changed": 8}, {**ours, "norm": 1.0 + 1e-6}, {**ours, "rules": {}}, {"changed": 7}):
        assert not analyze.same(wrong, ours)


def test_the_projection_adds_up() -> None:
    # 282 GB at 28.2 GB/s, and 80 layers of 3 s
    said = analyze.projection(28.2e9, 3.0, 80)
    assert "10 s for update and masks, 4 min with all metrics" in said


@needs_cpu_library
def test_native_calls_are_compared() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_calls, "SHAPES", ((3, 63), (7, 65)))
        patch.setattr(native_calls, "LARGE", (4, 128))
        assert native_calls.run("cpu", "cpu") == 3 * (2 * 9 * 2 + 1)


def spoil(monkeypatch, module, name: str, change) -> None:
    plain = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **options: change(plain(*args, **options), args, options))


def first_bit(mask) -> None:
    """Flips a bit of a mask that a device is said to have made."""
    mask.view(-1)[0] ^= 1


@needs_cpu_library
def test_wrong_answers_are_not_timed(monkeypatch) -> None:
    def timed(*args: object, **options: object) -> None:
        pytest.fail("a wrong answer was timed")

    monkeypatch.setattr(timing, "turns", timed)
    pair = update_scan.make_pair((130, 192), CPU)

    def scanned(result, args, options):
        if options.get("backend") == "cpu" and len(args[0]) == 130:
            first_bit(result.mask)
        return result

    spoil(monkeypatch, update_scan, "scan", scanned)
    with pytest.raises(RuntimeError, match="wrong mask"):
        update_scan.check(*pair, update_scan.BITWISE, update_scan.Output.MASK, "cpu")

    def counted(result, args, options):
        return result + (options.get("backend") == "cpu")

    for name in ("pair_counts", "agreement"):
        with monkeypatch.context() as patch:
            spoil(patch, mask_algebra.op, name, counted)
            with pytest.raises(RuntimeError, match="no timing of a wrong answer"):
                mask_algebra.run("cpu", (130, 1024), "cpu", 1) if name == "pair_counts" else mask_algebra.check(
                    name,
                    lambda given, backend="cpu": mask_algebra.op.agreement(given, 1024, backend=backend),
                    [mask_algebra.random_mask(130, 1024, CPU)] * 2,
                )

    def projected(result, args, options):
        return result.mul_(1.01) if args[0].dtype == torch.float32 else result

    spoil(monkeypatch, project_out, "project_out", projected)
    with pytest.raises(RuntimeError, match="no timing of a wrong answer"):
        project_out.check(torch.randn(30, 40), project_out.factors((30, 40), 4, CPU), "both")

    def selected(result, args, options):
        return ~result

    spoil(monkeypatch, principal_mask, "principal_mask", selected)
    with pytest.raises(RuntimeError, match="leaves out"):
        principal_mask.check(principal_mask.factors((30, 40), 4, CPU), None)


@needs_cpu_library
def test_a_wrong_step_is_not_timed(monkeypatch) -> None:
    plain, case = masked_adamw.MaskedAdamW, masked_adamw.CASES[2]

    class Wrong(plain):  # type: ignore[misc, valid-type]
        def step(self, closure=None):
            super().step(closure)
            if self.backend is None:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].view(torch.int16)[0, 0] ^= 1

    masked_adamw.check(case, CPU)
    monkeypatch.setattr(masked_adamw, "MaskedAdamW", Wrong)
    with pytest.raises(RuntimeError, match="no timing of a wrong answer"):
        masked_adamw.check(case, CPU)
