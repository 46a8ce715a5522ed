"""python -m fasfx.tools.bench BENCH: measure and print Markdown tables; exit 1 if a target is missed."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fasfx.errors import FasfxError
from fasfx.terminal import quiet
from fasfx.tools.bench.tables import Table, as_json, markdown, missed

# name: what it measures; the module of that name holds PARTS
BENCHES = {
    "fas": "stage I and II: accuracy, error, spikes and energy by T",
    "foundation": "fidelity, parity with ONNX Runtime, families, cost, conversion",
    "kernels": "nodes of every form of export that have no CUDA kernel",
    "robust": "the deployed network on random shapes, called very often, by two threads at once; a large file",
    "speed": "integer form in ONNX Runtime beside the original and ONNX Runtime's own int8: time, fidelity, size",
    "spiking": "neuron groups beside float functions: error, coverage, spikes, perplexity, cost",
    "tools": "planted faults named and reduced, graph texts parsed back and run on, time and size of the report",
    "ticks": "the synchronous schedule: error and spikes by tick, perplexity, cost of a tick",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every target is met, 1 if one is missed, 2 for an error that a user can meet."""
    parser = argparse.ArgumentParser(prog="python -m fasfx.tools.bench", description=__doc__)
    parser.add_argument("bench", choices=BENCHES, help="; ".join(f"{n}: {what}" for n, what in BENCHES.items()))
    parser.add_argument("--quick", action="store_true", help="a small run that finds what is broken; wider targets")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    given = parser.parse_args(arguments)
    parts = importlib.import_module(f"fasfx.tools.bench.{given.bench}").PARTS
    if unknown := sorted(set(given.only or ()) - set(parts)):
        parser.error(f"no part {', '.join(unknown)}: {given.bench} has {', '.join(parts)}")
    try:
        tables = run({name: parts[name] for name in given.only or parts}, given.quick)
    except FasfxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        given.json.write_text(json.dumps([as_json(table) for table in tables], indent=1), encoding="utf-8")
    return summary(tables)


def run(parts: Mapping[str, object], quick: bool) -> list[Table]:
    """Run parts one after the other, printing each table as soon as it is there."""
    tables: list[Table] = []
    with quiet():
        for name, part in parts.items():
            start = time.perf_counter()
            for table in part(quick):  # type: ignore[operator]
                print(f"\n{markdown(table)}", flush=True)
                tables.append(table)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return tables


def summary(tables: Sequence[Table]) -> int:
    """Print how many targets are met and which are not; the exit code."""
    held = sum(line.met is not None for table in tables for line in table.lines)
    failures = missed(tables)
    print(f"\n{held - len(failures)} of {held} targets met." + "".join(f"\n- missed: {name}" for name in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
