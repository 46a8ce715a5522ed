"""How far a network is from its teacher while it learns: site by site, in its logits, and in the spikes it sends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F
from transformers.utils import ModelOutput

from fasfx import ops
from fasfx.difference import main_output
from fasfx.program import arg, facts

TINY = 1e-12


class Recorder(Interpreter):
    """Runs a program and keeps what every site transmits and, if asked, a smooth number of spikes.

    values: site -> what its neuron transmits: the clipped value, or in a step graph the running estimate; of a
            program without neurons (RANGED) the value itself.
    currents: site -> its neuron's input in a step graph.
    """

    def __init__(self, gm: GraphModule, spikes: bool = False) -> None:
        super().__init__(gm)
        self._nodes, self._spikes = transmitted(gm), spikes
        self.values: dict[str, Tensor] = {}
        self.currents: dict[str, Tensor] = {}
        self._sent, self._sizes = torch.zeros(()), dict[str, int]()

    def run_node(self, n: Node) -> Any:
        """Note what a site's node gives."""
        value = super().run_node(n)
        if n in self._nodes:
            self.values[self._nodes[n]] = value
        if n.target is ops.tick.op:
            self.currents.setdefault(str(n.meta["site"]), self.env[arg(n, 0)])
        if self._spikes and n.target in (ops.qcfs.op, ops.tick.op):
            self._count(n)
        return value

    def _count(self, node: Node) -> None:
        arguments: Any = self.map_nodes_to_values(node.args, node)
        if node.target is ops.qcfs.op:
            x, theta, code, steps, levels, signed = arguments[:6]
            row = ops.CODES[code]
            low, top = row.limits(steps, levels, signed)
            active = row.activity((x * (top / theta)).clamp(low, top), steps)
        else:
            u, sent, number, code, levels, signed = arguments
            active = ops.CODES[code].activity(ops.tick.ticking(code).reach(u, sent, number, levels, signed), 1)
        self._sent = self._sent.to(active.device) + active.sum(dtype=torch.promote_types(active.dtype, torch.float32))
        self._sizes[str(node.meta["site"])] = active.numel()  # of one of its neurons: as many values as it sends

    @property
    def per_value(self) -> Tensor:
        """Spikes per value of all sites, as fasfx.energy counts them, [], differentiable; 0 if they are not counted.

        A smooth number of spikes: fasfx.ops.codes.Code.activity.
        """
        return self._sent / max(1, sum(self._sizes.values()))


class Seen(NamedTuple):
    """What a network did with a batch.

    values: site -> what it transmits in the end.   output: in the model's own type.   spikes: per value, [].
    """

    values: dict[str, Tensor]
    output: Any
    spikes: Tensor


def seen_by(gm: GraphModule, inputs: Iterable[Tensor], spikes: bool = False) -> Seen:
    """What a program without ticks does with inputs. spikes: whether to count them; else they are 0."""
    recorder = Recorder(gm, spikes)
    output = recorder.run(*inputs)
    return Seen(recorder.values, output, recorder.per_value)


def transmitted(gm: GraphModule) -> dict[Node, str]:
    """The node that holds what a site transmits -> the site."""
    sends = {node: str(node.meta["sends"]) for node in gm.graph.nodes if "sends" in node.meta}
    clipped = {node: str(node.meta["site"]) for node in gm.graph.find_nodes(op="call_function", target=ops.qcfs.op)}
    plain = {node: node.name for node in gm.graph.nodes if node.name in facts(gm).sites}
    return sends or clipped or plain


def relative_errors(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Site -> squared error over the teacher's squared norm, differentiable; 1 is "nothing of it arrived"."""
    found = {}
    for site, wanted in teacher.items():
        wanted = wanted.detach()
        found[site] = (student[site] - wanted).square().sum() / (wanted.square().sum() + TINY)
    return found


def disagreement(student: Any, teacher: Any, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """How far two outputs are apart: `divergence` of logits, or of the main tensor where there are none.

    mask: 0 where a position does not count; ignored where its shape is not that of the positions.
    """
    of, to = main_output(student), main_output(teacher)
    if mask is not None and mask.shape == of.shape[:-1]:
        of, to = of[mask.bool()], to[mask.bool()]
    if isinstance(student, ModelOutput) and "logits" not in student:
        return relative_errors({"": of}, {"": to})[""]
    return divergence(of, to, temperature)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of logits [..., classes] in nats per position, times temperature^2 (Hinton et al., 2015).

    Of a single number (regression) the squared error over the teacher's square.
    """
    if student.shape[-1] == 1:
        return relative_errors({"": student}, {"": teacher})[""]
    of, to = (F.log_softmax(x.flatten(0, -2).float() / temperature, -1) for x in (student, teacher.detach()))
    return F.kl_div(of, to, reduction="batchmean", log_target=True) * temperature**2


def mean(values: Mapping[str, Tensor]) -> Tensor:
    """The mean over sites; 0 for none."""
    return torch.stack([*values.values()]).mean() if values else torch.zeros(())
