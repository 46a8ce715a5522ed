"""What the pass tools work on: a program, and batches to run it on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase

from fasfx.applying import Application, counting
from fasfx.calibration import first_and_all, sentences, text_batches, tokenizer_beside
from fasfx.capture import capture
from fasfx.checkpoint import GRAPH, SETTINGS, read, read_tensors, write
from fasfx.config import SpikeConfig
from fasfx.errors import CalibrationError, CheckpointError, ConfigError
from fasfx.folders import CONFIG, load_model
from fasfx.inputs import bind, input_names
from fasfx.program import copy_program, facts
from fasfx.runner import PassHook, Runner, tidy
from fasfx.runtime.ticks import StepGraph
from fasfx.text_files import read_texts
from fasfx.tools import pipeline
from fasfx.writing import written_beside

INPUTS = "inputs.safetensors"
ROWS = 2  # of the first batch, that are measured on
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """A pass that ran, the programs before and after it, and the rules that it applied, in order."""

    name: str
    one: PassBase
    before: GraphModule
    after: GraphModule
    applied: list[Application]


@dataclass
class Subject:
    """A program at any level, batches of its inputs, and the passes that are to run on it.

    Observe reads all batches; the first rows of the first one are measured on.
    """

    program: GraphModule
    batches: list[Batch]
    names: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> list[Tensor]:
        """What is measured on, in the program's order."""
        return [value[:ROWS] for value in self.batches[0].values()]

    def passes(self) -> list[PassBase]:
        """The passes, each made anew."""
        return [pipeline.make(name, self.batches) for name in self.names]

    def stages(self) -> Iterator[Stage]:
        """One pass after the other."""
        before = self.program
        for name, one in zip(self.names, self.passes(), strict=True):
            with counting() as counted:
                after = Runner([one]).run(before)
            yield Stage(name, one, before, after, counted.done)
            before = after

    def final(self, before: PassHook | None = None, after: PassHook | None = None) -> GraphModule:
        """The program after all passes; the hooks are the runner's."""
        return Runner(self.passes(), before, after).run(self.program)

    def until(self, level: str) -> Subject:
        """The same with the passes up to the last one after which the program is at a level.

        Raises ConfigError for a level that no pass gives.
        """
        reached = [facts(self.program).level, *(getattr(one, "gives", "") for one in self.passes())]
        if level not in reached:
            raise ConfigError(f"no pass gives {level!r}: the levels on the way are {', '.join(dict.fromkeys(reached))}")
        return Subject(self.program, self.batches, self.names[: len(reached) - 1 - reached[::-1].index(level)])


def subject(
    source: nn.Module | GraphModule | str | Path,
    passes: str | None = None,
    batches: Iterable[Any] | None = None,
    config: SpikeConfig | None = None,
) -> Subject:
    """A model, or a program that `fasfx passes run --dump` wrote, with its passes.

    source:  a model, its folder or hub id; or a folder with a program, or the graph text in it.
    passes:  a pipeline such as "normalise,observe{granularity=token}"; None: those of fasfx's that the program
             has not been through.
    batches: as fasfx.convert's calibration. None: for a model what fasfx.convert takes then, for a program the inputs
             stored beside it, or shipped sentences where a tokenizer is beside it.
    config:  of the run; fields in braces change it. None: the program's own, or SpikeConfig().
    Raises CheckpointError, CalibrationError, CaptureError, ConfigError.
    """
    names, options = pipeline.parse(passes) if passes else (None, {})
    found: nn.Module
    if not isinstance(source, str | Path):
        found = source
    elif folder := program_folder(Path(source)):
        found = program = read(folder)
        batches = _stored(program, folder) if batches is None else batches
    else:
        found, _ = load_model(str(source))
    if isinstance(found, GraphModule):
        program = copy_program(found)
        facts(program).config = (config or facts(program).config).replace(**options)
        held = [bind(program, (), dict(batch)) for batch in batches or ()]
        if not held:
            raise CalibrationError("a program needs batches of its inputs: pass batches=[...]")
    else:
        first, checked, _ = first_and_all(found, batches)
        program = capture(found, first, (config or SpikeConfig()).replace(**options))
        held = [bind(program, (), batch) for batch in checked]
    return Subject(program, held, pipeline.default(program) if names is None else names)


def texts_for(source: str, file: Path) -> list[Batch]:
    """A file of texts as batches for a model's or a program's folder. Raises DataError, CalibrationError."""
    texts, tokenizer = read_texts(file), tokenizer_beside(source)
    if tokenizer is None:
        raise CalibrationError(f"{source} has no tokenizer beside it to read {file} with: save the tokenizer there")
    folder = program_folder(Path(source))
    model = load_model(source)[0] if folder is None else _like(read(folder), folder)
    return text_batches(model, tokenizer, texts)


def program_folder(source: Path) -> Path | None:
    """The folder of a stored program, given itself or its graph text."""
    folder = source.parent if source.is_file() else source
    if (folder / SETTINGS).is_file() and (folder / GRAPH).is_file():
        return folder
    if source.is_file():
        raise CheckpointError(
            f"{source} is no graph text with {SETTINGS} and weights beside it, as `fasfx passes run --dump` writes it"
        )
    return None


def _stored(program: GraphModule, folder: Path) -> list[Batch]:
    """The batches beside a stored program."""
    if (folder / INPUTS).is_file():
        tensors = read_tensors(folder / INPUTS)
        numbers = sorted({int(name.partition(".")[0]) for name in tensors})
        return [{name: tensors[f"{number}.{name}"] for name in input_names(program)} for number in numbers]
    tokenizer = tokenizer_beside(str(folder))
    if tokenizer is None or not (folder / CONFIG).is_file():
        raise CalibrationError(f"{folder} has neither {INPUTS} nor a tokenizer: give texts or batches to run it on")
    return text_batches(_like(program, folder), tokenizer, sentences())


def _like(program: GraphModule, folder: Path) -> Any:
    """What stands for the model when batches are made for its program."""
    from transformers import AutoConfig

    return SimpleNamespace(input_names=input_names(program), config=AutoConfig.from_pretrained(folder))


def store(program: GraphModule, batches: Sequence[Batch], folder: Path) -> None:
    """Write a program with its batches, so that `subject` reads both. Raises CheckpointError."""
    from safetensors.torch import save_file

    named = {f"{number}.{name}": value for number, batch in enumerate(batches) for name, value in batch.items()}
    with written_beside(folder) as staging:
        write(program, staging)
        save_file({name: value.contiguous() for name, value in named.items()}, staging / INPUTS)


def apply_partly(one: PassBase, before: GraphModule, limit: int | None) -> GraphModule:
    """The program after the first `limit` applications of a pass's rules, or all: it runs, but may be at no level."""
    after = copy_program(before)
    with counting(limit):
        result = one(after)
    after = after if result is None else result.graph_module
    tidy(after)
    return after


@torch.no_grad()
def output(program: GraphModule, inputs: Sequence[Tensor]) -> Any:
    """What a program of any level gives; of a step graph, after the last of its ticks."""
    if facts(program).tick:
        return [*StepGraph(program).ticks(inputs, facts(program).config.timesteps)][-1]
    return program(**dict(zip(input_names(program), inputs, strict=True)))
