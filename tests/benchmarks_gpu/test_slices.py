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
from benchmarks.gpu.runner import tell
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
    ops = ["tests-device", "tests-scan", "tests-step", "tests-select", "tests-subspace"]
    assert names == ["versions", *ops, "ceilings", "update_scan", "mask_algebra", "masked_adamw", "model_step",
                     "topk_svd", "principal_mask", "project_out", "analyze", "sanitizer",
                     "tests-optim", "tests-compile", "tests-files", "tests-models", "tests-analysis"]  # fmt: skip
    assert {f"tests-{part}" for part in suite.PARTS} < set(names)
    assert max(item.limit for item in SLICES) <= 300 and all(item.limit <= 240 for item in SLICES if item.name in ops)
    assert len(sanitizer.TOOLS) * sanitizer.LIMIT < sanitizer.SECONDS


# ---- bytes and operations -------------------------------------------------------------------------------------------


def test_traffic_of_projections_and_rows() -> None:
    assert registry.project_traffic(100, 200, 8, "right", 2) == registry.Traffic(40_000 + 6400, 40_000)
    assert registry.project_traffic(100, 200, 8, "both", 2) == registry.Traffic(80_000 + 9600, 40_000)
    # U^T (x V) and U c V^T: 2 x 2 m n k, and 2 x 2 m k k between them
    assert registry.project_operations(100, 200, 8, "both") == 4 * 100 * 200 * 8 + 4 * 100 * 64
    # one row of 20 of fp32: weights, gradients and moments of it, bits of all
    assert registry.masked_rows_traffic(1600, 0.05, 4) == registry.Traffic(80 * 8 + 80 * 8 + 200, 80 * 4 + 80 * 8)


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
        assert row["backend"] in ("cpu", "torch")
    tell(name, {"status": "ok", "seconds": 0.0, "error": None, **found}, print)
    assert capsys.readouterr().out


def test_a_tf32_product_made_in_fp32_is_no_ceiling_of_tf32() -> None:
    device = torch.device("cuda")
    ceilings.judge("tf32", 3e-4, device)
    for kind, error in (("tf32", 1e-6), ("tf32", 1e-2), ("fp32", 3e-4), ("bf16", float("nan"))):
        with pytest.raises(RuntimeError, match=f"a {kind} product is off"):
            ceilings.judge(kind, error, device)


def test_random_masks_have_a_floor_for_either_line() -> None:
    by_name = {case.mask: case for case in masked_adamw.CASES if case.dtype == torch.float32}
    found = masked_adamw.floors(by_name["1 % random"], 10**6, ("copy", "GB/s", 1000.0))
    # 16 fp32 weights to a line of 64 bytes: about twice the sectors of 8
    assert found["64"]["bytes"] > 1.5 * found["32"]["bytes"] and found["32"]["floor_ms"] * 1e9 == pytest.approx(
        found["32"]["bytes"]
    )
    assert masked_adamw.traffic_of(by_name["1 % random"], 10**6).total == found["32"]["bytes"]
    assert masked_adamw.floors(by_name["5 % as rows"], 10**6, ("copy", "GB/s", 1000.0)) == {}


def test_results_of_timed_calls_lie_in_memory_where_they_fit(tmp_path) -> None:
    assert analyze.outputs(1, tmp_path) == tmp_path
    assert analyze.outputs(1 << 60, tmp_path) is None and analyze.outputs(1, tmp_path / "none") is None


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
@pytest.mark.parametrize("what", ["weights", "exp_avg", "exp_avg_sq"])
def test_a_wrong_step_is_not_timed(monkeypatch, what) -> None:
    plain, case = masked_adamw.MaskedAdamW, masked_adamw.CASES[2]

    class Wrong(plain):  # type: ignore[misc, valid-type]
        def step(self, closure=None):
            super().step(closure)
            if self.backend != "reference":
                param = self.param_groups[0]["params"][0]
                with torch.no_grad():
                    spoilt = param if what == "weights" else self.state[param][what]
                    spoilt.view(-1)[0] += 1

    masked_adamw.check(case, CPU)
    monkeypatch.setattr(masked_adamw, "MaskedAdamW", Wrong)
    with pytest.raises(RuntimeError, match=f"wrong in .*{what}.* no timing of a wrong answer"):
        masked_adamw.check(case, CPU)
