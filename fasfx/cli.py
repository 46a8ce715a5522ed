"""The command line: one function per command. torch is imported inside the commands only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fasfx import cli_reports
from fasfx.cli_parts import NO_TOKENIZER, TEXTS, Checkpoint, Data, Model, evaluation, load
from fasfx.cli_passes import app as passes
from fasfx.errors import CalibrationError, CheckpointError, ConfigError, FasfxError
from fasfx.terminal import contributions, equivalence, kernels, progress, quiet, say, show, silent, tuning, working

if TYPE_CHECKING:
    from fasfx.config import SpikeConfig

MOST = 5  # sites and groups that `check` names
PRESETS = ("fas", "low_latency", "integer")


class _Group(TyperGroup):
    """Answers a FasfxError with its message and exit code 2; any other exception keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FasfxError as error:
            say("error", "red", str(error))
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn Hugging Face transformers into spiking neural networks.",
)
app.add_typer(passes, name="passes")
cli_reports.register(app)

Out = Annotated[Path, typer.Option("-o", "--out", help="Folder for the spiking network.")]
Calibration = Annotated[Path | None, typer.Option(help=f"Texts to calibrate on: {TEXTS}.")]
Timesteps = Annotated[int | None, typer.Option(help="T, spikes a neuron may send per value.")]
Preset = Annotated[str | None, typer.Option(help=f"Recipe: {', '.join(PRESETS)}.")]
Code = Annotated[str | None, typer.Option(help="Spike code: multi, radix, rate.")]
Schedule = Annotated[str | None, typer.Option(help="sequential, or synchronous: all layers tick together.")]
Population = Annotated[int | None, typer.Option(help="Neurons for every value: more spikes in a tick, fewer ticks.")]
Centred = Annotated[bool, typer.Option("--centre", help="Send layers how far a value is from its median.")]
Strict = Annotated[bool, typer.Option("--strict", help="Fail unless every multiply-accumulate is spike-driven.")]
Steps = Annotated[str, typer.Option(help="Values of T, separated by commas.")]
Plot = Annotated[Path | None, typer.Option(help="Also draw error against T to this file.")]
Tolerance = Annotated[float, typer.Option(help="Relative error whose latency is told.")]
Raster = Annotated[Path | None, typer.Option(help="Also draw the spikes of some neurons to this file.")]
Onnx = Annotated[Path, typer.Option(help="Folder for model.onnx and what belongs to it.")]
Ticks = Annotated[bool, typer.Option("--ticks", help="Watch the answer settle, tick by tick, instead.")]
Form = Annotated[str | None, typer.Option(help="loop or step (synchronous), integer or closed (int8 weights).")]
Opset = Annotated[int, typer.Option(help="ONNX operator set, 18 or newer.")]
Provider = Annotated[str | None, typer.Option("--for", help="Fail if a node has no kernel there: cuda.")]

Task = Annotated[str, typer.Option(help="classification (.jsonl or .csv with text and label) or language-modelling.")]
TrainData = Annotated[Path, typer.Option(help="What to train on.")]
Evaluation = Annotated[Path | None, typer.Option(help="What to measure on; without it the last tenth of the data.")]
Epochs = Annotated[float, typer.Option(min=0.001, help="How often the data is gone through.")]
Rate = Annotated[float, typer.Option(min=0.0, max=1.0, help="Learning rate of the weights.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a text or block.")]
Rows = Annotated[int, typer.Option(min=1, help="Texts or blocks of a batch.")]
ThroughTime = Annotated[
    bool, typer.Option("--through-time", help="Train the T ticks of the synchronous network, not its closed form.")
]
Distill = Annotated[bool, typer.Option("--distill", help="Also learn from MODEL's own logits and values.")]
Fewer = Annotated[float, typer.Option(min=0.0, help="Weight of the number of spikes in the loss.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the order of the data, dropout, and new weights.")]
Stages = Annotated[str, typer.Option(help="What to tune, in order.")]
TuneData = Annotated[Path, typer.Option(help=f"Texts to tune on, without labels: {TEXTS}.")]
TuneOut = Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the result; without it OUT itself.")]
Rounds = Annotated[int, typer.Option(min=0, help="At most so many epochs for each stage.")]


@app.command()
def demo(ticks: Ticks = False) -> None:
    """Convert all-MiniLM-L6-v2, watch its error fall as T grows, search with it in torch and ONNX Runtime."""
    with quiet():
        from fasfx.demo import run, watch

        if ticks:
            watch()
        else:
            run()


@app.command()
def convert(
    model: Model,
    out: Out,
    calibration: Calibration = None,
    timesteps: Timesteps = None,
    preset: Preset = None,
    code: Code = None,
    schedule: Schedule = None,
    population: Population = None,
    centre: Centred = False,
    strict: Strict = False,
) -> None:
    """Convert MODEL to a spiking network and save it, with its tokenizer, in a folder."""
    with quiet():
        import fasfx
        from fasfx.calibration import text_batches, tokenizer_beside
        from fasfx.folders import check_target, save
        from fasfx.text_files import read_texts

        config = _config(preset, timesteps, code, schedule, population, centre, strict)
        texts = read_texts(calibration) if calibration else None
        check_target(out)
        original, tokenizer = load(model), tokenizer_beside(model)
        if texts is not None and tokenizer is None:
            raise CalibrationError(NO_TOKENIZER.format(model, calibration))
        batches = text_batches(original, tokenizer, texts) if texts is not None else None
        with progress() as report:
            snn = fasfx.convert(original, batches, config, report)
        save(snn, tokenizer, out)
    show(f"{snn!r}\nsaved in {out}; next: fasfx check {model} {out}")


@app.command()
def finetune(
    model: Model,
    out: Out,
    task: Task,
    data: TrainData,
    evaluation: Evaluation = None,
    epochs: Epochs = 3,
    lr: Rate = 5e-5,
    length: Length = 128,
    batch: Rows = 16,
    distill: Distill = False,
    through_time: ThroughTime = False,
    spikes: Fewer = 0.0,
    seed: Seed = 0,
    timesteps: Timesteps = None,
    preset: Preset = None,
    code: Code = None,
    schedule: Schedule = None,
    population: Population = None,
    centre: Centred = False,
) -> None:
    """Stage I of FAS: train MODEL with the values that spikes will carry, then convert it.

    After a kill the same command goes on where it was.
    """
    with quiet():
        from fasfx.calibration import tokenizer_beside
        from fasfx.finetuning import TASKS, Recipe, Training
        from fasfx.finetuning import finetune as train
        from fasfx.folders import check_target, save
        from fasfx.resuming import forget

        if task not in TASKS:
            raise ConfigError(f"--task {task!r}: choose one of {', '.join(TASKS)}")
        config = _config(preset, timesteps, code, schedule, population, centre)
        check_target(out)
        tokenizer = tokenizer_beside(model)
        if tokenizer is None:
            raise CalibrationError(NO_TOKENIZER.format(model, data))
        other = None if evaluation is None else str(evaluation)
        training = Training(epochs, lr, batch, seed)
        recipe = Recipe(model, task, str(data), other, length, distill, through_time, spikes, training)
        kept = out.with_name(f"{out.name}.training")
        with progress() as report:
            found = train(recipe, config, tokenizer, kept, report)
        save(found.snn, tokenizer, out)
        forget(kept)
        for warning in found.warnings[:MOST]:
            say("warning", "yellow", warning)
    shares = found.score == "accuracy"
    trained, spiking = (f"{x:.2%}" if shares else f"{x:.3f}" for x in (found.trained, found.spiking))
    show(f"{found.snn!r}\n{found.score} on data not trained on: {trained} stage I, {spiking} spiking\nsaved in {out}")


@app.command()
def tune(
    out: Checkpoint,
    data: TuneData,
    result: TuneOut = None,
    stages: Stages = "layer,neuron",
    timesteps: Timesteps = None,
    spikes: Fewer = 0.0,
    epochs: Rounds = 5,
) -> None:
    """Stage II of FAS: tune thresholds and initial potentials of the synchronous network OUT.

    After a kill the same command goes on where it was.
    """
    with quiet():
        import fasfx
        from fasfx.calibration import text_batches, tokenizer_beside
        from fasfx.folders import check_target, save
        from fasfx.resuming import forget
        from fasfx.text_files import read_texts

        texts, target = read_texts(data), result or out
        snn = fasfx.SpikingModel.from_pretrained(out)
        if result is not None:
            check_target(result)
        if snn.schedule != "synchronous":
            say("note", "cyan", f"{out} was sequential; tuning is of the synchronous schedule, which the result has")
            snn.schedule = "synchronous"
        snn.timesteps = snn.timesteps if timesteps is None else timesteps
        tokenizer = tokenizer_beside(str(out))
        if tokenizer is None:
            raise CalibrationError(NO_TOKENIZER.format(out, data))
        batches = text_batches(snn, tokenizer, texts)
        kept = target.with_name(f"{target.name}.tuning")
        with progress() as report:
            tuned = fasfx.tune(snn, batches, _words(stages), spikes=spikes, epochs=epochs, folder=kept, progress=report)
        save(tuned, tokenizer, target)
        forget(kept)
    assert tuned.tuning is not None
    tuning(tuned.tuning, f"Error of every site on held-out texts, T = {tuned.timesteps}")
    show(f"saved in {target}")


@app.command()
def check(
    model: Model,
    out: Checkpoint,
    data: Data = None,
    timesteps: Steps = "1,2,4,8,16",
    schedule: Schedule = None,
    tolerance: Tolerance = 0.01,
    plot: Plot = None,
    raster: Raster = None,
) -> None:
    """Measure how far the spiking network OUT is from MODEL, for several T."""
    with quiet():
        import fasfx
        from fasfx.text_files import read_texts

        steps = _numbers(timesteps)
        texts = read_texts(data) if data else None
        snn = fasfx.SpikingModel.from_pretrained(out)
        snn.schedule = schedule or snn.schedule
        original = load(model)
        batches = evaluation(original, model, texts)
        with progress() as report:
            found = fasfx.check(original, snn, batches, timesteps=steps, progress=report)
        equivalence(found.table, f"{model} and its spiking network, {snn.spike_config.code} code, {snn.schedule}")
        show(_latency(found, tolerance))
        title = (
            f"First-order prediction at T = {snn.timesteps}: {found.predicted:.3%} from all sites and groups, most from"
        )
        contributions(found.contributions.head(MOST), title)
        if plot:
            _draw(found.plot, plot)
        if raster:
            trains = snn.spikes(**batches[0])
            _draw(lambda file: fasfx.runtime.raster(trains, file), raster)


@app.command()
def export(out: Checkpoint, onnx: Onnx, opset: Opset = 18, form: Form = None, provider: Provider = None) -> None:
    """Export the spiking network OUT to ONNX, with dynamic batch and length."""
    with quiet():
        import fasfx
        from fasfx.folders import check_target
        from fasfx.runtime.kernels import missing_kernels, require_provider

        if provider is not None:
            require_provider(provider)
        snn = fasfx.SpikingModel.from_pretrained(out)
        check_target(onnx)
        with working("exporting"), silent():
            snn.to_onnx(onnx, opset_version=opset, form=form)
    if provider is not None and len(missing := missing_kernels(onnx, provider)):
        kernels(missing, f"Nodes without a kernel on {provider}")
        raise ConfigError(
            f"{onnx} is written, but {len(missing)} of its nodes have no kernel on {provider}: choose --opset 18, or "
            "another --form"
        )
    show(f"ONNX model in {onnx}; run it with fasfx.runtime.OnnxModel")


def main() -> None:
    """Entry point of the `fasfx` command."""
    app()


# --- parts of commands -----------------------------------------------------------------------------------


def _config(
    preset: str | None,
    timesteps: int | None,
    code: str | None,
    schedule: str | None,
    population: int | None,
    centre: bool,
    strict: bool = False,
) -> SpikeConfig:
    """What the options say; one that is not given is left to the preset."""
    from fasfx.config import SpikeConfig

    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    options = {"timesteps": timesteps, "code": code, "schedule": schedule, "population": population}
    options |= {"centre": centre or None, "strict": strict or None}
    given = {name: value for name, value in options.items() if value is not None}
    return getattr(SpikeConfig, preset)(**given) if preset else SpikeConfig().replace(**given)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.replace(" ", "").split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--timesteps {text!r}: give whole numbers from 1 on, such as 1,2,4")
    return tuple(int(part) for part in parts)


def _words(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.replace(" ", "").split(",") if part)


def _latency(found: Any, tolerance: float) -> str:
    reached = found.latency(tolerance)
    if reached is None:
        return f"no T of these reaches an error of {tolerance:.2%}"
    steps, schedule = reached["timesteps"], found.config.schedule
    return f"{tolerance:.2%} is reached with T = {steps}: after {reached['ticks']} ticks ({schedule} schedule)"


def _draw(figure: Any, file: Path) -> None:
    try:
        figure(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot draw to {file}: {error}; give a .png file in a folder that exists") from error


if __name__ == "__main__":
    main()
