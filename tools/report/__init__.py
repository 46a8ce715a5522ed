"""fasfx.report: everything fasfx knows of a conversion, in one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from fasfx.calibration import as_batch
from fasfx.equivalence import Progress, check
from fasfx.errors import CheckpointError, RuntimeUnavailableError
from fasfx.local_errors import LocalErrors
from fasfx.model import SpikingModel
from fasfx.runtime.energy import energy
from fasfx.tools.report.charts import charts
from fasfx.tools.report.contents import contents
from fasfx.tools.report.senders import senders

TIMESTEPS = (1, 2, 3, 4, 6)
LIBRARY = "window.vegaEmbed = vegaEmbed"  # what the page needs of it
NEEDS = "fasfx.report draws with Vega-Lite, which vl-convert-python holds: pip install 'fasfx[report]'"


def report(
    model: nn.Module,
    snn: SpikingModel,
    batches: Iterable[Any],
    path: str | Path = "report.html",
    timesteps: Sequence[int] = TIMESTEPS,
    texts: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Measure a spiking network against its original and write what was found; returns the file's path.

    In it: error against T, every site and neuron group, spikes and thresholds of a site, energy, coverage,
    configuration and versions. Spikes and histograms are of the first batch.
    timesteps: of the error against T, the network's own beside them.
    texts: what the rows of the first batch say, to choose one by.
    Raises what fasfx.check raises, RuntimeUnavailableError without vl-convert-python, CheckpointError if the file
    cannot be written.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise RuntimeUnavailableError(NEEDS) from error
    target = Path(path)
    if not target.parent.is_dir():
        raise CheckpointError(f"cannot write {target}: give a file in a folder that exists")
    held = [as_batch(model, batch) for batch in batches]
    measured = check(model, snn, held, sorted({*timesteps, snn.timesteps}), progress)
    spent = energy(snn, held)
    exact = LocalErrors(snn)
    page = contents(model, snn, exact.graph, measured, spent)
    data = {**charts(measured, spent), "senders": senders(snn, exact, held[0], texts)}
    library = vl_convert.javascript_bundle(LIBRARY)
    html = _template().render(page=page, data=data, library=library, style=_read("page.css"), script=_read("page.js"))
    try:
        target.write_text(html, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror}; give a file in a folder that exists"
        ) from error
    return target


def _template() -> Any:
    import jinja2

    loader = jinja2.FunctionLoader(_read)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "page.html"
    )


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
