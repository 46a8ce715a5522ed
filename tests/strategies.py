"""The one place of hypothesis strategies: neurons, count-unit values, thresholds, small networks, graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from fasfx.capture import capture
from fasfx.config import MAX_LEVELS, SpikeConfig
from fasfx.ops import CODES, NEURONS, Code
from fasfx.passes import Centre, Clip, Fold, Lower, Normalise, Observe, Substitute, clip
from fasfx.program import facts
from fasfx.runner import Runner

MAX_STEPS = {"rate": 64, "radix": 16, "multi": 12}
DTYPES = (torch.float32, torch.float64)


# --- neurons ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neuron:
    """The arguments every neuron operator takes, and what follows from them."""

    code: str
    steps: int
    levels: int
    signed: bool

    @property
    def row(self) -> Code:
        return CODES[self.code]

    @property
    def args(self) -> tuple[str, int, int, bool]:
        return self.code, self.steps, self.levels, self.signed

    @property
    def numbers(self) -> tuple[int, int, bool]:
        return self.steps, self.levels, self.signed

    @property
    def top(self) -> int:
        return self.row.capacity(self.steps, self.levels)

    @property
    def low(self) -> int:
        return -self.top if self.signed else 0

    def reference(self, u: float) -> int:
        """The count for constant input u, in exact rational arithmetic and by brute force."""
        exact = min(max(Fraction(u), Fraction(self.low)), Fraction(self.top))
        if self.code != "multi":
            return (exact + Fraction(1, 2)).__floor__()
        sent = 0
        for _ in range(self.steps):
            sent += nearest_power(exact - sent, self.levels)
        return sent


def nearest_power(unsent: Fraction, levels: int) -> int:
    """0 or the signed power of two nearest to `unsent`; of two equally near ones the larger (floor(x + 1/2))."""
    powers = [2**k for k in range(levels)]
    return min([0, *powers, *(-p for p in powers)], key=lambda p: (abs(unsent - p), -p))


def neurons(codes: tuple[str, ...] = tuple(CODES), max_levels: int = MAX_LEVELS) -> st.SearchStrategy[Neuron]:
    """Any code, steps up to MAX_STEPS, levels up to the configuration's limit, signed or not."""
    return st.sampled_from(codes).flatmap(
        lambda code: st.builds(
            Neuron,
            st.just(code),
            st.integers(1, MAX_STEPS[code]),
            st.integers(1, max_levels),
            st.booleans(),
        )
    )


def corners(neuron: Neuron) -> list[float]:
    """Zero, both ends, just outside, ties, and where the multi neuron changes its mind (3 * 2^k)."""
    top = float(neuron.top)
    ladder = [3.0 * 2**k for k in range(-2, neuron.levels) if 3 * 2**k <= 2 * top]
    points = [0.0, 0.5, 1.0, top - 1, top - 0.5, top, top + 0.5, 4 * top, *ladder[:6], *ladder[-6:]]
    return points + [-p for p in points]


@st.composite
def count_values(draw: st.DrawFn, neuron: Neuron, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values in count units on a grid of eighths, where all sums of the stepwise form are exact.

    Holds every corner of the neuron, and drawn points up to half as much again as its range.
    """
    reach = 12 * neuron.top
    drawn = draw(st.lists(st.integers(-reach, reach), max_size=40))
    return torch.tensor([*corners(neuron), *(d / 8 for d in drawn)], dtype=dtype)


def thresholds() -> st.SearchStrategy[float]:
    """Any threshold."""
    return st.floats(1e-3, 1e3)


def powers_of_two() -> st.SearchStrategy[float]:
    """Thresholds and factors whose products are exact."""
    return st.integers(-8, 8).map(lambda k: 2.0**k)


@st.composite
def values_in_range(draw: st.DrawFn, neuron: Neuron, theta: float) -> Tensor:
    """Float64 values from -theta (0 for an unsigned neuron) to theta; both ends are among them."""
    low = -theta if neuron.signed else 0.0
    drawn = draw(st.lists(st.floats(low, theta), max_size=40))
    return torch.tensor([low, theta, 0.0, theta / 3, *drawn], dtype=torch.float64)


# --- networks --------------------------------------------------------------------------------------------


@dataclass
class Net:
    """A small module with one batch of inputs; `name` says what it exercises."""

    name: str
    module: nn.Module
    batch: dict[str, Tensor] = field(default_factory=dict)

    def double(self) -> Net:
        """The same in float64."""
        batch = {k: v.double() if v.is_floating_point() else v for k, v in self.batch.items()}
        return Net(self.name, self.module.double(), batch)

    def __repr__(self) -> str:
        return self.name


class Calls(nn.Module):
    """A module from a function of its layers and inputs: keeps small networks on one line."""

    def __init__(self, call: Callable[..., Any], **layers: nn.Module | Tensor) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, nn.Parameter(layer) if isinstance(layer, Tensor) else layer)
        self._call = call

    def forward(self, x: Tensor) -> Any:
        return self._call(self, x)


class Attention(nn.Module):
    """Multi-head self-attention as transformers write it; groups < heads shares keys and values."""

    def __init__(self, width: int = 16, heads: int = 2, groups: int = 2, **options: Any) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.options = heads, groups, width // heads, options
        self.q, self.k, self.v = (nn.Linear(width, n * self.size) for n in (heads, groups, groups))
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self._split(layer(x), n)
            for layer, n in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.groups < self.heads, **self.options)
        return self.o(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, self.size).transpose(1, 2)


class EagerAttention(nn.Module):
    """One head in primitives, with dropout on the probabilities, which are returned too."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.matmul(self.q(x), self.k(x).transpose(-1, -2)) * 8**-0.5
        weights = F.dropout(torch.softmax(scores, dim=-1), 0.1, self.training)
        return torch.matmul(weights, self.v(x)), weights


def _flat(call: Callable[..., Any], width: int = 8, **layers: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (Calls(call, **{k: v() for k, v in layers.items()}), torch.randn(3, width))


def _sequence(call: Callable[..., Any], *, shape: tuple[int, ...] = (3, 5, 8), **layers: Any) -> Callable[..., Any]:
    return lambda: (Calls(call, **{k: v() for k, v in layers.items()}), torch.randn(shape))


def _linear(rows: int = 8, columns: int = 8, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(rows, columns, bias=bias)


# name: function giving (module, x). Every reader and maker that scales move through is here at least once.
NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": _flat(lambda m, x: m.a(x), a=_linear()),
    "mlp": _flat(lambda m, x: m.b(F.relu(m.a(x))), a=_linear(8, 16), b=_linear(16, 4)),
    "mlp_no_bias": _flat(lambda m, x: m.b(m.a(x)), a=_linear(8, 8, False), b=_linear(8, 4, False)),
    "residual": _flat(lambda m, x: x + m.b(F.gelu(m.a(x))), a=_linear(), b=_linear()),
    "two_readers": _flat(lambda m, x: m.b(F.relu(m.a(x))) * m.c(x), a=_linear(), b=_linear(), c=_linear()),
    "dropout": _flat(lambda m, x: m.b(F.dropout(m.a(x), 0.1, m.training)), a=_linear(), b=_linear()),
    "factor": _flat(
        lambda m, x: m.b(0.5 * F.relu(m.a(x)) * m.g), a=_linear(), b=_linear(), g=lambda: torch.rand(8) + 0.5
    ),
    "negative_factor": _flat(
        lambda m, x: m.b(F.relu(m.a(x)) * m.g), a=_linear(), b=_linear(), g=lambda: torch.randn(8)
    ),
    "neg_and_div": _flat(lambda m, x: m.b(-m.a(x) / 3), a=_linear(), b=_linear()),
    "layer_norm": _sequence(lambda m, x: m.a(m.n(x)), n=lambda: nn.LayerNorm(8), a=_linear()),
    "layer_norm_2d": _sequence(lambda m, x: m.a(m.n(x)), n=lambda: nn.LayerNorm([5, 8]), a=_linear()),
    "layer_norm_plain": _sequence(
        lambda m, x: m.a(m.n(x)), n=lambda: nn.LayerNorm(8, elementwise_affine=False), a=_linear()
    ),
    "rms_norm": _sequence(lambda m, x: m.a(m.n(x)), n=lambda: nn.RMSNorm(8), a=_linear()),
    "views": _sequence(
        lambda m, x: m.b(m.a(x).view(-1, 5, 2, 4).transpose(1, 2).reshape(-1, 2, 20)),
        a=_linear(),
        b=_linear(20, 4),
    ),
    "permute": _sequence(
        lambda m, x: m.b(m.a(x).view(-1, 5, 4, 2).permute(0, 3, 1, 2).contiguous()),
        a=_linear(),
        b=_linear(4, 4),
    ),
    "merge": _sequence(lambda m, x: m.b(m.a(x).view(-1, 10, 4)), a=_linear(), b=_linear(4, 4)),
    "slice_and_select": _sequence(lambda m, x: m.b(m.a(x)[:, 1:][:, 0]), a=_linear(), b=_linear()),
    "matmul": _sequence(lambda m, x: torch.matmul(m.a(x), m.b(x).transpose(1, 2)), a=_linear(), b=_linear()),
    "matmul_same": _sequence(lambda m, x: torch.matmul(m.a(x), m.a(x)), shape=(3, 8, 8), a=_linear()),
    "matmul_square": _sequence(lambda m, x: (lambda y: torch.matmul(y, y))(m.a(x)), shape=(3, 8, 8), a=_linear()),
    "matmul_weight": _sequence(lambda m, x: torch.matmul(m.a(x), m.w), a=_linear(), w=lambda: torch.randn(8, 4)),
    "tied": _sequence(lambda m, x: F.linear(F.relu(F.linear(x, m.w)) * 3, m.w), w=lambda: torch.randn(8, 8)),
    "dynamic_weight": _sequence(lambda m, x: F.linear(x, m.a(x[0])), a=_linear()),
    "attention": lambda: (Attention(), torch.randn(2, 5, 16)),
    "attention_grouped": lambda: (Attention(16, 4, 2), torch.randn(2, 5, 16)),
    "attention_causal": lambda: (Attention(is_causal=True), torch.randn(2, 5, 16)),
    "attention_eager": lambda: (EagerAttention(), torch.randn(2, 5, 8)),
    "conv1d": _sequence(
        lambda m, x: m.b(F.relu(m.a(x))),
        shape=(2, 4, 9),
        a=lambda: nn.Conv1d(4, 6, 3),
        b=lambda: nn.Conv1d(6, 5, 3),
    ),
    "conv2d_groups": _sequence(
        lambda m, x: m.b(F.relu(m.a(x))),
        shape=(2, 4, 7, 6),
        a=lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2),
        b=lambda: nn.Conv2d(8, 6, 3, stride=2, groups=2, bias=False),
    ),
    "conv2d_depthwise": _sequence(
        lambda m, x: m.b(m.a(x)),
        shape=(2, 4, 7, 6),
        a=lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same"),
        b=lambda: nn.Conv2d(4, 8, 3, groups=4),
    ),
    "conv3d": _sequence(lambda m, x: m.a(x), shape=(2, 2, 4, 4, 4), a=lambda: nn.Conv3d(2, 3, 2)),
    "conv_transpose": _sequence(
        lambda m, x: m.b(m.a(x)),
        shape=(2, 4, 5, 5),
        a=lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
        b=lambda: nn.Conv2d(6, 2, 1),
    ),
    "conv_then_linear": _sequence(
        lambda m, x: m.b(m.a(x)), shape=(2, 4, 10), a=lambda: nn.Conv1d(4, 8, 3), b=_linear(8, 4)
    ),
    "conv_then_flat": _sequence(
        lambda m, x: m.b(F.relu(m.a(x)).flatten(1)),
        shape=(2, 3, 6, 6),
        a=lambda: nn.Conv2d(3, 4, 3),
        b=_linear(64, 4),
    ),
    "patches": _sequence(
        lambda m, x: m.b(m.a(x).flatten(2).transpose(1, 2)),
        shape=(2, 3, 8, 8),
        a=lambda: nn.Conv2d(3, 8, 4, stride=4),
        b=_linear(8, 4),
    ),
}


def net(name: str, seed: int = 0) -> Net:
    """A network of NETS, in float64 and eval mode; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, x = NETS[name]()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return Net(name, module.eval(), {"x": x}).double()


def exact_net(name: str, seed: int = 0) -> Net:
    """The same with small whole weights and inputs: linear, convolution and product sums are exact."""
    made = net(name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator).to(parameter))
        for value in made.batch.values():
            value.copy_(torch.randint(-8, 9, value.shape, generator=generator).to(value) / 2)
    return made


def nets(names: tuple[str, ...] = tuple(NETS)) -> st.SearchStrategy[Net]:
    """Any network of NETS with any weights."""
    return st.builds(net, st.sampled_from(names), st.integers(0, 2**16))


def configs(**fixed: Any) -> st.SearchStrategy[SpikeConfig]:
    """Codes with a few steps, all granularities."""
    options: dict[str, st.SearchStrategy[Any]] = {
        "code": st.sampled_from(tuple(CODES)),
        "timesteps": st.integers(1, 6),
        "levels": st.integers(4, 20),
        "centre": st.booleans(),
        "granularity": st.sampled_from(("tensor", "channel", "token")),
        "nonlinear": st.just("exact"),  # neuron groups have properties of their own: test_groups.py, test_spiking.py
        "margin": st.just(1.37),  # with 1.2 or 2 the calibrated maximum can sit on a rounding tie
    }
    return st.builds(SpikeConfig, **(options | {k: st.just(v) for k, v in fixed.items()}))


# --- programs --------------------------------------------------------------------------------------------


def stages(made: Net, config: SpikeConfig, exact: bool = False) -> dict[str, GraphModule]:
    """Level -> program, for every level of the pipeline; `exact` rounds thresholds, see `round_peaks`."""
    captured = capture(made.module, made.batch, config)
    found = {"CAPTURED": captured}

    def keep(_: str, gm: GraphModule) -> None:
        found[facts(gm).level] = gm

    Runner([Normalise(), Centre(), Observe([made.batch])], after=keep).run(captured)
    if exact:
        round_peaks(found["RANGED"])
    # The floor under quiet channels would make thresholds irrational.
    with mock.patch.object(clip, "CHANNEL_FLOOR", 0.0 if exact else clip.CHANNEL_FLOOR):
        Runner([Clip(), Substitute(), Fold(), Lower()], after=keep).run(found["RANGED"])
    return found


def round_peaks(ranged: GraphModule) -> None:
    """Peaks become N * 4^k: then N / theta and the square roots of coupled thresholds are exact (margin 1)."""
    config = facts(ranged).config
    assert config.margin == 1
    top = config.unit(config.timesteps)
    for site in facts(ranged).sites.values():
        if site.fixed is None and site.peak is not None:
            exponents = torch.log2(site.peak.clamp(min=2.0**-20) / top).div(2).round()
            site.peak = top * 4.0**exponents


class Recorder(Interpreter):
    """Runs a program of any level and keeps the counts of every site, and x, theta and y of every neuron."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.counts: dict[str, Tensor] = {}
        self.neurons: dict[str, tuple[Tensor, Tensor, Tensor, bool]] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.target in NEURONS:
            config = facts(self.module).config
            top = CODES[config.code].capacity(config.timesteps, config.levels)
            args = self.map_nodes_to_values(n.args, n)
            theta = args[1] if isinstance(args[1], Tensor) else torch.tensor(float(top), dtype=result.dtype)
            self.counts[n.meta["site"]] = result * (top / theta)
            self.neurons[n.meta["site"]] = (args[0], theta, result, args[-1])
        return result


def recorded(gm: GraphModule, batch: dict[str, Tensor]) -> tuple[Any, Recorder]:
    """The outputs of a program as a flat list, and what its neurons did."""
    recorder = Recorder(gm)
    with torch.no_grad():
        names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
        recorder.run(*(batch[name] for name in names))
    return outputs(gm, batch), recorder


def outputs(module: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """All tensors a module returns."""
    with torch.no_grad():
        found = torch.utils._pytree.tree_leaves(module(**batch))
    return [value for value in found if isinstance(value, Tensor)]


def aligned(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors lie where torch puts them on a CPU, at multiples of 64 bytes."""
    return all(value.data_ptr() % 64 == 0 for value in tensors)


def same(one: list[Tensor], other: list[Tensor], tolerance: float) -> bool:
    """Whether all tensors agree within a share of the largest value of each; inf and NaN at the same places."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        size = float(a.nan_to_num(0, 0, 0).abs().max()) if a.numel() else 0.0
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=tolerance * max(size, 1e-30), equal_nan=True):
            return False
    return True


# --- graphs ----------------------------------------------------------------------------------------------

# One step of a random graph on [batch, 4, 6] values: each keeps the shape.
STEPS: dict[str, Callable[[Tensor, Tensor, nn.Module], Tensor]] = {
    "add": lambda x, y, m: x + y,
    "sub_scalar": lambda x, y, m: 1.5 - x,
    "mul": lambda x, y, m: x * y,
    "linear": lambda x, y, m: m.linear(x),
    "product": lambda x, y, m: x @ y.transpose(1, 2) @ y,
    "softmax": lambda x, y, m: torch.softmax(x, -1),
    "norm": lambda x, y, m: m.norm(x),
    "where": lambda x, y, m: torch.where(x > y, x, float("-inf")).clamp(min=-2.0),
    "views": lambda x, y, m: x.reshape(x.shape[0], 2, 2, 6).permute(0, 2, 1, 3).reshape(x.shape[0], 4, 6),
    "split": lambda x, y, m: torch.cat(list(y.split(2, 1)), 1),
    "cast": lambda x, y, m: x.to(torch.float64).to(torch.float32),
    "topk": lambda x, y, m: torch.sort(x, dim=-1, descending=True)[0],
    "arange": lambda x, y, m: x + torch.arange(x.shape[0], dtype=x.dtype)[:, None, None],
    "in_place": lambda x, y, m: x.clone().mul_(0.5).add_(y),
    "mask": lambda x, y, m: x.masked_fill(torch.ones(4, 6, dtype=torch.bool).tril(), 0.0),
}


class RandomGraph(nn.Module):
    """Runs steps one after the other; each takes the last value and an earlier one."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.steps, self.linear, self.norm = steps, nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        values = [x]
        for name, back in self.steps:
            values.append(STEPS[name](values[-1], values[back % len(values)], self))
        return {"last": values[-1], "first": values[0] + 1}


@st.composite
def graphs(draw: st.DrawFn, max_steps: int = 6) -> Net:
    """A random module whose graph mixes views, products, casts, several outputs, in-place operators."""
    pairs = st.tuples(st.sampled_from(tuple(STEPS)), st.integers(0, max_steps))
    steps = draw(st.lists(pairs, min_size=1, max_size=max_steps))
    return Net("-".join(name for name, _ in steps), RandomGraph(steps).eval(), {"x": torch.randn(3, 4, 6)})
