"""The figures of the foundation: fidelity, parity with ONNX Runtime, families, cost, conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fasfx.tools.bench import conversion, cost, families, fidelity, parity, webgpu
from fasfx.tools.bench.tables import Table

Part = Callable[[bool], Iterator[Table]]

# name: quick -> tables, in the order they are printed
PARTS: dict[str, Part] = {
    "multi": fidelity.multi,
    "static": fidelity.static,
    "perplexity": fidelity.perplexity,
    "parity": parity.parity,
    "families": families.families,
    "cost": cost.cost,
    "conversion": conversion.conversion,
    "webgpu": webgpu.webgpu,
}
