"""Stage II: initial potentials in every form of a network, and fasfx.tune, which finds them and thresholds."""

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import classifier, clipped, inputs, text
from torch import Tensor, nn
from torch.fx import GraphModule

import fasfx
from fasfx import ops
from fasfx.alignment import Recorder
from fasfx.errors import CalibrationError, CheckpointError, ConfigError
from fasfx.learnable import learned_potentials, per_channel, per_layer
from fasfx.passes import Clip
from fasfx.passes.clip import thresholds
from fasfx.program import copy_program, facts
from fasfx.resuming import FILE, Saved, forget
from fasfx.runner import Runner
from fasfx.student import Student
from fasfx.teaching import Lessons

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
Batch = dict[str, Any]
TICKING = ("multi", "rate")
SYNCHRONOUS = fasfx.SpikeConfig(schedule="synchronous", nonlinear="exact", timesteps=3, levels=4)


def batches(number: int = 4) -> list[Batch]:
    return [inputs(text(seed)) for seed in range(number)]


def configured(ranged: GraphModule, **changes: Any) -> GraphModule:
    """The same program under another configuration."""
    new = copy_program(ranged)
    facts(new).config = facts(new).config.replace(**changes)
    return new


def with_sites(ranged: GraphModule, change: Callable[[str], Batch]) -> GraphModule:
    """The same program with other fields of its sites."""
    new = copy_program(ranged)
    sites = facts(new).sites.items()
    facts(new).sites = {name: dataclasses.replace(site, **change(name)) for name, site in sites}
    return new


def with_potentials(ranged: GraphModule, per_channel: bool) -> GraphModule:
    """Random initial potentials on every site, up to two fifths of what would be one count more."""
    theta, config = thresholds(ranged), facts(ranged).config

    def potential(site: str) -> Batch:
        peak = facts(ranged).sites[site].peak
        shape = peak.shape if per_channel and peak is not None else ()
        counts = 1 if config.code == "rate" else ops.CODES[config.code].capacity(config.timesteps, config.levels)
        share = (torch.rand(shape, dtype=torch.float64) * 0.8 - 0.4) / counts
        return {"initial": share * theta[site].amax()}

    return with_sites(ranged, potential)


# --- initial potentials -----------------------------------------------------------------------------------


class Gated(nn.Module):
    """A value with two neurons behind its factors, and one that is never negative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.relu(self.c(self.a(x) * self.b(x))))


@pytest.fixture(scope="module")
def bert() -> GraphModule:
    """A classifier at RANGED in float64."""
    return fasfx.convert(classifier().double(), batches(), SYNCHRONOUS.replace(schedule="sequential")).ranged


@pytest.fixture(scope="module")
def gated() -> GraphModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fasfx.convert(Gated().double(), [torch.randn(32, 6).double()], fasfx.SpikeConfig(levels=4)).ranged


def first(output: Any) -> Tensor:
    value: Tensor = torch.utils._pytree.tree_leaves(output)[0]
    return value


@pytest.mark.parametrize("per_channel", [False, True], ids=["layer", "channel"])
@pytest.mark.parametrize("code", list(ops.CODES))
@pytest.mark.parametrize("network", ["bert", "gated"])
def test_a_sequential_network_with_potentials_is_the_clipped_program(
    network: str, code: str, per_channel: bool, request: pytest.FixtureRequest
) -> None:
    given = inputs(text(9)) if network == "bert" else {"x": torch.randn(16, 6).double()}
    plain = configured(request.getfixturevalue(network), code=code)
    tuned = with_potentials(plain, per_channel)
    expected, found = first(Runner([Clip()]).run(tuned)(**given)), first(fasfx.SpikingModel(tuned)(**given))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, first(fasfx.SpikingModel(plain)(**given)), rtol=1e-3, atol=1e-3)


def simulated(model: Gated, x: Tensor, ranged: GraphModule) -> Tensor:
    """The network written out, its neurons called one by one, tick by tick."""
    config, theta = facts(ranged).config, thresholds(ranged)
    row = ops.tick.ticking(config.code)
    sent: dict[str, Tensor] = {}

    def neuron(name: str, value: Tensor, number: int) -> Tensor:
        site = facts(ranged).sites[name]
        assert site.initial is not None
        unit = row.unit(config.levels) * (site.population if row.averages else 1)
        share = number * site.population if row.averages else 1
        u = (value + site.initial / share) * unit / theta[name]
        for _ in range(site.population):
            before = sent.get(name, torch.zeros_like(value))
            sent[name] = ops.tick.op(u, before, torch.tensor(number), config.code, config.levels, site.signed)
        return sent[name] * theta[name] / unit / (number if row.averages else 1)

    x_site, a_site, b_site, product_site, relu_site = facts(ranged).sites
    for number in range(1, config.timesteps + 1):
        seen = neuron(x_site, x, number)
        factors = [neuron(site, layer(seen), number) for site, layer in ((a_site, model.a), (b_site, model.b))]
        hidden = model.c(neuron(product_site, factors[0] * factors[1], number))
        output = model.d(neuron(relu_site, torch.relu(hidden), number))
    return output


@pytest.mark.parametrize("per_channel", [False, True], ids=["layer", "channel"])
@pytest.mark.parametrize("code", TICKING)
def test_a_synchronous_network_with_potentials_is_its_neurons_one_by_one(
    code: str, per_channel: bool, gated: GraphModule
) -> None:
    torch.manual_seed(0)
    model, x = Gated().double(), torch.randn(16, 6).double()
    plain = configured(gated, code=code, schedule="synchronous", timesteps=5)
    tuned = with_potentials(plain, per_channel)
    assert [site.population for site in facts(tuned).sites.values()] == [1, 2, 2, 1, 1]
    expected = simulated(model, x, tuned)
    found = fasfx.SpikingModel(tuned)(x=x)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, fasfx.SpikingModel(plain)(x=x), atol=1e-3)


# --- tune -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tuned:
    """A network, what tuning made of it, and how both it and its model were before."""

    model: nn.Module
    weights: dict[str, Tensor]
    snn: fasfx.SpikingModel
    outputs: Tensor
    result: fasfx.SpikingModel


def tuned_by(model: nn.Module, config: fasfx.SpikeConfig, **options: Any) -> Tuned:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    snn = fasfx.convert(model, batches(), config)
    outputs = snn(**batches()[0]).logits
    return Tuned(model, weights, snn, outputs, fasfx.tune(snn, batches(), epochs=2, **options))


@pytest.fixture(scope="module")
def of_code() -> dict[str, Tuned]:
    """Multi in float32, rate in float64."""
    multi = tuned_by(classifier(), SYNCHRONOUS.replace(timesteps=2))
    return {"multi": multi, "rate": tuned_by(classifier().double(), SYNCHRONOUS.replace(code="rate"))}


def learned(snn: fasfx.SpikingModel) -> dict[str, Tensor]:
    """What tuning found, by name."""
    sites = facts(snn.ranged).sites.items()
    values = {(name, kind): getattr(site, kind) for name, site in sites for kind in ("tuned", "initial")}
    return {f"{name}.{kind}": value for (name, kind), value in values.items() if value is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def transmitted(snn: fasfx.SpikingModel, batch: Batch) -> dict[str, Tensor]:
    return {site: train.decode() for site, train in snn.spikes(**batch).items()}


def values_of(program: GraphModule, batch: Batch) -> dict[str, Tensor]:
    """The value that every site stands for, in a program of any level before SPIKING."""
    recorder = Recorder(program)
    with torch.no_grad():
        recorder.run(*batch.values())
    return recorder.values


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[float]:
    return [float((found[s] - wanted[s]).square().sum() / wanted[s].square().sum()) for s in wanted]


@pytest.mark.parametrize("code", TICKING)
def test_every_stage_lowers_the_held_out_error(code: str, of_code: dict[str, Tuned]) -> None:
    table = of_code[code].result.tuning
    assert table is not None and list(table) == ["site", "module", "before", "layer", "neuron"]
    before, layer, neuron = (float(table[stage].mean()) for stage in ("before", "layer", "neuron"))
    assert layer < 0.95 * before and neuron <= layer
    assert of_code[code].snn.tuning is None


@pytest.mark.parametrize("code", TICKING)
def test_the_closed_forms_help_before_any_gradient(code: str, of_code: dict[str, Tuned]) -> None:
    snn = of_code[code].snn
    result = fasfx.tune(snn, batches(), stages=("layer",), epochs=0)
    assert result.tuning is not None and result.tuning.layer.mean() < 0.95 * result.tuning.before.mean()
    found, start = learned(result), thresholds(snn.ranged)
    factors = torch.stack([(found[f"{name}.tuned"] / theta).flatten()[0] for name, theta in start.items()])
    quarters = 4 * factors.log2()
    assert torch.allclose(quarters, quarters.round(), atol=1e-4) and bool(quarters.round().any())


@pytest.mark.parametrize("shapes", [per_layer, per_channel])
def test_means_are_matched_by_potentials_of_the_mean_error(shapes: Any, of_code: dict[str, Tuned]) -> None:
    """Of a rate neuron, times T: over the T ticks its potential then makes up for half of it."""
    snn = of_code["rate"].snn
    student, taught = Student(snn.ranged, shapes, 0.0, 0.0), [*Lessons(snn.ranged, None, batches(1))]
    student.set_units(taught)
    gaps = {site: taught[0].values[site] - value for site, value in transmitted(snn, batches()[0]).items()}
    student.match_means(student.means(taught), 0.5)
    for site, found in learned_potentials(student.program).items():
        gap = gaps[site]
        mean = gap.sum_to_size(found.shape) * (found.numel() / gap.numel())
        assert torch.allclose(found, 0.5 * snn.timesteps * mean, rtol=1e-9, atol=1e-12), site


@pytest.mark.parametrize("code", TICKING)
def test_the_table_is_the_error_of_what_the_spikes_say(code: str, of_code: dict[str, Tuned]) -> None:
    """Of the last batch, held out: decoded spikes of the networks themselves against the original's values."""
    case, batch = of_code[code], batches()[-1]
    table, wanted = case.result.tuning, values_of(case.snn.ranged, batch)
    assert table is not None and list(table.site) == list(wanted)
    assert {*table.site} == {*facts(case.snn.ranged).sites}
    tolerance = 1e-6 if code == "rate" else 1e-3
    assert list(table.before) == pytest.approx(errors(transmitted(case.snn, batch), wanted), rel=tolerance)
    assert list(table.neuron) == pytest.approx(errors(transmitted(case.result, batch), wanted), rel=tolerance)


@pytest.mark.parametrize("code", TICKING)
def test_what_is_given_stays_as_it_was(code: str, of_code: dict[str, Tuned]) -> None:
    case = of_code[code]
    assert learned(case.snn) == {} and facts(case.snn.ranged).tuned is None
    assert torch.equal(case.snn(**batches()[0]).logits, case.outputs)
    assert not torch.equal(case.result(**batches()[0]).logits, case.outputs)
    assert all(p.grad is None and p.requires_grad for p in case.model.parameters())
    assert_same(dict(case.model.state_dict()), case.weights)


@pytest.mark.parametrize("code", TICKING)
def test_tuned_thresholds_are_positive_and_those_in_force(code: str, of_code: dict[str, Tuned]) -> None:
    result, start = of_code[code].result, thresholds(of_code[code].snn.ranged)
    found, values = thresholds(result.ranged), learned(result)
    assert found.keys() == start.keys() and {f"{name}.tuned" for name in found} < values.keys()
    for name, theta in found.items():
        assert bool((theta > 0).all()) and torch.equal(theta, values[f"{name}.tuned"])
    assert any(not torch.allclose(found[name], start[name], rtol=1e-3) for name in found)
    assert any(found[name].numel() > start[name].numel() for name in found) or code == "rate"
    assert any(value.dim() and len(set(value.flatten().tolist())) > 1 for value in values.values())


@pytest.mark.parametrize("code", TICKING)
def test_queries_and_keys_keep_a_product_that_leaves_the_sum(code: str, of_code: dict[str, Tuned]) -> None:
    """Per channel or not: no count has to be decoded before its reader."""
    case = of_code[code]
    for snn in (case.snn, case.result):
        assert [d for d in facts(snn.graph_module).declined if d.rule == "scale_to_reader"] == []
    theta = thresholds(case.result.ranged)
    product = theta["mul_tensor"] * theta["transpose_int"].transpose(-1, -2)
    assert theta["mul_tensor"].shape == ((2, 1, 1) if code == "multi" else (2, 1, 8))
    assert torch.allclose(product, product[..., :1].expand_as(product), rtol=1e-6)


def test_one_stage_only(of_code: dict[str, Tuned]) -> None:
    result = fasfx.tune(of_code["multi"].snn, batches(), stages=("layer",), epochs=1)
    assert result.tuning is not None and list(result.tuning) == ["site", "module", "before", "layer"]
    values, start = learned(result), thresholds(of_code["multi"].snn.ranged)
    assert all(values[f"{name}.initial"].shape == () for name in start)
    ratios = [values[f"{name}.tuned"] / theta for name, theta in start.items()]
    assert all(torch.allclose(ratio, ratio.flatten()[0]) for ratio in ratios)


def test_tuning_goes_on_from_what_was_tuned(of_code: dict[str, Tuned]) -> None:
    before = of_code["rate"].result
    again = fasfx.tune(before, batches(), stages=("neuron",), epochs=1)
    assert before.tuning is not None and again.tuning is not None
    assert list(again.tuning.before) == pytest.approx(list(before.tuning.neuron), rel=1e-6)
    assert again.tuning.neuron.mean() <= again.tuning.before.mean()


def test_a_weight_on_spikes_makes_fewer_of_them(of_code: dict[str, Tuned]) -> None:
    snn = of_code["rate"].snn
    found = [fasfx.tune(snn, batches(), stages=("layer",), epochs=2, spikes=weight) for weight in (0.0, 10.0)]
    many, few = (float(s.count_spikes(**batches()[-1])[[1, 2, 3]].sum(axis=1).mean()) for s in found)
    assert few < 0.9 * many


@pytest.fixture
def bytes_kept() -> Iterator[list[int]]:
    """Bytes of every tensor that is kept for a gradient."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        yield sizes


def test_ticks_computed_again_give_the_same_gradients_and_keep_less(
    of_code: dict[str, Tuned], bytes_kept: list[int]
) -> None:
    ranged, gradients, kept = of_code["rate"].snn.ranged, [], []
    (taught,) = Lessons(ranged, None, batches(1))
    for recompute in (False, True):
        student = Student(ranged, per_channel, 1.0, 0.1, recompute)
        student.set_units([taught])
        bytes_kept.clear()
        loss, _ = student.loss(taught)
        kept.append(sum(bytes_kept))
        loss.backward()
        gradients.append([p.grad for p in (*student.scales, *student.shares)])
    assert all(map(torch.equal, *gradients)) and any(bool(gradient.any()) for gradient in gradients[0])
    assert kept[1] < 0.5 * kept[0]  # of three ticks


def test_tuning_recomputes_where_the_network_does(of_code: dict[str, Tuned], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    made = Student.__init__
    monkeypatch.setattr(Student, "__init__", lambda self, *given: asked.append(given[-1]) or made(self, *given))
    snn = fasfx.SpikingModel(of_code["multi"].snn.ranged)
    snn.gradient_checkpointing_enable()
    fasfx.tune(snn, batches(), stages=("layer",), epochs=0)
    assert asked == [True]


# --- teachers ---------------------------------------------------------------------------------------------


def test_the_second_teacher_is_asked_for_logits_only(of_code: dict[str, Tuned]) -> None:
    snn, other = of_code["multi"].snn, classifier(seed=1).train()

    def found(**options: Any) -> dict[str, Tensor]:
        return learned(fasfx.tune(snn, batches(), stages=("layer",), epochs=1, **options))

    assert_same(found(logits=0.0, teacher=other), found(logits=0.0))
    own, others = found(), found(teacher=other)
    same = found(teacher=of_code["multi"].model)  # whose logits are the first teacher's, up to float rounding
    assert max(float((same[name] - value).abs().max()) for name, value in own.items()) < 1e-5
    assert max(float((others[name] - value).abs().max()) for name, value in own.items()) > 1e-3
    assert other.training and all(p.grad is None for p in other.parameters())


def test_after_stage_one_the_teacher_is_what_it_trained_at_the_larger_t() -> None:
    qann = clipped(classifier().double(), SYNCHRONOUS.replace(code="rate", timesteps=6))
    with torch.no_grad():
        for name, scale in qann.named_parameters():
            if name.endswith("_log_scale"):
                scale.fill_(0.3)
    snn, batch = fasfx.convert(qann), batches()[-1]
    snn.timesteps = 4
    result = fasfx.tune(snn, batches(), stages=("layer",), epochs=1)
    wanted = values_of(qann._programs[1], batch)
    assert result.tuning is not None
    assert list(result.tuning.before) == pytest.approx(errors(transmitted(snn, batch), wanted), rel=1e-6)
    assert list(result.tuning.layer) == pytest.approx(errors(transmitted(result, batch), wanted), rel=1e-6)
    assert result.tuning.layer.mean() < result.tuning.before.mean()

    snn.timesteps = 9  # finer than it was trained for
    result = fasfx.tune(snn, batches(), stages=("layer",), epochs=0)
    wanted = values_of(Runner([Clip()]).run(snn.ranged), batch)
    assert result.tuning is not None
    assert list(result.tuning.before) == pytest.approx(errors(transmitted(snn, batch), wanted), rel=1e-6)


# --- what cannot be tuned ---------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_what_cannot_be_tuned_is_refused(of_code: dict[str, Tuned], bert: GraphModule) -> None:
    snn = of_code["multi"].snn
    for stages in ((), ("layer", "network"), ("",)):
        with pytest.raises(ConfigError, match="choose one or more of 'layer', 'neuron'"):
            fasfx.tune(snn, batches(), stages=stages)
    with pytest.raises(CalibrationError, match="1 batches: tuning needs two"):
        fasfx.tune(snn, batches(1))
    with pytest.raises(ConfigError, match='schedule = "synchronous"'):
        fasfx.tune(fasfx.SpikingModel(bert), batches())
    dynamic = fasfx.convert(Plain(), [torch.randn(8, 6)], SYNCHRONOUS.replace(granularity="token"))
    with pytest.raises(ConfigError, match="computed row by row"):
        fasfx.tune(dynamic, [{"x": torch.randn(8, 6)}] * 2)


# --- progress on disk -------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_values_of_lessons_are_not_kept(of_code: dict[str, Tuned]) -> None:
    """A large network's site values are gigabytes per batch: they are worked out again instead of kept."""
    lessons = Lessons(of_code["multi"].snn.ranged, None, batches(3))
    assert len(lessons) == 3
    alive = []
    for taught in lessons:
        alive.append(weakref.ref(next(iter(taught.values.values()))))
        del taught
        assert sum(value() is not None for value in alive) == 0
    first, again = ([*lesson.values.values()] for lesson in (next(iter(lessons)), next(iter(lessons))))
    assert all(map(torch.equal, first, again))


def killed_at(stage: str, step: int) -> Callable[[str, int, int | None], None]:
    def report(name: str, done: int, total: int | None) -> None:
        if name == f"tune, {stage}" and done >= step:
            raise Killed

    return report


def test_a_killed_tuning_goes_on_where_it_was(of_code: dict[str, Tuned], tmp_path: Path) -> None:
    """Twice killed: in the second epoch of three batches of either stage."""
    case = of_code["multi"]
    for stage in ("layer", "neuron"):
        with pytest.raises(Killed):
            fasfx.tune(case.snn, batches(), epochs=2, folder=tmp_path / "kept", progress=killed_at(stage, 5))
        assert [file.name for file in (tmp_path / "kept").iterdir()] == [FILE]
    seen: list[tuple[str, int]] = []
    result = fasfx.tune(
        case.snn,
        batches(),
        epochs=2,
        folder=tmp_path / "kept",
        progress=lambda name, done, _: seen.append((name, done)),
    )
    assert seen == [("tune, neuron", done) for done in (4, 5, 6)]
    assert_same(learned(result), learned(case.result))
    assert result.tuning is not None and result.tuning.equals(case.result.tuning)
    assert [file.name for file in (tmp_path / "kept").iterdir()] == [FILE]  # the caller's to remove
    forget(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_progress_of_other_options_is_not_taken_up(of_code: dict[str, Tuned], tmp_path: Path) -> None:
    snn = of_code["multi"].snn
    with pytest.raises(Killed):
        fasfx.tune(snn, batches(), epochs=2, folder=tmp_path, progress=killed_at("layer", 4))
    kept = (tmp_path / FILE).read_bytes()
    for options in ({"stages": ("layer",)}, {"logits": 0.0}, {"spikes": 1.0}):
        with pytest.raises(CheckpointError, match="progress of other work: delete it"):
            fasfx.tune(snn, batches(), epochs=2, folder=tmp_path, **options)
    with pytest.raises(CheckpointError, match="progress of other work"):
        fasfx.tune(of_code["rate"].snn, batches(), epochs=2, folder=tmp_path)
    assert (tmp_path / FILE).read_bytes() == kept


def test_saved_keeps_plain_data_and_tensors(tmp_path: Path) -> None:
    recipe, state = {"lr": 0.1, "stages": ["a"]}, {"epoch": 3, "now": {"x": torch.randn(3)}}
    saved = Saved(tmp_path / "new" / "folder", recipe)
    assert saved.load() == {}
    saved.save({"epoch": 2})
    saved.save(state)
    found = Saved(tmp_path / "new" / "folder", dict(reversed(recipe.items()))).load()
    assert found["epoch"] == 3 and torch.equal(found["now"]["x"], state["now"]["x"])  # type: ignore[index]
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == [FILE]
    with pytest.raises(CheckpointError, match="progress of other work"):
        Saved(tmp_path / "new" / "folder", recipe | {"lr": 0.2}).load()
    forget(tmp_path / "new" / "folder")
    assert saved.load() == {}
    nowhere = Saved(None, recipe)
    nowhere.save(state)
    assert nowhere.load() == {}


class Code:
    def __reduce__(self) -> Any:
        return (exit, ())


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-50]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no progress"),
    "code": lambda file: torch.save({"recipe": "{}", "state": Code()}, file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    saved = Saved(tmp_path, {})
    saved.save({"now": torch.randn(100)})
    DAMAGES[damage](tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"(?s)cannot be read.*delete it to begin anew"):
        saved.load()


# --- after tuning -----------------------------------------------------------------------------------------


def test_another_t_warns_after_tuning_and_not_before(of_code: dict[str, Tuned]) -> None:
    case = of_code["rate"]
    plain, tuned = (fasfx.SpikingModel(snn.ranged) for snn in (case.snn, case.result))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.timesteps = 5
        tuned.timesteps = 3  # what it is already
        tuned.schedule = "sequential"
        tuned.schedule = "synchronous"
    with pytest.warns(UserWarning, match="were tuned for T = 3 and stay as they are; fasfx.tune at T = 5"):
        tuned.timesteps = 5
    assert_same(learned(tuned), learned(case.result))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.timesteps = 3
    assert torch.equal(tuned(**batches()[0]).logits, case.result(**batches()[0]).logits)
    assert plain.timesteps == 5 and facts(fasfx.tune(plain, batches(), ("layer",), epochs=0).ranged).tuned == 5


@pytest.mark.parametrize("code", TICKING)
def test_a_tuned_network_survives_a_checkpoint(code: str, of_code: dict[str, Tuned], tmp_path: Path) -> None:
    result = of_code[code].result
    result.save_pretrained(tmp_path)
    again = fasfx.SpikingModel.from_pretrained(tmp_path)
    assert_same(learned(again), learned(result))
    assert torch.equal(again(**batches()[0]).logits, result(**batches()[0]).logits)
    assert again.tuning is not None and again.tuning.equals(result.tuning)
    with pytest.warns(UserWarning, match=f"tuned for T = {result.timesteps}"):
        again.timesteps = 7


def test_a_tuned_network_runs_in_onnx_runtime(of_code: dict[str, Tuned], tmp_path: Path) -> None:
    case = of_code["multi"]
    case.result.to_onnx(tmp_path)
    found = fasfx.runtime.OnnxModel(tmp_path, threads=1)(**batches()[0]).logits
    expected = case.result(**batches()[0]).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(case.outputs, expected, atol=1e-2)
