"""``report.html``: what it says, its size and its bytes, and what a browser makes of it."""

from __future__ import annotations

import builtins
import json
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from offprin_kernels.analysis.html import write_report
from offprin_kernels.cli import main
from offprin_kernels.output import OutputError

from . import synthetic
from .browser import Browser, needed
from .checkpoints import base_weights, offprin, save, tuned_weights

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "artifacts"
ALL = ("--metrics", "spectrum,masks,energy", "--k", "5", "--also", "eta:1e-3", "atol:1e-5")
SECTIONS = (
    "summary sparsity stripes angles spectra nss energy overlap agreement bounds reconciliation matrices-section "
    "ledger provenance"
).split()


class Page(HTMLParser):
    """The elements of a page, and whether every one that was opened is closed in order."""

    VOID = {"meta", "link", "br", "input", "img", "path", "rect", "circle"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def all(self, tag: str, **wanted: str) -> list[dict]:
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]


@pytest.fixture
def plotly() -> None:
    """For what writes a page."""
    pytest.importorskip("plotly")


@pytest.fixture
def finished(pair, tmp_path, plotly):
    """A real analysis of two runs, with every metric."""
    assert offprin(*pair[2], "--out", tmp_path / "out", *ALL) == 0
    return tmp_path / "out"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """562 tensors of 5 runs, as a 70-billion model has them."""
    pytest.importorskip("plotly")
    root = synthetic.write(tmp_path_factory.mktemp("large") / "out")
    write_report(root)
    return root


def without(monkeypatch, library: str) -> None:
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name.split(".")[0] == library:
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    for module in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", refuse)


def test_sections_figures_and_their_labels(finished) -> None:
    text = write_report(finished).read_text()
    page = Page(text)
    assert not page.open
    assert [found["id"] for found in page.all("section")] == SECTIONS
    links = [found["href"] for found in page.all("a") if found.get("href", "").startswith("#")]
    assert [f"#{key}" for key in SECTIONS] == links[: len(SECTIONS)]
    plots = page.all("div", role="img")
    assert len(plots) >= 9
    assert all(len(found["aria-label"]) > 40 and found["id"] for found in plots)
    for found in plots:
        figure = json.loads(re.search(rf'id="data-{found["id"]}">(.*?)</script>', text)[1])
        assert figure["data"] and figure["layout"]["height"] > 100
    assert page.all("html", lang="en") and len(page.all("h1")) == 1


def test_nothing_is_asked_for_elsewhere(finished) -> None:
    page = Page(write_report(finished).read_text())
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "default-src 'none'" in page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]


def test_equal_input_equal_bytes(finished, tmp_path) -> None:
    first = write_report(finished).read_bytes()
    other = write_report(finished, out=tmp_path / "other.html")
    assert other == tmp_path / "other.html" and other.read_bytes() == first


def test_size_of_a_large_report(large) -> None:
    assert (large / "report.html").stat().st_size < 15e6


@pytest.mark.usefixtures("plotly")
def test_names_cannot_break_the_page(tmp_path) -> None:
    base = base_weights()
    paths = [save(tmp_path / "base", base), *(save(tmp_path / str(s), tuned_weights(base, s)) for s in (1, 2))]
    names = ["<b>&\"'</script>", "%{x}" + "n" * 150]
    # a slash cannot be in a name; the rest can
    names[0] = names[0].replace("/", "")
    assert offprin(*paths, "--out", tmp_path / "out", "--names", *names, *ALL) == 0
    text = write_report(tmp_path / "out").read_text()
    assert not Page(text).open and names[0] not in text


@pytest.mark.usefixtures("plotly")
def test_one_run_without_metrics(pair, tmp_path) -> None:
    assert offprin(*pair[2][:2], "--out", tmp_path / "out", "--also") == 0
    text = write_report(tmp_path / "out").read_text()
    page = Page(text)
    assert [found["id"] for found in page.all("section")] == SECTIONS
    assert text.count("Not measured") >= 4 and "One run has none to agree with." in text
    assert "Do the runs agree?" not in text


@pytest.mark.usefixtures("plotly")
def test_page_of_the_top_of_the_spectrum(pair, tmp_path) -> None:
    metrics = ("--metrics", "spectrum", "--k", "5", "--nss", "top")
    assert offprin(*pair[2], "--out", tmp_path / "out", *metrics) == 0
    text = write_report(tmp_path / "out").read_text()
    assert "NSS, top k, median" in text and "Mirsky, top k" in text
    assert "not measured: --nss full" in text
    assert Page(text).all("div", id="nss-by-layer")


@pytest.mark.usefixtures("plotly")
def test_identical_checkpoints(pair, tmp_path) -> None:
    base = pair[2][0]
    assert offprin(base, base, base, "--out", tmp_path / "out", "--names", "a", "b", *ALL) == 0
    text = write_report(tmp_path / "out").read_text()
    assert "<b>0 of " in text and not Page(text).open


@pytest.mark.usefixtures("plotly")
def test_partial_and_not_finite(pair, tmp_path) -> None:
    base = base_weights()
    tuned = tuned_weights(base, 1)
    tuned["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    del tuned["model.layers.1.self_attn.q_proj.weight"]
    paths = [save(tmp_path / "b", base), save(tmp_path / "t", tuned)]
    assert offprin(*paths, "--out", tmp_path / "out", *ALL) == 3
    text = write_report(tmp_path / "out").read_text()
    assert "Some tensors could not be compared" in text and "NaN or Inf in 1 tensors of t" in text
    assert "model.layers.1.self_attn.q_proj.weight" in text


@pytest.mark.usefixtures("plotly")
def test_page_of_many_runs(tmp_path) -> None:
    """Fourteen long names that differ in the middle: told apart everywhere, and no sentence lists them all."""
    root = synthetic.write(tmp_path / "many", layers=1, runs=tuple(synthetic.MANY))
    text = write_report(root).read_text()
    page, names = Page(text), list(synthetic.MANY)
    assert "<h1>14 runs against their base</h1>" in text and "<title>14 runs against" in text
    assert len(page.all("details", **{"class": "words print"})) == 14
    assert "Names of the runs as figures shorten them" in text
    for plot in page.all("div", role="img"):
        assert len(plot["aria-label"]) < 700 and not any(name in plot["aria-label"] for name in names)
        legend = json.loads(re.search(rf'id="data-{plot["id"]}">(.*?)</script>', text)[1])["data"]
        assert not any(trace.get("name") in names for trace in legend)
    assert text.count(f'<th scope="col" class="run">{names[0]}</th>') == 1
    assert text.count('<table class="wide">') == 3
    assert "The first 12 of 14 runs that changed anything are shown." in text


@pytest.mark.usefixtures("plotly")
def test_headings_name_another_rule(pair, tmp_path) -> None:
    rule = ("--rule", "atol", "--threshold", "1e-3")
    assert offprin(*pair[2], "--out", tmp_path / "out", *rule, "--also", "bitwise") == 0
    text = write_report(tmp_path / "out").read_text()
    assert text.count(", rule atol(0.001)</h2>") == 4 and "<h3>Sparsity by layer, rule atol(0.001)</h3>" in text
    assert "<b>Changed, rule atol(0.001)</b>" in text and "that did not change under the rule atol(0.001)" in text
    assert "isibly changed" not in text and "bf16 value did not change" not in text


# ---- the command


def test_command(finished, tmp_path, capsys) -> None:
    assert main(["report", str(finished)]) == 0
    text = capsys.readouterr().out
    assert f"the report is {finished / 'report.html'}" in text and "bitwise, bf16" in text
    first = (finished / "report.html").read_bytes()
    assert main(["report", str(finished), "--out", str(tmp_path / "page.html"), "--figures"]) == 0
    assert (tmp_path / "page.html").read_bytes() == first
    assert (finished / "figures" / "overlap.pdf").exists() and "figures are in" in capsys.readouterr().out


def test_command_where_there_is_nothing(tmp_path, capsys) -> None:
    for directory, words in ((tmp_path / "none", "is no directory"), (tmp_path, "holds no analysis")):
        assert main(["report", str(directory)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("offprin: error: ") and words in message and message.count("\n") == 1


def test_command_without_plotly(finished, monkeypatch, capsys) -> None:
    without(monkeypatch, "plotly")
    assert main(["report", str(finished)]) == 2
    assert "pip install 'offprin-kernels[report]'" in capsys.readouterr().err
    assert not (finished / "report.html").exists()
    with pytest.raises(OutputError):
        write_report(finished)


def analyze(paths, out, *more) -> int:
    """The command as users give it."""
    return main(["analyze", *map(str, paths), "--out", str(out), "--quiet", *more])


def test_an_analysis_ends_with_its_page(pair, tmp_path, capsys) -> None:
    pytest.importorskip("plotly")
    out = tmp_path / "out"
    assert analyze(pair[2], out) == 0
    page = (out / "report.html").read_bytes()
    assert not (out / "figures").exists()
    (out / "report.html").unlink()
    assert main(["merge", str(out)]) == 0
    assert (out / "report.html").read_bytes() == page
    assert main(["merge", str(out), "--no-report"]) == 0
    assert capsys.readouterr().err == ""


def test_overwrite_removes_page_and_figures_of_before(pair, tmp_path) -> None:
    pytest.importorskip("plotly"), pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert analyze(pair[2], out, "--figures") == 0
    captions = json.loads((out / "figures" / "captions.json").read_text())
    drawn = {f"{key}.{kind}" for key in captions for kind in ("png", "pdf")}
    assert {path.name for path in (out / "figures").iterdir()} == {*drawn, "captions.json"}
    assert all(found["title"] and found["says"] for found in captions.values())
    mine = out / "figures" / "mine.png"
    mine.write_bytes(b"of another")
    assert analyze(pair[2], out, "--overwrite", "--no-report") == 0
    assert not (out / "report.html").exists()
    assert list((out / "figures").iterdir()) == [mine]
    mine.unlink()
    assert analyze(pair[2], out, "--overwrite", "--figures") == 0
    assert analyze(pair[2], out, "--overwrite", "--no-report") == 0
    assert not (out / "figures").exists()


@pytest.mark.parametrize("command", ["analyze", "merge"])
def test_a_page_that_cannot_be_made_costs_no_numbers(pair, tmp_path, monkeypatch, capsys, command) -> None:
    out = tmp_path / "out"
    assert analyze(pair[2], out, "--no-report") == 0
    (out / "report.html").mkdir()
    again = (lambda: analyze(pair[2], out)) if command == "analyze" else (lambda: main(["merge", str(out)]))
    assert again() == 0
    said = capsys.readouterr()
    assert "no report.html: " in said.err and f"offprin report {out}" in said.err
    assert "complete; results in" in said.out
    (out / "report.html").rmdir()
    without(monkeypatch, "plotly")
    assert again() == 0
    assert "pip install 'offprin-kernels[report]'" in capsys.readouterr().err


def test_figures_are_refused_before_the_work(pair, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    assert analyze(pair[2], out, "--figures", "--no-report") == 2
    without(monkeypatch, "matplotlib")
    assert analyze(pair[2], out, "--figures") == 2
    assert "pip install 'offprin-kernels[report]'" in capsys.readouterr().err
    assert not out.exists()


def test_a_place_that_cannot_be_written_to(finished, capsys) -> None:
    assert main(["report", str(finished), "--out", str(finished / "summary.json" / "page.html")]) == 2
    assert "the page was not written" in capsys.readouterr().err


# ---- in a browser

DRAWN = "[...document.querySelectorAll('.chart')].filter(chart => chart.querySelector(MARKS)).length".replace(
    "MARKS", "'.cartesianlayer :is(.trace path, .hm image)'"
)
IN_VIEW = """(async () => {
  const seen = [...document.querySelectorAll('.chart')].filter(plot => {
    const box = plot.getBoundingClientRect();
    return box.top < innerHeight && box.bottom > 0;
  });
  while (!seen.every(plot => plot.querySelector('svg.main-svg'))) await new Promise(done => setTimeout(done, 10));
  await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  return performance.now();
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = needed()
    with Browser(program, tmp_path_factory.mktemp("browser") / "profile") as found:
        found.resize(1440, 900)
        yield found


def opened(browser: Browser, page: Path, end: str = "") -> None:
    browser.events.clear()
    browser.open(page.as_uri() + end)


@pytest.mark.parametrize(("place", "figures"), [("", 0), ("#sparsity", 1)])
def test_opens_within_three_seconds(browser, large, place, figures) -> None:
    """From the start of navigation until everything in view is drawn; once before, so that the browser is warm."""
    page = large / "report.html"
    for _ in range(2):
        browser.open("about:blank")
        opened(browser, page, place)
        milliseconds = browser.evaluate(IN_VIEW)
    assert milliseconds < 3000 and browser.evaluate(DRAWN) >= figures
    assert not browser.problems() and browser.requests() == [page.as_uri()]


@pytest.mark.parametrize("which", ["large", "finished"])
def test_every_figure_is_drawn_without_errors_or_requests(browser, which, request) -> None:
    root = request.getfixturevalue(which)
    page = write_report(root)
    opened(browser, page, "?all")
    assert browser.evaluate(DRAWN) == browser.evaluate("document.querySelectorAll('.chart').length") >= 9
    assert browser.evaluate("document.querySelectorAll('.chart[role=img][aria-label]').length") >= 9
    assert not browser.problems() and browser.requests() == [page.as_uri() + "?all"]
    overflow = browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow == 0
    ARTIFACTS.mkdir(exist_ok=True)
    browser.screenshot(ARTIFACTS / f"report-{which}.png")
    browser.print_pdf(ARTIFACTS / f"report-{which}.pdf")
    assert (ARTIFACTS / f"report-{which}.pdf").stat().st_size > 20_000
    assert not browser.problems()


def test_figures_are_drawn_when_they_come_into_view(browser, large) -> None:
    opened(browser, large / "report.html")
    assert browser.evaluate(DRAWN) <= 2
    browser.evaluate("document.getElementById('energy').scrollIntoView({behavior: 'instant'})")
    drawn = "!!document.querySelector('#energy .chart svg.main-svg')"
    end = time.monotonic() + 10
    while not browser.evaluate(drawn):
        assert time.monotonic() < end
        time.sleep(0.05)
    browser.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.evaluate(DRAWN) == browser.evaluate("document.querySelectorAll('.chart').length")
    browser.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert not browser.problems()


def test_hovering_legends_and_the_table(browser, large) -> None:
    opened(browser, large / "report.html", "?all")
    plot = "document.getElementById('sparsity-by-layer')"
    browser.evaluate(f"Plotly.Fx.hover({plot}, [{{curveNumber: 0, pointNumber: 3}}])")
    assert "dapo, layer 3" in browser.evaluate(f"{plot}.querySelector('.hoverlayer').textContent")
    strips = "document.getElementById('stripes-layer-0')"
    browser.evaluate(f"Plotly.Fx.hover({strips}, {{xval: 100, yval: 1}}, 'xy')")
    assert "grpo, around" in browser.evaluate(f"{strips}.querySelector('.hoverlayer').textContent")
    button = f"{plot}.closest('figure').querySelector('.legend button')"
    browser.evaluate(f"{button}.click()")
    assert browser.evaluate(f"{button}.getAttribute('aria-pressed')") == "false"
    assert browser.evaluate(f"{plot}.data[0].visible") is False

    def first() -> str:
        return browser.evaluate("document.querySelector('#matrices tbody tr').textContent")

    assert browser.evaluate("document.querySelectorAll('#matrices tbody tr').length") == 25
    browser.evaluate("document.querySelectorAll('#matrices th button')[5].click()")
    assert "grpo" in first()
    script = "(f => { f.value = 'sft layers.7. up_proj'; f.dispatchEvent(new Event('input')); })"
    browser.evaluate(f"{script}(document.getElementById('filter'))")
    assert "model.layers.7.mlp.up_proj" in first()
    assert browser.evaluate("document.getElementById('where').textContent") == "1 to 1 of 1"
    assert not browser.problems()
