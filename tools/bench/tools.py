"""Pass tools and report: time to name a planted fault, what reduce leaves of it, graph texts, the report."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

import fasfx
from fasfx import tools
from fasfx.calibration import sentences, text_batches
from fasfx.cli_reports import FEW
from fasfx.graph_text import text
from fasfx.tools.bench import cases, models, timing
from fasfx.tools.bench.browser import chromium
from fasfx.tools.bench.planted import FAULTS
from fasfx.tools.bench.tables import Table, below
from fasfx.tools.subjects import output

NAMED_WITHIN, NODES = 180.0, 5  # seconds of processor time; operators that reduce may leave
REPORTS = {"MiniLM-L6": (cases.minilm, 60.0), "SmolLM2-135M": (cases.smollm2, 300.0)}  # seconds
SIZE, OPEN_WITHIN = 3.0, 2.0  # MB, seconds
CONDITIONS = "one thread, processor time"
P = ParamSpec("P")
T = TypeVar("T")


def faults(quick: bool) -> Iterator[Table]:
    """Every planted fault in MiniLM (quick: in a tiny BERT, functions in float)."""
    batches = [models.tiny_inputs("bert")] if quick else cases.calibration("news", quick=True)
    model, title = (models.tiny("bert"), "a tiny BERT") if quick else (cases.minilm()[0], "MiniLM-L6")
    lines = []
    for name, fault in FAULTS.items():
        config = fault.config.replace(nonlinear="exact") if quick else fault.config
        given = tools.subject(model, batches=batches, config=config)
        with fault.plant():
            found, bisecting = _timed(tools.bisect, given)
            small, reducing = _timed(tools.reduce, given)
        left = len(small.operators) if small else math.inf
        figures = (bisecting, int(not fault.is_named_by(found)), left, reducing)
        what = f"< {NAMED_WITHIN:.0f} s, right, ≤ {NODES}"
        lines.append(below(name, figures, (NAMED_WITHIN, 1, NODES + 1, math.inf), what, "{:.0f}"))
    columns = ("fault", "bisect, s", "named wrongly", "operators left", "reduce, s")
    note = f"Named: pass, rule and node. `reduce` bisects too. {CONDITIONS.capitalize()}."
    yield Table(f"Planted faults in {title}", columns, lines, note)


def texts(quick: bool) -> Iterator[Table]:
    """MiniLM's program after every pass as a text: parsed back, and run on from there; not in a quick run."""
    if quick:
        return
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        given = tools.subject(cases.minilm()[0], batches=cases.calibration("news", quick=True))
        final = output(tools.run(given, dump=Path(folder)), given.inputs)
        for stage in sorted(Path(folder).iterdir(), key=lambda one: int(one.name.partition("-")[0])):
            again, written = tools.subject(stage / "graph.txt"), (stage / "graph.txt").read_text("utf-8")
            found = output(tools.run(again), given.inputs)
            differ = sum(not torch.equal(found[name], value) for name, value in final.items())
            figures = (len(again.program.graph.nodes), int(text(again.program) != written), differ)
            lines.append(below(stage.name, figures, (math.inf, 1, 1), "the same", "{:.0f}"))
    columns = ("after", "nodes", "texts that differ", "outputs that differ")
    note = "Default settings; outputs of the lowered program, to the bit."
    yield Table("MiniLM-L6 from its graph text", columns, lines, note)


def report(quick: bool) -> Iterator[Table]:
    """The report of a converted network as `fasfx report` writes it without --data (quick: of MiniLM only)."""
    lines = []
    for title, (load, seconds) in [*REPORTS.items()][: 1 if quick else None]:
        model, tokenizer = load()
        with cases.undisturbed():
            snn = fasfx.convert(model, text_batches(model, tokenizer, sentences()))
        batches = text_batches(model, tokenizer, sentences()[:FEW])
        with tempfile.TemporaryDirectory() as folder:
            path, took = _timed(fasfx.report, model, snn, batches, Path(folder) / "report.html")
            figures = (took, path.stat().st_size / 1e6, _opening(path))
        what = f"< {seconds:.0f} s, < {SIZE:.0f} MB, < {OPEN_WITHIN:.0f} s"
        lines.append(below(title, figures, (seconds, SIZE, OPEN_WITHIN), what, "{:.1f}"))
    note = f"Of {FEW} shipped sentences. {CONDITIONS.capitalize()}. Opens: a headless Chromium's load event."
    yield Table("Report", ("", "s", "MB", "opens in, s"), lines, note)


def _opening(path: Path) -> float:
    from selenium.webdriver.support.wait import WebDriverWait

    with chromium() as browser:
        browser.get(path.resolve().as_uri())
        entry = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
        return float(WebDriverWait(browser, 60).until(lambda one: one.execute_script(entry))) / 1000


def _timed(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    """What a call returns, and its processor time in seconds, on one thread."""
    with timing.one_thread():
        start = time.process_time()
        return call(*args, **kwargs), time.process_time() - start


PARTS = {"faults": faults, "texts": texts, "report": report}
