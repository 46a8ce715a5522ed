"""SpikingJelly 2 on the same network, in the same process: what its recipes give, or what they say."""

from __future__ import annotations

import copy
import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fasfx.devices import device_of
from fasfx.errors import RuntimeUnavailableError, first_line
from fasfx.tools.bench.metrics import all_logits, relative_error
from fasfx.tools.bench.tables import Line, Table, plain
from fasfx.tools.bench.tasks import Task

STEPS = 8
RECIPES = ("TransformerTDEquivalentRecipe", "STATransformerRecipe")
EXAMPLE = "ann2snn.examples.bert_sst2_transformer_td_equivalent"


def _module(name: str) -> Any:
    """A module of SpikingJelly's. Raises RuntimeUnavailableError without it."""
    try:
        return importlib.import_module(f"spikingjelly.activation_based.{name}")
    except ImportError as error:
        raise RuntimeUnavailableError(
            "spikingjelly is not there: pip install --no-deps -r requirements-data.txt"
        ) from error


def converted(model: nn.Module, recipe: str) -> nn.Module:
    """A copy of the model by one of RECIPES. Raises what SpikingJelly raises; RuntimeUnavailableError without it."""
    ann2snn = _module("ann2snn")
    made = getattr(ann2snn, recipe)(time_steps=STEPS)
    found: nn.Module = ann2snn.Converter(recipe=made).convert(copy.deepcopy(model))
    return found


def refusal(error: Exception) -> str:
    """What it says, in a line."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"


class FromEmbeddings(nn.Module):
    """A BERT classifier, converted from what its embeddings give on, as in SpikingJelly's own example."""

    def __init__(self, model: Any, recipe: str) -> None:
        super().__init__()
        self._embeddings = model.bert.embeddings
        self._rest = converted(_module(EXAMPLE).BertSST2FromEmbeddings(model).eval(), recipe).eval()
        _module("functional").set_step_mode(self._rest, "m")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask [B, S] -> logits [B, classes], the sum over STEPS steps."""
        embedded = self._embeddings(input_ids=input_ids)
        hidden = (1 - attention_mask[:, None, None, :].to(embedded)) * torch.finfo(embedded.dtype).min
        _module("functional").reset_net(self._rest)
        steps = _module(EXAMPLE).make_first_real_then_zero_sequence(embedded, STEPS)
        logits: Tensor = self._rest(steps, hidden).sum(0)
        return logits


def beside(task: Task, original: nn.Module, snn: Any, rows: int | None) -> Table:
    """The fine-tuned original by every recipe, beside a spiking network: accuracy, error to the original, seconds."""
    batches = task.batches(task.test[:rows], device=device_of(original))
    labels = torch.cat([batch["labels"] for batch in batches]).cpu()
    wanted = all_logits(original, batches)

    def line(name: str, steps: float, model: Callable[..., Any]) -> Line:
        start = time.perf_counter()
        found = all_logits(model, batches)
        seconds, right = time.perf_counter() - start, float((found.argmax(-1) == labels).float().mean())
        return plain(name, [100 * right, relative_error(wanted, found), steps, seconds], "{:.4g}")

    lines, said = [line("fine-tuned original", math.nan, original), line("fasfx, synchronous", snn.timesteps, snn)], []
    for recipe in RECIPES:
        name = f"SpikingJelly 2, {recipe}"
        try:
            found = FromEmbeddings(original, recipe) if hasattr(original, "bert") else converted(original, recipe)
            lines.append(line(name, STEPS, found))
            spiking = sum(isinstance(module, _module("neuron").BaseNode) for module in found.modules())
            said.append(f"{name}: {spiking} of its modules are spiking neurons.")
        except RuntimeUnavailableError:
            raise
        except Exception as error:  # SpikingJelly's refusals have no type of their own; each is shown as it is
            lines.append(plain(name, [math.nan] * 4))
            said.append(f"{name} says: {refusal(error)}.")
    header = ("", "accuracy, %", "error of logits", "T", "wall time, s")
    note = "Error: relative L2, to the original. " + " ".join(said)
    return Table(f"{task.name}: SpikingJelly 2", header, lines, note)
