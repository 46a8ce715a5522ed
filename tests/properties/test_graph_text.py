"""Graph text: the same program gives the same text, the text gives the same program, and never runs anything."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from strategies import NETS, Net, graphs, net, outputs, stages
from torch import Tensor
from torch.fx import GraphModule

import fasfx
from fasfx.capture import capture
from fasfx.config import SpikeConfig
from fasfx.errors import GraphTextError
from fasfx.graph_text import parse, text
from fasfx.program import facts
from fasfx.tools.bench.models import tiny, tiny_inputs


def tensors(gm: GraphModule) -> dict[str, Tensor]:
    return {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}


def assert_round_trip(gm: GraphModule, *batches: dict[str, Tensor]) -> None:
    shown = text(gm)
    read = parse(shown, tensors(gm), facts(gm).config)
    assert text(read) == shown == text(gm)
    assert facts(read).level == facts(gm).level
    for batch in batches:
        for found, wanted in zip(outputs(read, batch), outputs(gm, batch), strict=True):
            assert found.dtype == wanted.dtype and torch.equal(found.nan_to_num(), wanted.nan_to_num())


@given(graphs())
@settings(max_examples=30)
def test_random_graphs_round_trip(made: Net) -> None:
    assert_round_trip(capture(made.module, made.batch, SpikeConfig()), made.batch)


@pytest.mark.parametrize("name", NETS)
def test_every_level_round_trips(name: str) -> None:
    made = net(name)
    levels = stages(made, SpikeConfig(code="radix", granularity="channel"))
    for level in ("NORMAL", "CLIPPED", "FOLDED", "LOWERED"):
        assert_round_trip(levels[level], made.batch)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
def test_families_round_trip(family: str) -> None:
    batch = tiny_inputs(family)
    constants = {} if family in ("bert", "vit") else {"use_cache": False}
    snn = fasfx.convert(tiny(family), calibration=[batch | constants])
    other = tiny_inputs(family, batch_size=3, length=9, seed=1)
    for program in (snn.ranged, snn.graph_module):
        assert_round_trip(program, batch, other)


def test_same_model_same_text() -> None:
    one, two = (text(stages(net("attention"), SpikeConfig())["LOWERED"]) for _ in range(2))
    assert one == two


# --- errors ----------------------------------------------------------------------------------------------

HEADER = "# fasfx graph 1\n# level NORMAL\n# call {}\n"
GOOD = HEADER + (
    'w = get_attr("w")  # float32[4, 4]\n'
    'x = placeholder("x")  # float32[batch, 4]\n'
    "linear = aten.linear.default(x, w)  # float32[batch, 4]\n"
    "return [linear]\n"
)
WEIGHTS = {"w": torch.eye(4)}


def test_the_smallest_text_parses() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(parse(GOOD, WEIGHTS)(x)[0], x)


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


BAD: dict[str, tuple[str, str]] = {
    "empty": ("", "line 1"),
    "no header": (GOOD.split("\n", 1)[1], "line 1"),
    "other format": (changed("graph 1", "graph 2"), "line 1"),
    "no level": (changed("# level NORMAL\n", ""), "level"),
    "unknown level": (changed("NORMAL", "SHINY"), "SHINY"),
    "damaged call": (changed("{}", '{"args": ['), "call"),
    "cut in a line": (GOOD[: GOOD.index("default(x")], "cut off"),
    "cut after a line": (GOOD[: GOOD.index("return")], "cut off"),
    "cut in the return": (GOOD.replace("[linear]", "[lin"), "line 7"),
    "nonsense": (changed("linear = aten", "linear := aten"), "line 6"),
    "no call": (changed("aten.linear.default(x, w)", "x"), "line 6"),
    "unknown operator": (changed("aten.linear.default", "aten.linearly.default"), "line 6"),
    "unknown overload": (changed("aten.linear.default", "aten.linear.Scalar"), "line 6"),
    "unknown namespace": (changed("aten.linear.default", "numpy.linear"), "line 6"),
    "missing weight": (changed('get_attr("w")', 'get_attr("v")'), "line 4.*'v'"),
    "use before definition": (changed("linear.default(x, w)", "linear.default(y, w)"), "line 6.*'y'"),
    "return of nothing known": (changed("[linear]", "[linears]"), "line 7"),
    "unknown dtype": (changed("float32[batch, 4]\nlinear", "float33[batch, 4]\nlinear"), "line 5"),
    "wrong number of arguments": (changed("(x, w)", "()"), "line 6"),
    "wrong shape": (changed("float32[batch, 4]\nlinear", "float32[batch, 5]\nlinear"), "line 6"),
    "name defined twice": (changed("linear = ", "x = ").replace("[linear]", "[x]"), "line 6.*'x'"),
    "text after the return": (GOOD + "y = aten.relu.default(x)\n", "cut off|line 8"),
}


@pytest.mark.parametrize(("source", "where"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_named(source: str, where: str) -> None:
    with pytest.raises(GraphTextError, match=where):
        parse(source, WEIGHTS)


# --- never code ------------------------------------------------------------------------------------------

# Each is the call of line 6; {path} is a file that must not appear.
CALLS = {
    "import": '__import__("os").system("touch {path}")',
    "builtins eval": "builtins.eval(\"open('{path}', 'w')\")",
    "builtins exec": "builtins.exec(\"open('{path}', 'w')\")",
    "builtins open": 'builtins.open("{path}", "w")',
    "builtins import": 'builtins.__import__("antigravity")',
    "builtins getattr": 'builtins.getattr(x, "shape")',
    "os behind torch": 'torch.serialization.os.system("touch {path}")',
    "os behind torch, popen": 'torch.os.popen("touch {path}")',
    "torch load": 'torch.load("{path}")',
    "torch save": 'torch.save([1], "{path}")',
    "load library": 'torch.ops.load_library("{path}")',
    "module behind the operators": "torch.ops.sys.modules.clear()",
    "an operator's globals": 'aten.linear.default.__init__.__globals__.get("x")',
    "operator call": "operator.call(1)",
    "operator methodcaller": 'operator.methodcaller("__class__")',
    "operator attrgetter": 'operator.attrgetter("__class__")',
    "operator setitem": "operator.setitem(x, 0, 1)",
    "math behind": 'math.__loader__.load_module("os")',
    "set seed": "torch.manual_seed(7)",
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "from file": 'aten.from_file.default("{path}", True, 4)',
    "lambda": "(lambda: x)()",
    "subscript": "[aten][0].relu.default(x)",
    "nested call": 'aten.linear.default(builtins.open("{path}", "w"), w)',
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_that_are_no_tensor_operators_are_refused(call: str, tmp_path: Path) -> None:
    path = tmp_path / "made"
    source = changed("aten.linear.default(x, w)", call.replace("{path}", str(path)))
    seed, dtype = torch.initial_seed(), torch.get_default_dtype()
    try:
        with pytest.raises(GraphTextError, match="line 6"):
            parse(source, WEIGHTS)
    finally:
        torch.set_default_dtype(dtype)
    assert not path.exists() and torch.initial_seed() == seed


INJECTIONS: dict[str, Callable[[str], tuple[str, dict[str, Tensor]]]] = {
    "input name": lambda code: (changed('placeholder("x")', f'placeholder("x={code}")'), WEIGHTS),
    "argument names": lambda code: (changed("# call {}", "# call " + call_header(f"x={code}")), WEIGHTS),
    "argument annotation": lambda code: (changed('placeholder("x")', f'placeholder("x: {code}")'), WEIGHTS),
    "weight name": lambda code: (
        changed('get_attr("w")', f'get_attr("w[{code}]")'),
        {f"w[{code}]": torch.eye(4)},
    ),
    "weight name with quotes": lambda code: (
        changed('get_attr("w")', f"get_attr('w\", {code}) or (\"')"),
        {f'w", {code}) or ("': torch.eye(4)},
    ),
    "value of torch": lambda code: (changed("default(x, w)", "default(x, torch.os)"), WEIGHTS),
    "private value of torch": lambda code: (changed("default(x, w)", "default(x, torch.load)"), WEIGHTS),
}


def call_header(argument: str) -> str:
    """The call line of a one-input program with another argument name."""
    made = Net("one", net("linear").module.float(), {"x": torch.randn(3, 8)})
    header = text(capture(made.module, made.batch, SpikeConfig())).splitlines()[2].removeprefix("# call ")
    return header.replace('"args": ["x"]', f'"args": ["{argument}"]')


@pytest.mark.parametrize("make", INJECTIONS.values(), ids=INJECTIONS)
def test_names_cannot_carry_code(make: Callable[[str], tuple[str, dict[str, Tensor]]]) -> None:
    """torch.fx writes names into Python source and runs it: only identifiers may get that far."""
    marker = "FASFX_GRAPH_TEXT_RAN"
    source, weights = make(f"__import__('os').environ.setdefault('{marker}','1')")
    try:
        with pytest.raises(GraphTextError):
            parse(source, weights)
        assert marker not in os.environ
    finally:
        os.environ.pop(marker, None)


def test_treespecs_name_known_types_only() -> None:
    header = call_header("x").replace("builtins.tuple", "os.system")
    with pytest.raises(GraphTextError):
        parse(changed("# call {}", "# call " + header), WEIGHTS)


@pytest.mark.parametrize(
    "call",
    [
        'aten.full.default([2], float("inf"), dtype=torch.float32, device=device("cpu"), pin_memory=False)',
        'aten.full.default([2], float("-inf"), layout=torch.strided)',
        "aten.clone.default(x, memory_format=torch.contiguous_format)",
        "aten.sum.dim_IntList(x, [-1], True, dtype=None)",
        "aten.gelu.default(x, approximate='tanh')",
        "aten.mul.Tensor(x, 1e-07)",
        "operator.getitem([x, w], 1)",
        "torch.ops.fasfx.count.default(x, 'multi', 4, 20, True)",
    ],
)
def test_ordinary_values_are_read(call: str) -> None:
    source = changed("aten.linear.default(x, w)", call)
    parsed = parse(source, WEIGHTS)
    line = next(line for line in text(parsed).splitlines() if line.startswith("linear = "))
    assert line.partition("  # ")[0].replace("'", '"') == f"linear = {call}".replace("'", '"')
    parsed(torch.randn(2, 4))
