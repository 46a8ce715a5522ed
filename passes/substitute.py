"""CLIPPED -> SPIKING: clipped values become spiking neurons that send T spikes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fasfx import ops
from fasfx.ledger import Exact
from fasfx.rewrite import rewrite
from fasfx.runner import Pass


@rewrite(
    into=lambda x, theta, code, steps, levels, signed: ops.fire.op(x, theta, code, steps, levels, signed),
    error=Exact("constant input: the neuron's spikes sum to the closed form"),
    when=lambda code: code in ops.CODES or f"no neuron is known for code {code!r}",
)
def qcfs_to_fire(x: Tensor, theta: Tensor, code: str, steps: int, levels: int, signed: bool) -> Any:
    """A clipped value is the spike count of a neuron with threshold theta, initial potential theta / 2.

    Shape:  x any, theta broadcastable to x; result like x.   Unit: that of x.
    Error:  none for constant input; what clipping cost is in the ledger already.
    Source: Bu et al., ICLR 2022, eq. 9 (rate); the code's row in fasfx.ops.codes.
    """
    return ops.qcfs.op(x, theta, code, steps, levels, signed)


class Substitute(Pass):
    """Every qcfs becomes a neuron of the same code."""

    name, takes, gives = "substitute", "CLIPPED", "SPIKING"
    rules = (qcfs_to_fire,)
