"""Stage I of FAS: the clipped program as a module that trains like the model it came from.

Source: FAS, arXiv 2502.04405, stage I; QCFS and its gradient: Bu et al., ICLR 2022; thresholds: LSQ, 1902.08153.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fasfx.alignment import Seen, seen_by
from fasfx.batch_norms import fold_batch_norms
from fasfx.capture import labels_of, takes_any
from fasfx.config import SpikeConfig
from fasfx.copying import Programmed
from fasfx.devices import device_of, follow, require_dtypes
from fasfx.errors import ConfigError, InputError
from fasfx.inputs import bind, input_names
from fasfx.layers import Layers
from fasfx.learnable import LOG_SCALE, as_stored, learn_thresholds, learned_thresholds
from fasfx.objective import Objective, loss_of, teacher_program, terms, with_loss
from fasfx.passes import Clip
from fasfx.program import arg, copy_program, facts, set_attribute, set_dropout
from fasfx.ranging import Progress, calibrate
from fasfx.runner import Runner, tidy
from fasfx.through_time import ThroughTime, step_graph


def prepare(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    config: SpikeConfig | None = None,
    objective: Objective | None = None,
    progress: Progress | None = None,
    through_time: bool = False,
) -> ClippedModel:
    """The network of stage I: every site holds its code's closed form (QCFS for the rate code) or ticks, trainable.

    model, calibration, progress: as in fasfx.convert; labels in calibration batches are ignored. The model is not
                 modified: what trains is a copy, under the original parameter names.
    config:      `timesteps` is the T (for the rate code the levels L) that training sees.
    objective:   what training minimises; None: the model's own loss.
    through_time: train what a synchronous network computes in its T ticks instead, by surrogate gradients
                 (fasfx.through_time). A forward runs the network T times, and what is learned is for this T.
    With nonlinear="spiking" functions are exact while it trains, and become neuron groups at conversion.
    Train it with transformers.Trainer or a loop of your own, then call fasfx.convert on it. More than one GPU or
    machine: `accelerate launch`, one process for each.
    Raises what fasfx.convert raises; ConfigError for `through_time` of a sequential network.
    """
    config, trained = config or SpikeConfig(), copy.deepcopy(model)
    if through_time:
        require_ticks(config)
    ranged = calibrate(trained, calibration, config, progress, training=True)
    return ClippedModel(ranged, trained, objective, through_time)


def require_ticks(config: SpikeConfig) -> None:
    """Raise ConfigError for a network without ticks to train through."""
    if config.schedule != "synchronous":
        raise ConfigError(
            "through_time: a sequential network computes its closed form, which is what trains without it; "
            'set schedule="synchronous"'
        )


class ClippedModel(Programmed):
    """A program at CLIPPED that trains. Made by fasfx.prepare.

    Parameters have the names of the original's; thresholds are `theta_*` times exp of a learned `*_log_scale`, so
    that they stay positive. Calling it gives the original's output type, with a loss where labels are given.
    """

    instead = "save its state_dict(), for a model prepared alike, or what fasfx.convert makes of it (save_pretrained)"

    def __init__(
        self,
        ranged: GraphModule,
        original: nn.Module,
        objective: Objective | None = None,
        through_time: bool = False,
    ) -> None:
        super().__init__()
        if through_time:
            learning = step_graph(ranged, _learn)
        else:
            learning = Runner([Clip()]).run(ranged)
            _learn(learning)
        self._through = ThroughTime(learning) if through_time else None
        self._programs = (ranged, learning)  # in a tuple: not submodules
        self._own_tensors()
        self._layers: Layers | None = None
        self._recompute = False
        self.config = getattr(original, "config", None)
        self._loss: Callable[..., Tensor] | None = loss_of(original)
        self._labels = labels_of(original)
        self._takes_any, self.loss_type = takes_any(original), getattr(original, "loss_type", None)
        self.__class__ = _like(original, type(self), [*input_names(ranged), *self._labels])
        self.objective = objective or Objective()
        self.train(original.training)

    def _own_tensors(self) -> None:
        """One set of dicts for both: the program's tensors are this module's own, names and all."""
        clipped = self._programs[1]
        self._parameters, self._buffers, self._modules = clipped._parameters, clipped._buffers, clipped._modules

    # --- running -----------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the original's forward, computed from clipped values, with `loss` where labels are given.

        In train mode with a teacher or a weight on spikes, `loss` is the whole objective.
        Raises InputError naming a missing, unknown or ill-typed input, and for labels of a model without a loss;
        ConfigError for activation checkpointing where it cannot be (activation_checkpointing_enable).
        """
        items = kwargs.pop("num_items_in_batch", None)
        targets = {name: v for name in self._labels if (v := kwargs.get(name)) is not None}
        inputs = self.inputs(kwargs, *args)
        if not (self.training and self._has_terms):
            output = self._run(inputs)
            return with_loss(output, self._task_loss(output, targets, items)) if targets else output
        if self._recompute and self._through is None:
            raise ConfigError("activation checkpointing does not go with a teacher or a weight on spikes: turn one off")
        seen = self._seen(inputs, spikes=self.objective.spikes > 0)
        loss = self.objective.task * self._task_loss(seen.output, targets, items) if targets else torch.zeros(())
        return with_loss(seen.output, loss + terms(self.objective, self._teacher, seen, inputs))

    def inputs(self, batch: Mapping[str, Any], *args: Any) -> dict[str, Tensor]:
        """What the program takes of a batch, in its order: no labels, no constants. Raises InputError."""
        return bind(self._programs[0], args, {n: v for n, v in batch.items() if n not in self._labels})

    def _seen(self, inputs: dict[str, Tensor], spikes: bool = False) -> Seen:
        """What every site transmits, and the output."""
        if self._through is None:
            return seen_by(self._programs[1], inputs.values(), spikes)
        if self._recompute and not self._through.keeps(spikes):
            raise ConfigError("activation checkpointing keeps one tick, and this network needs no other: turn it off")
        return self._through.run([*inputs.values()], spikes, self._recompute)

    def _run(self, inputs: dict[str, Tensor]) -> Any:
        if self._through is not None:
            return self._seen(inputs).output
        if self._recompute and torch.is_grad_enabled():
            self._layers = self._layers or Layers(self._programs[1])
            return self._layers(inputs)
        return self._programs[1](**inputs)

    def _task_loss(self, output: Any, targets: dict[str, Tensor], items: Any) -> Tensor:
        if self._loss is None:
            raise InputError(
                f"{', '.join(targets)} given, but the loss of this model is none of transformers' own: "
                "leave them out and compute it from the output"
            )
        assert self.config is not None
        words = getattr(self.config.get_text_config(), "vocab_size", None)
        given = {"config": self.config, "vocab_size": words, "pooled_logits": output.get("logits")} | dict(output)
        counted = {} if items is None else {"num_items_in_batch": items}
        return self._loss(**given, **targets, **counted)

    # --- training ----------------------------------------------------------------------------------------

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss takes the number of labels of all accumulated batches, as transformers.Trainer asks.

        The objective's other terms are means over a batch: with them the Trainer divides by the number of batches.
        """
        return self._takes_any and not self._has_terms

    @property
    def _has_terms(self) -> bool:
        return self._teacher is not None or self.objective.spikes > 0

    @property
    def _teacher(self) -> GraphModule | None:
        return self._teachers[0] if self._teachers else None

    @property
    def objective(self) -> Objective:
        """What training minimises. Setting one with a teacher of another kind raises ConfigError."""
        return self._objective

    @objective.setter
    def objective(self, aim: Objective) -> None:
        # In a tuple: not a submodule, whose weights would be saved with ours.
        ranged, teacher = self._programs[0], aim.teacher
        self._teachers = () if teacher is None else (teacher_program(ranged, teacher, self.config),)
        self._objective = aim
        self.train(self.training)

    def train(self, mode: bool = True) -> ClippedModel:
        """Dropout on or off, as in the original; off with a teacher, whose values it would hide (decision 10)."""
        super().train(mode)
        set_dropout(self._programs[1], mode and self._teacher is None)
        self._layers = None
        return self

    def parameter_groups(self, lr: float, threshold_lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for a torch optimizer: weights, weights that do not decay (biases, norms), thresholds.

        Thresholds learn their logarithm: `threshold_lr` is a relative step (0.01 is one percent with Adam).
        """
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        thresholds = [p for name, p in trained if name.endswith(LOG_SCALE)]
        weights = [p for name, p in trained if not name.endswith(LOG_SCALE)]
        return [
            {"params": [p for p in weights if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in weights if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
            {"params": thresholds, "lr": threshold_lr, "weight_decay": 0.0},
        ]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Keep only what goes from layer to layer for the gradient; not together with a teacher or a weight on spikes.

        Of a network that learns through time: keep one tick. Not of the multi code without a weight on spikes, which
        keeps no other (fasfx.through_time).
        Raises ConfigError for the options of transformers that are not implemented here.
        """
        if activation_checkpointing_kwargs or every_n_layers != 1 or offload:
            raise ConfigError("activation checkpointing of a clipped model takes no options: every layer is recomputed")
        self._recompute = True

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self._recompute = False

    def diagnose(self, *args: Any, **kwargs: Any) -> list[str]:
        """What does not learn on this batch, by name: parameters without a gradient, sites that transmit nothing.

        The batch needs labels, or the objective a teacher: else InputError. Gradients and modes are as they were again
        afterwards.
        """
        if not set(kwargs) & set(self._labels) and self._teacher is None:
            raise InputError(f"nothing to learn from: the batch has no {' or '.join(self._labels) or 'labels'}")
        kept, was = {name: p.grad for name, p in self.named_parameters()}, self.training
        self.zero_grad()
        with torch.no_grad():
            values = self._seen(self.inputs(kwargs, *args)).values
        found = [f"site {site} transmits nothing" for site, value in values.items() if not bool(value.any())]
        self.train()
        self(*args, **kwargs).loss.backward()
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and (parameter.grad is None or not bool(parameter.grad.any())):
                found.append(f"the gradient of {name} is zero")
            parameter.grad = kept[name]
        self.train(was)
        return found

    # --- moving and copying ------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> ClippedModel:
        require_dtypes(self._programs[1], fn)
        self._layers = None  # it would keep the tensors that fn replaces
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for program in (self._programs[0], *self._teachers):  # no submodules
            program._apply(fn)
        for program in (*self._programs, *self._teachers):
            follow(program, device_of(self))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = super().__deepcopy__(memo)
        new._own_tensors()
        return new

    def _replicate_for_data_parallel(self) -> ClippedModel:
        raise ConfigError(
            "torch.nn.DataParallel cannot copy a captured network: start one process per GPU with `accelerate launch`, "
            "or make one GPU visible"
        )

    # --- leaving -----------------------------------------------------------------------------------------

    def ranged(self) -> GraphModule:
        """A program at RANGED with copies of the weights as they are now; thresholds are facts of its sites."""
        ranged, clipped = copy_program(self._programs[0]), self._programs[1]
        known = dict(clipped.named_parameters()) | dict(clipped.named_buffers())
        for name in [*dict(ranged.named_parameters()), *dict(ranged.named_buffers())]:
            if name in known:
                set_attribute(ranged, name, known[name].detach().clone())
        theta, of = learned_thresholds(clipped), facts(ranged)
        of.sites = {name: dataclasses.replace(site, theta=theta.get(name)) for name, site in of.sites.items()}
        of.trained, of.through_time, of.trainable = of.config.timesteps, self._through is not None, False
        _reattach(ranged)
        fold_batch_norms(ranged)
        tidy(ranged)
        return ranged


def _reattach(gm: GraphModule) -> None:
    """A detach is for training: what is behind it is read instead, as one site."""
    sites = facts(gm).sites
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        value = arg(node, 0)
        if (site := sites.pop(node.name, None)) is not None:
            sites.setdefault(value.name, dataclasses.replace(site, name=value.name))
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)


def _learn(gm: GraphModule) -> None:
    """Its thresholds become parameters."""
    learn_thresholds(gm, as_stored(gm))


def _like(original: nn.Module, base: type[nn.Module], names: list[str]) -> Any:
    """A subclass with the original's class name, whose forward tells the names it takes.

    transformers.Trainer reads from both: which columns to keep, what labels are, whether the loss shifts them.
    """

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    kinds = inspect.Parameter
    named = [kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=None) for name in names]
    forward.__signature__ = inspect.Signature([kinds("self", kinds.POSITIONAL_OR_KEYWORD), *named])  # type: ignore[attr-defined]
    return type(type(original).__name__, (base,), {"forward": forward, "__module__": base.__module__})
