"""Multi code: multi-threshold neuron; each step sends the signed power of two nearest to what is unsent."""

import torch
from torch import Tensor

from fasfx.ops.precision import working


def capacity(steps: int, levels: int) -> int:
    """N: the largest spike, in units of the smallest."""
    return int(2 ** (levels - 1))


def spikes(u: Tensor, steps: int, levels: int, signed: bool) -> Tensor:
    """Thresholds 1/2, 3/2, 3, 6, ... part silence, 1, 2, 4, 8, ...: every step sends one of these of what is unsent.

    An event is +-(i + 1) with i the level, whose spike weighs theta * 2^-i, that is 2^(levels - 1 - i) counts.
    """
    unsent, events = _halves(u, capacity(steps, levels), signed).add_(0.5), []
    spike = torch.empty_like(unsent)
    for _ in range(steps):
        unsent.sub_(_nearest_power(spike.copy_(unsent)))
        events.append(event(spike.round_(), levels))  # to even: +-1/2, silence, becomes 0
    return torch.stack(events)


def decode(events: Tensor, levels: int) -> Tensor:
    """The sum of the spikes' weights, int32."""
    sign, exponent = events.sign().to(torch.int32), (levels - events.abs()).to(torch.int32)
    return sign.bitwise_left_shift(exponent).sum(0, dtype=torch.int32)


def count(u: Tensor, steps: int, levels: int, signed: bool) -> Tensor:
    """The sum of the same spikes; r = +-1/2, silence, is sent here as +-1/2, and the last floor takes it away."""
    halves = _halves(u, capacity(steps, levels), signed)
    unsent, spike = halves.add(0.5), torch.empty_like(halves)
    for _ in range(steps):
        unsent.sub_(_nearest_power(spike.copy_(unsent)))
    return halves.sub_(unsent).mul_(0.5).add_(0.75).floor_().to(u.dtype)


def _halves(u: Tensor, top: int, signed: bool) -> Tensor:
    """floor(2u) within the range: r = floor(2u) + 1/2 half counts is never a tie, and decides as u does.

    Comparisons with the thresholds only need the half of a count that u lies in, so its middle may stand for u.
    """
    return _wide(u, top).mul(2).clamp_(-2 * top if signed else 0, 2 * top).floor_()


# dtype: integers of its width, bits of its mantissa, the exponent's bias
_BITS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


def _wide(u: Tensor, top: int) -> Tensor:
    """u in float32 or, where half counts up to `top` need it, in float64."""
    return _readable(working(u, top))


def _readable(x: Tensor) -> Tensor:
    """x in a dtype whose bits are known here."""
    return x if x.dtype in _BITS else x.float()


def _nearest_power(r: Tensor) -> Tensor:
    """Replace r, a whole number and a half, by the signed power of two nearest to it: sign and exponent of r * 4/3.

    3 * 2^k divides 2^(k+1) from 2^(k+2); no r but +-3/2, which goes to +-2, is that close to a division that
    rounding matters. Backends that cannot see a float's bits round r to one significant bit by Veltkamp's splitting,
    c - (c - r) with c = (2^p + 1) r and p the mantissa's bits: three exact operations.
    """
    integer, mantissa, _ = _BITS[r.dtype]
    r.mul_(4 / 3).view(integer).bitwise_and_(-1 << mantissa)
    return r


# --- one tick of a running estimate, in half counts ------------------------------------------------------------


def unit(levels: int) -> int:
    """The threshold in a step graph, in half counts: what has been sent is always even."""
    return int(2**levels)


def tick(u: Tensor, sent: Tensor, _: Tensor, levels: int, signed: bool) -> Tensor:
    """What has been sent after one more spike: the signed power of two nearest to u - sent, or none.

    In half counts, floor(u - sent) + 1/2 is never a tie, as in `count`; +-1/2 means silence, and rounding to even
    takes it away. The spike weighs at most the threshold, also when u jumps from one end of the range to the other.
    """
    top = unit(levels)
    unsent = _wide(u, top).clamp(-top if signed else 0, top).sub_(sent)
    if signed:  # u may have gone from one end to the other; else less than 3/2 of the threshold is unsent
        unsent.clamp_(-top, top)
    unsent.floor_().add_(0.5)
    return _nearest_power(unsent).add_(sent).round_().to(u.dtype)


def reach(u: Tensor, sent: Tensor, _: Tensor, levels: int, signed: bool) -> Tensor:
    """What tick would send without rounding, for its gradient."""
    top = unit(levels)
    return (u.clamp(-top if signed else 0, top) - sent).clamp(-top, top)


def event(spike: Tensor, levels: int) -> Tensor:
    """+-(i + 1) with i the level, from a spike of 2^(levels - i) half counts; 0 for silence."""
    spike = _readable(spike)
    integer, mantissa, bias = _BITS[spike.dtype]
    # the sign's bit is above the eight that are kept of the exponent
    exponent = spike.view(integer).bitwise_right_shift(mantissa).sub_(bias).to(torch.int8)
    return (levels + 1 - exponent).mul_(spike.sign().to(torch.int8))


def activity(u: Tensor, steps: int) -> Tensor:
    """A smooth number of spikes: signed digits of u, a third of its bits after the first, of which `steps` are sent."""
    size = u.abs()
    digits = size / (1 + size) * 2 / 3 + size.add(1).log2() / 3
    return steps * (digits / steps).tanh()
