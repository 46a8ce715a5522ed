"""SpikingModel: a converted network with the calling convention of the one it came from."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fasfx.config import SpikeConfig
from fasfx.copying import Programmed
from fasfx.coverage import coverage, require_full
from fasfx.devices import device_of, follow
from fasfx.errors import ConfigError
from fasfx.inputs import bind, input_names
from fasfx.ledger import Ledger
from fasfx.passes import Clip, Fold, Lower, Substitute
from fasfx.passes.clip import thresholds
from fasfx.program import copy_program, facts, freeze
from fasfx.runner import PassHook, Runner
from fasfx.runtime.spikes import GroupCounter, SpikeCounter, SpikeRecorder, SpikeTrain, group_train
from fasfx.runtime.ticks import NetworkState, Settled, StepGraph, settle

if TYPE_CHECKING:
    import pandas
    from transformers import PretrainedConfig

FOUND_FOR_A_T = {  # fact that holds the T: what was found, and by what
    "tuned": ("thresholds and initial potentials were tuned", "fasfx.tune"),
    "lifted": ("lifts of exponentials were found", "fasfx.convert"),
}


class SpikingModel(Programmed):
    """A spiking network. Made by fasfx.convert or SpikingModel.from_pretrained.

    It keeps the calibrated program (level RANGED, original weights, shared); the passes after it run again when
    `timesteps` changes, because margins and folded weights depend on T.

    graph_module: the program at LOWERED.   coverage: what is spike-driven; `.table` has a row for every operator.
    """

    instead = "use save_pretrained(folder), and SpikingModel.from_pretrained(folder) where it is to run"
    graph_module: GraphModule

    def __init__(
        self, ranged: GraphModule, config: PretrainedConfig | None = None, after: PassHook | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.ranged = ranged
        self.recompute = False
        self._build(ranged, after)

    def _build(self, ranged: GraphModule, after: PassHook | None = None) -> None:
        lowered = Runner([Clip(), Substitute(), Fold(), Lower()], after=after).run(ranged)
        found = coverage(lowered)
        if facts(ranged).config.strict:
            require_full(found, facts(ranged).config.nonlinear == "exact")
        self.ranged, self.graph_module, self.coverage = ranged, lowered, found
        self._steps = StepGraph(lowered) if facts(ranged).config.schedule == "synchronous" else None
        freeze(lowered)

    # --- running -----------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the original model's forward, computed from spikes. Any batch size and length.

        Raises InputError naming a missing, unknown or ill-typed input.
        """
        inputs = self._inputs(args, kwargs)
        if self.schedule == "sequential":
            return self.graph_module(**inputs)
        ticks = self._step_graph.ticks([*inputs.values()], self.timesteps, self.recompute)
        return deque(ticks, maxlen=1).pop()

    def ticks(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """The running outputs of the synchronous schedule, T of them, the last of which is forward's.

        Each call has a state of its own. Gradients flow through the ticks; their memory grows with T, unless
        `gradient_checkpointing_enable()` was called. Raises InputError, ConfigError for a sequential network.
        """
        steps = self._step_graph
        return steps.ticks([*self._inputs(args, kwargs).values()], self.timesteps, self.recompute)

    def ticks_until(self, tolerance: float, /, *args: Any, **kwargs: Any) -> Settled:
        """Tick until the main output changes by at most `tolerance` (relative L2, all positions), at most T ticks.

        With the multi code the error falls about threefold per tick, so what is left is about half of the last change.
        """
        with torch.no_grad():
            return settle(self.ticks(*args, **kwargs), tolerance)

    def state(self, *args: Any, **kwargs: Any) -> NetworkState:
        """The state before the first tick for these inputs: its shapes and memory, and where `step` begins."""
        return self._step_graph.state([*self._inputs(args, kwargs).values()])

    def step(self, state: NetworkState, /, *args: Any, **kwargs: Any) -> tuple[Any, NetworkState]:
        """One tick by hand: the running output and the next state. The inputs may change from tick to tick.

        Raises InputError for a state of another network or other shapes.
        """
        inputs = [*self._inputs(args, kwargs).values()]
        return self._step_graph.step(inputs, self._step_graph.fitting(state, inputs), self.recompute)

    def gradient_checkpointing_enable(self) -> None:
        """Keep no activations of a tick for the gradient; compute them again when it is asked for."""
        self.recompute = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep the activations of every tick while gradients are enabled."""
        self.recompute = False

    @property
    def _step_graph(self) -> StepGraph:
        if self._steps is None:
            raise ConfigError('a sequential network has no ticks: set model.schedule = "synchronous"')
        return self._steps

    def spikes(self, *args: Any, **kwargs: Any) -> dict[str, SpikeTrain]:
        """Site name -> the spikes it sends for these inputs."""
        recorder = SpikeRecorder(self.graph_module, self._static_thresholds())
        self._record(recorder, self._inputs(args, kwargs))
        return recorder.trains

    def count_spikes(self, *args: Any, **kwargs: Any) -> pandas.DataFrame:
        """Spikes per value: a row for every site, a column for every time step or tick from 1 on, and `values`.

        Where two neurons send a value, those of both count.
        """
        import pandas

        counter = SpikeCounter(self.graph_module, self._static_thresholds())
        self._record(counter, self._inputs(args, kwargs))
        rows = {site: (found / counter.values[site]).tolist() for site, found in counter.counts.items()}
        frame = pandas.DataFrame.from_dict(rows, orient="index", columns=range(1, self.timesteps + 1))
        return frame.assign(values=counter.values)

    def group_spikes(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Neuron group -> spikes that all its neurons together send for one value, over all time steps or ticks.

        Under the synchronous schedule a group settles within a tick, and sends anew in the next.
        """
        counter = GroupCounter(self.graph_module)
        self._record(counter, self._inputs(args, kwargs))
        return counter.spikes

    def group_train(self, group: str, /, *args: Any, **kwargs: Any) -> Tensor:
        """The events of every neuron of one group, simulated step by step: int8 [T, ..., K], as in SpikeTrain.

        For constant input, whatever the schedule. `snn.ledger` and `fasfx.check` name the groups.
        Memory: T * K bytes for every value. Raises InputError for a group the network has not.
        """
        with torch.no_grad():
            return group_train(self, group, [*self._inputs(args, kwargs).values()])

    def _record(self, recorder: SpikeRecorder | GroupCounter, given: Mapping[str, Tensor]) -> None:
        inputs = [*given.values()]
        with torch.no_grad():
            if self.schedule == "sequential":
                recorder.run(*inputs)
                return
            sent = [*self._step_graph.state(inputs).sent.values()]
            for tick in range(1, self.timesteps + 1):
                _, sent = recorder.run(*inputs, torch.tensor(tick, device=inputs[0].device), *sent)

    def _static_thresholds(self) -> dict[str, Tensor]:
        sites = facts(self.ranged).sites
        return {n: t for n, t in thresholds(self.ranged).items() if not sites[n].dynamic}

    @property
    def input_names(self) -> list[str]:
        """Names of the tensors forward takes, in the order of positional arguments."""
        return input_names(self.ranged)

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        return bind(self.ranged, args, kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> SpikingModel:
        """What `to` and the like call. The caller's model stays as it is; what two programs share stays one."""
        freeze(self.ranged)
        made: dict[Any, Tensor] = {}

        def once(value: Tensor) -> Tensor:
            key = value.data_ptr() or id(value), value.shape, value.stride(), value.dtype
            if key not in made:
                made[key] = fn(value)
            return made[key]

        super()._apply(once, recurse)  # type: ignore[no-untyped-call]
        for program in (self.ranged, self.graph_module):
            follow(program, device_of(self))
        return self

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
        self._set(timesteps=steps)

    @property
    def schedule(self) -> str:
        """ "sequential" or "synchronous". Setting it rebuilds the network; nothing is calibrated again."""
        return self.spike_config.schedule

    @schedule.setter
    def schedule(self, schedule: str) -> None:
        self._set(schedule=schedule)

    def _set(self, **changes: Any) -> None:
        config = self.spike_config.replace(**changes)
        if config != self.spike_config:
            for fact, (what, finder) in FOUND_FOR_A_T.items():
                steps = getattr(facts(self.ranged), fact)
                if steps is not None and steps != changes.get("timesteps", steps):
                    now = f"{finder} at T = {changes['timesteps']} finds others"
                    warnings.warn(f"{what} for T = {steps} and stay as they are; {now}", stacklevel=4)
            ranged = copy_program(self.ranged)
            facts(ranged).config = config
            self._build(ranged)

    @property
    def ledger(self) -> Ledger:
        """What every inexact rewrite promised."""
        return facts(self.graph_module).ledger

    @property
    def tuning(self) -> pandas.DataFrame | None:
        """What fasfx.tune did: every site's relative squared error before and after each stage; None if not tuned."""
        import pandas

        rows = facts(self.ranged).tuning
        return pandas.DataFrame(rows) if rows else None

    @property
    def latency_ticks(self) -> dict[str, int]:
        """Ticks until the answer under either schedule: depth in neurons * T sequentially, T synchronously."""
        return {"sequential": depth(self.graph_module) * self.timesteps, "synchronous": self.timesteps}

    def __repr__(self) -> str:
        c = self.spike_config
        sites = len(facts(self.ranged).sites)
        return f"SpikingModel({c.code}, T={c.timesteps}, {c.schedule}, {sites} sites, {self.coverage})"

    def _repr_html_(self) -> str:
        """For notebooks: what kind of network it is, and what is not spiking in it."""
        import pandas

        c, found = self.spike_config, self.coverage
        rows = {
            "code": f"{c.code}, T = {c.timesteps}, {c.schedule} schedule",
            "sites": len(facts(self.ranged).sites),
            "multiply-accumulates driven by spikes": f"{found.spike_driven_macs:.2%}",
            "operators driven by spikes": f"{found.spike_driven_operators:.2%}",
            "float operators": ", ".join(found.float_operators) or "none",
            "ticks until the answer": self.latency_ticks[c.schedule],
        }
        return str(pandas.Series(rows).to_frame(type(self).__name__).to_html())

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

    def to_onnx(self, folder: str | Path, opset_version: int = 18, form: str | None = None) -> None:
        """Export for ONNX Runtime with dynamic batch and length, in the layout of transformers' ExportedModel.

        Opset 18 is the newest whose control and comparison operators all have CUDA kernels in ONNX Runtime.
        form: with weights="int8" "integer" (the default), or "closed", the same counts in float, for runtimes without
        integer products (WebGPU). For a synchronous network "loop" (the default), all ticks in one call, T an input
        with the network's own as default; or "step", one tick with the states as inputs and outputs, for hosts that
        stream.
        """
        from fasfx.runtime.export import export

        export(self, Path(folder), opset_version, form)


def depth(gm: GraphModule) -> int:
    """Most neurons on any path from input to output."""
    from fasfx import ops

    levels: dict[torch.fx.Node, int] = {}
    for node in gm.graph.nodes:
        before = max((levels[n] for n in node.all_input_nodes), default=0)
        levels[node] = before + (node.target in ops.CLOSED | {ops.tick.op})
    return max(levels.values(), default=0)
