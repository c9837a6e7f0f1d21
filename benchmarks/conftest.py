"""Collects what the benchmarks measured: a table at the end, and results/<device>.json with OFFPRIN_BENCH_SAVE=1."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from pathlib import Path

import pytest

from offprin_kernels._env import environment

ROWS: list[dict] = []


@pytest.fixture
def record():
    """record(name, value, bar, what): one ratio with its bar and what it is a ratio of."""

    def add(name: str, value: float, bar: float | None, what: str, **details) -> None:
        ROWS.append({"name": name, "value": round(value, 4), "bar": bar, "what": what, **details})

    return add


def device_name() -> str:
    """The processor, as the system names it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        found = re.search(r"model name\s*:\s*(.*)", text)
        return found[1].strip() if found else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def pytest_terminal_summary(terminalreporter) -> None:
    if not ROWS:
        return
    terminalreporter.section(f"ratios on {device_name()}")
    for row in ROWS:
        bar = "" if row["bar"] is None else f" (bar {row['bar']}: {'met' if row['value'] >= row['bar'] else 'MISSED'})"
        terminalreporter.write_line(f"{row['value']:8.3f}  {row['name']}: {row['what']}{bar}")


def pytest_sessionfinish() -> None:
    if not ROWS or os.environ.get("OFFPRIN_BENCH_SAVE") != "1":
        return
    found = environment()
    threads = found["threads"]
    words = f"{device_name()} {found['instruction_set']} {threads} threads"
    name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    path = Path(__file__).parent / "results" / f"cpu-{name}.json"
    keep = {key: found[key] for key in ("versions", "platform", "instruction_set", "threads")}
    result = {"device": device_name(), "date": datetime.date.today().isoformat(), **keep, "ratios": ROWS}
    path.write_text(json.dumps(result, indent=1) + "\n")
