"""What pytest and compute-sanitizer said, as slices store it."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu import process, sanitizer, suite
from benchmarks.gpu.runner import Skipped


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
    found = suite.verdict(process.Ended(None, ""), suite.count(lines), 100)
    assert found["status"] == "partial" and found["error"] == "ran past 100 s, in b" and found["tests"]["passed"] == 1
    assert suite.verdict(process.Ended(0, ""), suite.count(lines[:2]), 100)["status"] == "ok"
    assert suite.verdict(process.Ended(-11, ""), suite.count(lines), 100)["error"] == "pytest ended with code -11, in b"
    assert suite.verdict(process.Ended(0, ""), suite.count([]), 100)["error"] == "no test ran"


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


def test_the_sanitizers_time_is_shared_and_api_errors_are_none(monkeypatch) -> None:
    commands, limits = [], []

    def ended(command, limit, *_):
        commands.append(command)
        limits.append(limit)
        return process.Ended(None, "")

    monkeypatch.setattr(sanitizer, "find", lambda: "compute-sanitizer")
    monkeypatch.setattr(process, "run", ended)
    monkeypatch.setattr(process, "left", lambda: 100.0)
    found = sanitizer.run()
    assert found["status"] == "partial" and limits == [40.0, 90.0]
    assert all(command[3:5] == ["--report-api-errors", "no"] for command in commands)
