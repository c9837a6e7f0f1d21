"""A pytest plugin that writes every verdict as it falls, so that a run stopped half-way still says what it found."""

from __future__ import annotations

import json
import os

import pytest

ONE_LINE = 300  # characters of a failure's message that are kept


def pytest_configure(config: pytest.Config) -> None:
    # with pytest-xdist, its workers report to the process that tallies
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Tally(os.environ["OFFPRIN_TALLY"]), "offprin-tally")


class Tally:
    def __init__(self, path: str) -> None:
        self.path = path

    def write(self, test: str, verdict: str, says: str = "") -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"test": test, "verdict": verdict, "says": says}) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(nodeid, "begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.write(report.nodeid, "failed", message(report))
        elif report.when == "call" and report.passed:
            self.write(report.nodeid, "passed")
        elif report.skipped:
            self.write(report.nodeid, "xfailed" if hasattr(report, "wasxfail") else "skipped")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(report.nodeid, "failed", message(report))


def message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The last line that says what was wrong."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[0] if crash else lines[-1])[:ONE_LINE] if lines else ""
