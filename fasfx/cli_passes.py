"""`fasfx passes ...`: the pass tools. torch is imported inside the commands only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fasfx.errors import ConfigError
from fasfx.terminal import quiet, show, table

app = typer.Typer(no_args_is_help=True, help="The passes that turn a model into a spiking network, and their tools.")

SOURCE = "A model's folder, its id on the hub, or a program that `fasfx passes run --dump` wrote."
Source = Annotated[str, typer.Argument(metavar="MODEL", help=SOURCE)]
Other = Annotated[str | None, typer.Argument(metavar="[B]", help="Another one; without it the same.")]
Pipeline = Annotated[
    str | None, typer.Option("-p", help="Passes, such as 'normalise,observe{granularity=token}'; else all of fasfx's.")
]
To = Annotated[str | None, typer.Option("--to", help="The passes of B, where they are others.")]
Levels = Annotated[str | None, typer.Option(help="Stop A and B at these levels, such as RANGED,FOLDED.")]
Data = Annotated[Path | None, typer.Option(help="Texts to run on, .txt, .jsonl or .csv, else as `fasfx convert`.")]
After = Annotated[list[str] | None, typer.Option("--print-after", metavar="PASS", help="Print the program after it.")]
Diff = Annotated[bool, typer.Option("--print-diff", help="Print the lines that each pass changed.")]
Verify = Annotated[bool, typer.Option("--verify-each", help="Check on a batch that each pass keeps its promise.")]
Stop = Annotated[int | None, typer.Option("--stop-after", min=0, help="Run only so many passes.")]
Time = Annotated[bool, typer.Option("--time", help="Print the time and the nodes of each pass.")]
Dump = Annotated[Path | None, typer.Option(help="Folder for the program after each pass.")]
Metric = Annotated[str, typer.Option(help="promise, relative_l2, max, cosine.")]
Tolerance = Annotated[float | None, typer.Option(help="What the metric may be; else the metric's own.")]
Where = Annotated[str, typer.Argument(metavar="NODE|LAYER", help="Name of a node, or path of a module.")]
Folder = Annotated[Path, typer.Option("-o", "--out", help="Folder for the test and its graph.")]


@app.command("list")
def list_passes() -> None:
    """The passes in order, with what each takes and gives; then those of other packages."""
    from fasfx.capture import capture
    from fasfx.passes import PIPELINE
    from fasfx.tools.pipeline import installed

    pipeline: tuple[Any, ...] = PIPELINE
    rows = [("0", "capture", "a model -> CAPTURED", "exact", _summary(capture))]
    rows += [(str(number), one.name, *_promise(one)) for number, one in enumerate(pipeline, 1)]
    rows += [("", name, *_promise(one)) for name, one in installed().items()]
    table("", ("", "pass", "level", "numerics", "what it does"), rows)
    show("exact: float rounding only; ledger: every change has a line in the error ledger")


@app.command()
def run(
    model: Source,
    p: Pipeline = None,
    data: Data = None,
    print_after: After = None,
    print_diff: Diff = False,
    verify_each: Verify = False,
    stop_after: Stop = None,
    time: Time = False,
    dump: Dump = None,
) -> None:
    """Run passes on a model or a stored program and say how far the result is from the original.

    `--print-after all` prints every program. Exit code 2 if --verify-each finds a promise broken.
    """
    with quiet():
        from fasfx import tools
        from fasfx.difference import Difference, main_output
        from fasfx.program import facts
        from fasfx.tools.subjects import output

        given = _subject(model, p, data)
        program = tools.run(given, show, print_after or (), print_diff, verify_each, stop_after, dump)
        difference = Difference()
        difference.add(*(main_output(output(one, given.inputs)) for one in (given.program, program)))
    if time:
        history = facts(program).history
        rows = [(ran.pass_name, ran.level, f"{ran.seconds:.2f}", ran.nodes) for ran in history]
        table("", ("pass", "level", "seconds", "nodes"), rows)
    known = facts(program)
    show(f"{known.level}: {len(program.graph.nodes)} nodes, relative L2 error {difference.relative_l2:.3%}")


@app.command()
def diff(
    model: Source, other: Other = None, p: Pipeline = None, to: To = None, levels: Levels = None, data: Data = None
) -> None:
    """Two programs node by node: declared bound, measured error, firing rate, and how far they are apart.

    Stored programs are compared as they are, unless -p or --levels says which passes are to run on them.
    """
    with quiet():
        from fasfx import tools
        from fasfx.tools.subjects import program_folder

        sides = [_subject(model, p, data), _subject(other or model, to or p, data)]
        if not (p or to or levels):
            for one, source in zip(sides, (model, other or model), strict=True):
                one.names = [] if program_folder(Path(source)) else one.names
        if levels:
            wanted = levels.replace(" ", "").split(",")
            if len(wanted) != 2:
                raise ConfigError(f"--levels {levels!r}: give two, such as RANGED,FOLDED")
            sides = [one.until(level) for one, level in zip(sides, wanted, strict=True)]
        found = tools.diff(*sides)
    found = found.drop(columns="module").dropna(axis=1, how="all")
    table("", found.columns, ([_cell(value) for value in row] for row in found.itertuples(index=False)))


@app.command()
def bisect(
    model: Source, p: Pipeline = None, metric: Metric = "promise", tolerance: Tolerance = None, data: Data = None
) -> None:
    """The first pass, rule and node after which a metric is above a tolerance.

    Exit code 0 if nothing is, 1 if something is found, 2 for an error.
    """
    with quiet():
        from fasfx import tools

        found = tools.bisect(_subject(model, p, data), metric, tolerance)
    show("nothing found" if found is None else str(found))
    raise typer.Exit(0 if found is None else 1)


@app.command()
def explain(model: Source, where: Where, p: Pipeline = None, data: Data = None) -> None:
    """Which rules tried a node, or those of a layer, why each declined, and the pattern that nearly matched."""
    with quiet():
        from fasfx import tools

        found = tools.explain(_subject(model, p, data), where)
    show("\n".join(map(str, found)) or "every operator in it is free")


@app.command()
def reduce(model: Source, out: Folder, p: Pipeline = None, data: Data = None) -> None:
    """The smallest part of the network on which a pass still breaks its promise, written as a test.

    Exit codes as bisect's.
    """
    with quiet():
        from fasfx import tools

        found = tools.reduce(_subject(model, p, data))
        test = None if found is None else found.write(out)
    if found is None:
        show("nothing found")
        return
    show(f"{found.culprit}\n\n{found.text}\n{len(found.operators)} operators; the test is {test}")
    raise typer.Exit(1)


def _subject(source: str, passes: str | None, data: Path | None) -> Any:
    """What a tool works on, from the command line's words."""
    from fasfx.tools import subject
    from fasfx.tools.subjects import texts_for

    with_texts = None if data is None else texts_for(source, data)
    return subject(source, passes, with_texts)


def _promise(one: Any) -> tuple[str, str, str]:
    levels = f"{one.takes} -> {one.gives}" if hasattr(one, "gives") else "any"
    return levels, getattr(one, "numerics", "not said"), _summary(one)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3g}"
    return str(value)


def _summary(documented: Any) -> str:
    return next(iter(str(documented.__doc__ or "").strip().splitlines()), "")
