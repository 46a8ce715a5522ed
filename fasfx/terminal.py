"""What the command line shows: progress bars, tables, one line for a warning or an error."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas

    from fasfx.runtime.energy import EnergyReport

Report = Callable[[str, int, int | None], None]
LOUD = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "transformers")

console = Console()  # results; stdout
messages = Console(stderr=True)  # everything else


def say(kind: str, style: str, message: str) -> None:
    """One message on stderr: 'error: ...', 'warning: ...' or 'note: ...'. Brackets in it are no markup."""
    messages.print(Text.assemble((f"{kind}: ", f"bold {style}"), message), soft_wrap=True)


def show(text: str) -> None:
    """A result in words, on stdout, as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """A bar for each stage with the time left, on stderr, gone at the end; none without a terminal."""
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as bars:
        rows: dict[str, Any] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in rows:
                rows[stage] = bars.add_task(stage, total=total)
            bars.update(rows[stage], completed=done, total=total)

        yield report


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notices of torch and transformers; fasfx's own warnings become one line. Errors pass."""
    import torch  # noqa: F401  (sets the levels of its loggers when it is imported)
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in LOUD}
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module=r"fasfx(\.|$)")
        warnings.showwarning = lambda message, *_, **__: say("warning", "yellow", str(message))
        transformers_logging.disable_progress_bar()
        try:
            for name in LOUD:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what is printed inside, unless it fails: torch.onnx prints its stages."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except BaseException:
        sys.stderr.write(printed.getvalue())
        raise


def working(what: str) -> contextlib.AbstractContextManager[object]:
    """A spinner for work whose length cannot be told."""
    return messages.status(what) if messages.is_terminal else contextlib.nullcontext()


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], numbers: bool = False) -> None:
    """Print a table; `numbers` aligns the columns right."""
    console.print(_table(title, columns, rows, numbers))


@contextlib.contextmanager
def animation(seconds: float) -> Iterator[Callable[[str, Iterable[str], Iterable[Iterable[Any]]], None]]:
    """A table that changes in place, a pause after each change; without a terminal, one table after the other."""
    with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:

        def draw(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
            if live is None:
                table(title, columns, rows)
            else:
                live.update(_table(title, columns, rows), refresh=True)
                time.sleep(seconds)

        yield draw


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], numbers: bool = False) -> Table:
    shown = Table(title=title, title_justify="left")
    for column in columns:
        shown.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        shown.add_row(*(Text(str(cell)) for cell in row))
    return shown


def equivalence(figures: pandas.DataFrame, title: str) -> None:
    """Print fasfx.check's table of error against T."""
    rows = [
        (
            row.timesteps,
            f"{row.relative_l2:.3%}",
            f"{row.cosine:.6f}",
            f"{row.max:.3g}",
            f"{row.bound:.2g}",
            f"{row.spikes:.2f}",
        )
        for row in figures.itertuples()
    ]
    columns = ("T", "relative L2 error", "cosine", "largest error", "bound of one neuron", "spikes per value")
    table(title, columns, rows, numbers=True)
    show("bound of one neuron: the most it errs, as a share of its threshold; the network has no such bound")


def contributions(figures: pandas.DataFrame, title: str) -> None:
    """Print fasfx.check's sites and groups with what each would do to the output alone."""
    rows = [(row.name, row.module, f"{row.predicted:.3%}") for row in figures.itertuples(index=False)]
    table(title, ("site or group", "module", "error of the output"), rows)


def kernels(missing: pandas.DataFrame, title: str) -> None:
    """Print fasfx.runtime.missing_kernels's nodes, equal ones counted."""
    columns = ["operator", "version", "types", "reason"]
    counted = missing.value_counts(columns, dropna=False)
    table(title, ("nodes", *columns), ((count, *cells) for cells, count in counted.items()))


def tuning(figures: pandas.DataFrame, title: str) -> None:
    """Print SpikingModel.tuning: relative squared errors of sites before and after each stage, their mean last."""
    stages = [name for name in figures if name not in ("site", "module")]
    rows = [(row["site"], row["module"], *(f"{row[name]:.4%}" for name in stages)) for _, row in figures.iterrows()]
    mean = ("mean", "", *(f"{figures[name].mean():.4%}" for name in stages))
    table(
        title,
        ("site", "module", *("before" if name == "before" else f"after {name}" for name in stages)),
        [*rows, mean],
    )


def energies(found: EnergyReport) -> None:
    """Print fasfx.energy's countings, of every layer and of all together, and what is wrong with sites."""
    names = [f"{one}_{which}" for one in found.totals["counting"] for which in ("original", "spiking")]
    rows = [(row["module"], *(f"{row[name] / 1e6:.3f}" for name in names)) for _, row in found.layers.iterrows()]
    table("Energy of every layer, uJ for all texts together", ("module", *(n.replace("_", ", ") for n in names)), rows)
    totals = [
        (
            row.counting,
            f"{row.original_pj / 1e6:.3f}",
            f"{row.spiking_pj / 1e6:.3f}",
            f"{row.saved:.2%}",
            f"{row.not_spiking:.2%}",
        )
        for row in found.totals.itertuples()
    ]
    columns = ("counting", "original, uJ", "spiking, uJ", "saved", "of it not spiking")
    table(f"T = {found.config.timesteps}, {found.spikes:.2f} spikes per value", columns, totals)
    for row in found.totals.itertuples():
        show(f"{row.counting}: original {row.original_formula}; spiking {row.spiking_formula}. {row.source}")
    show(f"b = {found.bits}, the bits whose rounding error is that of one neuron")
    show(f"by the rule of FAS's headline, of products that spikes drive only: {found.headline:.2%} saved")
    for row in found.problems.itertuples():
        say("warning", "yellow", f"{row.site} in {row.module or 'the model'} {row.problem} on these texts")
