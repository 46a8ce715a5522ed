"""SpikingModel: a converted network with the calling convention of the one it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fasfx.config import SpikeConfig
from fasfx.coverage import coverage, require_full
from fasfx.errors import InputError
from fasfx.ledger import Ledger
from fasfx.passes import Clip, Fold, Lower, Substitute
from fasfx.passes.clip import thresholds
from fasfx.program import copy_program, facts, fake
from fasfx.runner import PassHook, Runner
from fasfx.runtime.spikes import SpikeRecorder, SpikeTrain

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class SpikingModel(nn.Module):
    """A spiking network. Made by fasfx.convert or SpikingModel.from_pretrained.

    It keeps the calibrated program (level RANGED, original weights, shared); the passes after it run again when
    `timesteps` changes, because margins and folded weights depend on T.
    """

    graph_module: GraphModule

    def __init__(
        self, ranged: GraphModule, config: PretrainedConfig | None = None, after: PassHook | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.ranged = ranged
        self._build(ranged, after)

    def _build(self, ranged: GraphModule, after: PassHook | None = None) -> None:
        lowered = Runner([Clip(), Substitute(), Fold(), Lower()], after=after).run(ranged)
        found = coverage(lowered)
        if facts(ranged).config.strict:
            require_full(found)
        self.ranged, self.graph_module, self.coverage = ranged, lowered, found
        _freeze(lowered)

    # --- running -----------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the original model's forward, computed from spikes. Any batch size and length.

        Raises InputError naming a missing, unknown or ill-typed input.
        """
        return self.graph_module(**self._inputs(args, kwargs))

    def spikes(self, *args: Any, **kwargs: Any) -> dict[str, SpikeTrain]:
        """Site name -> the spikes it sends for these inputs."""
        recorder = SpikeRecorder(self.graph_module, self._static_thresholds())
        with torch.no_grad():
            recorder.run(*self._inputs(args, kwargs).values())
        return recorder.trains

    def _static_thresholds(self) -> dict[str, Tensor]:
        dynamic = self.spike_config.resolved_granularity == "token"
        sites = facts(self.ranged).sites
        return {n: t for n, t in thresholds(self.ranged).items() if not dynamic or sites[n].fixed is not None}

    @property
    def input_names(self) -> list[str]:
        """Names of the tensors forward takes, in the order of positional arguments."""
        return [str(node.target) for node in self.graph_module.graph.find_nodes(op="placeholder")]

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        names, constants = self.input_names, facts(self.ranged).constants
        if len(args) > len(names):
            raise InputError(f"{len(args)} positional inputs: the model was captured with {', '.join(names)}")
        given = dict(zip(names, args, strict=False))
        if twice := sorted(set(given) & set(kwargs)):
            raise InputError(f"{', '.join(twice)} given twice: by position and by name")
        given |= kwargs
        for name, value in list(given.items()):
            if name in names:
                continue
            if name in constants and constants[name] == value or value is None:
                del given[name]
            elif name in constants:
                raise InputError(f"{name}={value!r}: the model was captured with {name}={constants[name]!r}")
            else:
                known = ", ".join(names)
                raise InputError(f"unknown input {name}: the model was captured with {known}; put it in calibration")
        if missing := [name for name in names if name not in given]:
            raise InputError(f"missing input {', '.join(missing)}: the model was captured with {', '.join(names)}")
        self._check(given)
        return {name: given[name] for name in names}

    def _check(self, given: Mapping[str, Any]) -> None:
        sizes: dict[str, tuple[str, int]] = {}  # symbol -> the input that set it
        for node in self.graph_module.graph.find_nodes(op="placeholder"):
            name, value, wanted = str(node.target), given[str(node.target)], fake(node)
            if not isinstance(value, Tensor):
                raise InputError(f"{name} is a {type(value).__name__}, not a tensor")
            if wanted is None:
                continue
            if value.dtype != wanted.dtype or value.dim() != wanted.dim():
                raise InputError(
                    f"{name} is {value.dtype} of rank {value.dim()}: "
                    f"the model takes {wanted.dtype} of rank {wanted.dim()}"
                )
            for dim, size in enumerate(wanted.shape):
                found = value.shape[dim]
                other, same = sizes.setdefault(str(size), (name, found)) if not isinstance(size, int) else ("", size)
                if found != same:
                    like = f"{other} has {same}" if other else f"the model takes {same} there"
                    raise InputError(f"{name} has size {found} in dim {dim}: {like}")

    # --- facts -------------------------------------------------------------------------------------------

    @property
    def spike_config(self) -> SpikeConfig:
        """The configuration in force."""
        return facts(self.ranged).config

    @property
    def timesteps(self) -> int:
        """T. Setting it rebuilds the network from the calibrated program; nothing is calibrated again."""
        return self.spike_config.timesteps

    @timesteps.setter
    def timesteps(self, steps: int) -> None:
        config = self.spike_config.replace(timesteps=steps)
        if steps != self.timesteps:
            ranged = copy_program(self.ranged)
            facts(ranged).config = config
            self._build(ranged)

    @property
    def ledger(self) -> Ledger:
        """What every inexact rewrite promised."""
        return facts(self.graph_module).ledger

    @property
    def latency_ticks(self) -> dict[str, int]:
        """Ticks until the answer: sequential (depth in neurons * T), and T, what a synchronous schedule would need."""
        return {"sequential": depth(self.graph_module) * self.timesteps, "synchronous": self.timesteps}

    def __repr__(self) -> str:
        c = self.spike_config
        sites = len(facts(self.ranged).sites)
        return f"SpikingModel({c.code}, T={c.timesteps}, {c.schedule}, {sites} sites, {self.coverage})"

    # --- leaving the process -----------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config, graph text and safetensors; nothing half written. Raises CheckpointError."""
        from fasfx.checkpoint import save

        save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SpikingModel:
        """Read what save_pretrained wrote; needs neither the original model nor pickle. Raises CheckpointError."""
        from fasfx.checkpoint import load

        return load(Path(folder))

    def to_onnx(self, folder: str | Path, opset_version: int = 18) -> None:
        """Export for ONNX Runtime with dynamic batch and length, in the layout of transformers' ExportedModel.

        Opset 18 is the newest whose control and comparison operators all have CUDA kernels in ONNX Runtime.
        """
        from fasfx.runtime.onnx import export

        export(self, Path(folder), opset_version)


def _freeze(gm: GraphModule) -> None:
    """No gradients, by parameters of its own that share their storage: the caller's stay trainable."""
    for module in gm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)


def depth(gm: GraphModule) -> int:
    """Most neurons on any path from input to output."""
    from fasfx import ops

    levels: dict[torch.fx.Node, int] = {}
    for node in gm.graph.nodes:
        before = max((levels[n] for n in node.all_input_nodes), default=0)
        levels[node] = before + (node.target is ops.count.op)
    return max(levels.values(), default=0)
