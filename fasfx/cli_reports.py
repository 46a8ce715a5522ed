"""Commands that show what a spiking network is like."""

from __future__ import annotations

import typer

from fasfx.cli_parts import Checkpoint, Data, evaluation
from fasfx.terminal import energies, quiet


def energy(out: Checkpoint, data: Data = None, strict: bool = False) -> None:
    """Count what the spiking network OUT costs on texts, by three countings side by side, layer by layer."""
    with quiet():
        import fasfx
        from fasfx.text_files import read_texts

        texts = read_texts(data) if data else None
        snn = fasfx.SpikingModel.from_pretrained(out)
        found = fasfx.energy(snn, evaluation(snn, str(out), texts), strict=strict)
    energies(found)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(energy)
