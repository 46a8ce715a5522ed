"""`fasfx::tick`: one tick of a spiking neuron whose input may change from tick to tick."""

from typing import Any

import numpy as np
import onnx_ir
import torch
from onnxscript import INT64
from onnxscript import opset18 as onnx
from onnxscript.function_libs.torch_lib.registration import torch_op
from onnxscript.function_libs.torch_lib.tensor_typing import TReal
from torch import Tensor

from fasfx.ops.codes import CODES, Ticking
from fasfx.ops.library import LIBRARY, implement, onnx_number
from fasfx.ops.precision import needs_double

LIBRARY.define("tick(Tensor u, Tensor sent, Tensor number, str code, int levels, bool signed) -> Tensor")


def ticking(code: str) -> Ticking:
    """The row of a code that has one."""
    found = CODES[code].ticking
    assert found is not None, f"the {code} code has no tick"
    return found


def tick(u: Tensor, sent: Tensor, number: Tensor, code: str, levels: int, signed: bool) -> Tensor:
    """What a neuron has sent after tick `number`, given what it had sent before and its input now.

    Shape:  u any, sent broadcastable to u, number [] (int64, from 1 on); result like u, integers.
    Unit:   u = x * unit / theta with the code's unit; rate: spikes, multi: half counts.
    Error:  for constant input that of `fasfx::fire` after as many steps.
    Grad:   of what would be sent without rounding: all that is unsent, as far as one spike reaches; the rest goes
            to `sent`, and so back through time.
    Source: the code's row in fasfx.ops.codes; running estimates: docs/decisions/0008-synchronous.md.
    """
    row = ticking(code)
    number = number.to(u.dtype)
    after = row.tick(u.detach(), sent.detach(), number, levels, signed)
    if torch.is_grad_enabled() and (u.requires_grad or sent.requires_grad):
        smooth = sent + row.reach(u, sent, number, levels, signed)
        return smooth + (after - smooth).detach()
    return after


implement("tick", tick)
op = torch.ops.fasfx.tick.default


@torch_op("fasfx::tick", trace_only=True)
def onnx_tick(u: TReal, sent: TReal, number: INT64, code: str, levels: int, signed: bool) -> TReal:
    """The same float operations in ONNX; the nearest power of two by Veltkamp's splitting, as in `fasfx::count`."""
    kind = np.dtype(u.dtype.numpy())
    top = ticking(code).unit(levels)
    source: Any = u
    state: Any = sent
    wide = needs_double(np.finfo(kind).nmant, top)
    if wide:
        kind = np.dtype(np.float64)
        source, state = (onnx.Cast(x, to=onnx_ir.DataType.DOUBLE) for x in (source, state))
    low = -top if signed else 0
    after = _FORMS[code](source, state, onnx.CastLike(number, source), low, top, kind)
    target: Any = u
    out: TReal = onnx.CastLike(after, target) if wide else after
    return out


def _rate(u: Any, sent: Any, number: Any, low: int, top: int, kind: Any) -> Any:
    u = u if low else onnx.Max(u, onnx_number(0, kind))
    unsent = onnx.Floor(onnx.Add(onnx.Sub(onnx.Mul(u, number), sent), onnx_number(0.5, kind)))
    return onnx.Add(onnx.Clip(unsent, onnx_number(-1, kind), onnx_number(1, kind)), sent)


def _multi(u: Any, sent: Any, number: Any, low: int, top: int, kind: Any) -> Any:
    lowest, highest = onnx_number(-top, kind), onnx_number(top, kind)
    unsent = onnx.Sub(onnx.Clip(u, lowest if low else onnx_number(0, kind), highest), sent)
    unsent = onnx.Clip(unsent, lowest, highest) if low else unsent
    unsent = onnx.Add(onnx.Floor(unsent), onnx_number(0.5, kind))
    scaled = onnx.Mul(unsent, onnx_number(2.0 ** np.finfo(kind).nmant + 1, kind))
    spike = onnx.Sub(scaled, onnx.Sub(scaled, unsent))
    # Rounded to a multiple of 2, which every spike is: takes +-1/2, silence, away. GPU providers lack Round.
    large = onnx_number(1.5 * 2.0 ** (np.finfo(kind).nmant + 1), kind)
    return onnx.Add(onnx.Sub(onnx.Add(spike, large), large), sent)


_FORMS = {"multi": _multi, "rate": _rate}
