"""Commands that show what a spiking network is like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fasfx.cli_parts import NO_TOKENIZER, Checkpoint, Data, Model, evaluation, load
from fasfx.errors import CalibrationError
from fasfx.terminal import energies, progress, quiet, show

FEW = 16  # shipped sentences that a report without --data is about: it simulates every spike
Strict = Annotated[bool, typer.Option("--strict", help="Fail if a site never fires, always fires or only copies.")]
Html = Annotated[Path, typer.Option("-o", "--out", help="The HTML file to write.")]


def energy(out: Checkpoint, data: Data = None, strict: Strict = False) -> None:
    """Count what the spiking network OUT costs on texts, by three countings side by side, layer by layer."""
    with quiet():
        import fasfx
        from fasfx.calibration import tokenizer_beside
        from fasfx.text_files import read_texts

        texts = read_texts(data) if data else None
        snn = fasfx.SpikingModel.from_pretrained(out)
        if tokenizer_beside(str(out)) is None:
            raise CalibrationError(f"{NO_TOKENIZER.format(out, 'texts')}, or call fasfx.energy(snn, batches)")
        found = fasfx.energy(snn, evaluation(snn, str(out), texts), strict=strict)
    energies(found)


def report(model: Model, out: Checkpoint, html: Html = Path("report.html"), data: Data = None) -> None:
    """Write all that is known of the spiking network OUT and its distance from MODEL to one HTML file."""
    with quiet():
        import fasfx
        from fasfx.calibration import sentences
        from fasfx.text_files import read_texts

        texts = read_texts(data) if data else None
        snn = fasfx.SpikingModel.from_pretrained(out)
        original = load(model)
        batches = evaluation(original, model, texts, FEW)
        with progress() as told:
            fasfx.report(original, snn, batches, html, texts=texts or sentences(), progress=told)
    show(f"report in {html}")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(energy)
    app.command()(report)
