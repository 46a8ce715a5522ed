"""NORMAL -> NORMAL: what flows between layers is rotated, so that no channel stands out; nothing else changes.

A pre-norm network's residual stream x becomes x Q, with an orthogonal Q that goes into the weights that write to the
stream and into those that read its norms; a head that shares the embedding's weights goes on sharing them. Attention's
values are rotated head by head, into the layers before and after. Gated values, x = a b, take sums and differences of
their channels at run time: no layer before them could.
Only with weights="int8": even ranges leave int8 weights and one-byte counts the most of their precision.
"""

from __future__ import annotations

from torch.fx import GraphModule

from fasfx.applying import may_apply
from fasfx.heads import Values, find_values
from fasfx.program import Declined, decline, facts
from fasfx.rotating import find_gated, rotate_gated, rotate_stream, rotate_values
from fasfx.runner import Pass
from fasfx.streams import Stream, find_streams


class Rotate(Pass):
    """Rotate residual streams, attention values and gated values.

    Exact up to float rounding.   Source: QuaRot, Ashkboos et al., NeurIPS 2024; SliceGPT, ICLR 2024 (layer norms).
    Rules: rotate_stream, rotate_values, rotate_gated. A stream declines where something other than a norm, a sum or a
    linear layer reads or writes it (post-norm networks), with the node and the reason.
    """

    name, takes, gives = "rotate", "NORMAL", "NORMAL"

    def rewrite(self, gm: GraphModule) -> bool:
        """True if anything was rotated. Nothing while a network is trained: its weights keep their meaning."""
        config = facts(gm).config
        if config.weights != "int8" or facts(gm).trainable:
            return False
        streams, values = find_streams(gm), find_values(gm)
        gated = find_gated(gm) if config.granularity is None else []  # asked for by name, thresholds alone must do
        for one in (*streams, *values):
            if isinstance(one, Declined):
                decline(gm, one.pass_name, one.rule, one.node, one.reason)
        done = 0
        for stream in streams:
            if isinstance(stream, Stream) and may_apply(self.name, "rotate_stream", next(iter(stream.writers))):
                rotate_stream(gm, stream)
                done += 1
        for heads in values:
            if isinstance(heads, Values) and may_apply(self.name, "rotate_values", heads.maker):
                rotate_values(gm, heads)
                done += 1
        for value in gated:
            if may_apply(self.name, "rotate_gated", value):
                rotate_gated(gm, value)
                done += 1
        return done > 0
