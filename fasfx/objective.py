"""What stage I minimises: the task's own loss, a teacher's logits and values, the number of spikes."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fasfx.alignment import Seen, disagreement, mean, relative_errors, seen_by
from fasfx.capture import is_hugging_face
from fasfx.difference import main_output, output_mask
from fasfx.errors import ConfigError, InputError
from fasfx.program import copy_program, set_attribute

# Fields of a configuration that change nothing about what an evaluated network computes.
NO_MATTER = (
    r"drop|label|dtype|^_|problem_type|architectures|version|cache|_token_id|init|return|output|task_specific|gradient"
)


@dataclass(frozen=True)
class Objective:
    """What stage I minimises while it trains: the sum of these terms, each times its weight.

    task:        the model's own loss for its labels.
    teacher:     the original model, or a fine-tuned one of the same kind; evaluated on every batch, never changed.
                 With one, dropout is off in train mode too: the teacher's values have none.
    logits:      KL divergence of the logits from the teacher's, at `temperature`; of an output without logits, such as
                 an encoder's, the relative squared error of its main tensor.
    hidden:      relative squared error of what sites transmit from the teacher's values, mean over the sites.
    spikes:      spikes per value, of all sites together as fasfx.energy counts them: asks for fewer.
    Without a teacher, logits and hidden do not count.
    """

    task: float = 1.0
    teacher: nn.Module | None = None
    logits: float = 1.0
    hidden: float = 1.0
    temperature: float = 1.0
    spikes: float = 0.0


def terms(aim: Objective, teacher: GraphModule | None, seen: Seen, inputs: dict[str, Tensor]) -> Tensor:
    """The objective's terms that the task's loss does not hold.

    teacher: its program (teacher_program), or None.
    """
    total = torch.zeros((), device=main_output(seen.output).device)
    if teacher is not None:
        with torch.no_grad():
            wanted = seen_by(teacher, inputs.values())
        total = total + aim.hidden * mean(relative_errors(seen.values, wanted.values))
        total = total + aim.logits * disagreement(seen.output, wanted.output, output_mask(inputs), aim.temperature)
    return total + aim.spikes * seen.spikes if aim.spikes else total


def teacher_program(ranged: GraphModule, model: nn.Module, config: Any) -> GraphModule:
    """The program with the weights of another model of the same kind, shared with it. Raises ConfigError for others."""
    program = copy_program(ranged)
    given = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, own in program.named_parameters():
        if name not in given or given[name].shape != own.shape:
            found = "it has none" if name not in given else f"its shape is {list(given[name].shape)}"
            raise ConfigError(
                f"the teacher {type(model).__name__} has no parameter {name} of shape {list(own.shape)}: {found}; "
                "pass the model that was prepared, or one of its architecture"
            )
    _require_alike(config, getattr(model, "config", None))
    for name in [*dict(program.named_parameters()), *(n for n, _ in program.named_buffers() if n in given)]:
        set_attribute(program, name, given[name].detach())
    return program


def _require_alike(own: Any, other: Any) -> None:
    """Raise ConfigError where a teacher's configuration makes another function of the same weights."""
    if own is None or other is None:
        return
    a, b = own.to_dict(), other.to_dict()
    differ = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k) and not re.search(NO_MATTER, k))
    if differ:
        found = ", ".join(f"{key}={b.get(key)!r} instead of {a.get(key)!r}" for key in differ[:3])
        raise ConfigError(f"the teacher is another network: {found}; pass the model that was prepared, or one like it")


def loss_of(model: Any) -> Any:
    """transformers' loss for the model's class, if that is what its forward computes; else None."""
    if not is_hugging_face(model):
        return None
    called = "self.loss_function" in inspect.getsource(inspect.unwrap(type(model).forward))
    # Encoder-decoders that compute their loss themselves do not shift labels, and transformers' loss does.
    shifted = getattr(model.config, "is_encoder_decoder", False)
    return model.loss_function if called or (model.loss_type and not shifted) else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """The same output type with a loss in front. Raises InputError for a type that has no place for one."""
    if "loss" not in getattr(output, "__dataclass_fields__", ()):
        raise InputError(
            f"{type(output).__name__} has no loss, so there is no place for an objective: leave teacher and spikes out "
            "and compute the loss from the output"
        )
    return type(output)(loss=loss, **output)
