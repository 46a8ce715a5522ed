"""SpikingModel under the synchronous schedule: states, gradients, refusals, threads, memory, the report."""

import copy
import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasfx
from fasfx.difference import main_output
from fasfx.errors import ConfigError, InputError
from fasfx.program import facts
from fasfx.runtime.spikes import SpikeTrain
from fasfx.tools.bench.models import tiny, tiny_inputs

SYNCHRONOUS = fasfx.SpikeConfig.low_latency(timesteps=4)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.norm(x)))) + x


def small(config: fasfx.SpikeConfig = SYNCHRONOUS) -> fasfx.SpikingModel:
    """One neuron for each value that enters a linear layer, no more."""
    torch.manual_seed(0)
    return fasfx.convert(Small().eval(), [{"x": torch.randn(4, 6, 8)}], config.replace(nonlinear="exact"))


@pytest.fixture(scope="module")
def snn() -> fasfx.SpikingModel:
    return small()


@pytest.fixture(scope="module")
def bert() -> fasfx.SpikingModel:
    return fasfx.convert(tiny("bert"), [tiny_inputs("bert")], SYNCHRONOUS)


# --- state -----------------------------------------------------------------------------------------------


def test_state_has_the_shapes_of_the_inputs_and_moves(snn: fasfx.SpikingModel) -> None:
    state = snn.state(x=torch.randn(3, 6, 8))
    assert sorted(tuple(v.shape) for v in state.sent.values()) == [(3, 6, 8), (3, 6, 16)]
    assert state.nbytes == 4 * 3 * 6 * 24 and state.ticks == 0
    _, after = snn.step(state, x=torch.randn(3, 6, 8))
    assert after.ticks == 1 and state.ticks == 0
    assert all(not value.any() for value in state.sent.values())  # a step changes nothing it is given
    assert any(value.any() for value in after.sent.values())
    copied = after.clone()
    assert all(torch.equal(a, b) and a is not b for a, b in zip(copied.sent.values(), after.sent.values(), strict=True))
    assert all(value.dtype == torch.float64 for value in after.to(torch.float64).sent.values())
    assert all(not value.any() for value in after.reset().sent.values()) and after.reset().ticks == 0


@pytest.mark.parametrize("family", ["bert", "vit", "t5"])
def test_state_shapes_follow_batch_and_length(family: str) -> None:
    extra = {"use_cache": False} if family == "t5" else {}
    snn = fasfx.convert(tiny(family), [tiny_inputs(family) | extra], SYNCHRONOUS)
    for size, length in ((1, 3), (5, 7)):
        batch = tiny_inputs(family, batch_size=size, length=length)
        _, after = snn.step(snn.state(**batch), **batch)
        begun = snn.state(**batch)
        assert {k: v.shape for k, v in begun.sent.items()} == {k: v.shape for k, v in after.sent.items()}


def test_inputs_may_change_from_tick_to_tick(snn: fasfx.SpikingModel) -> None:
    before, x = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    _, state = snn.step(snn.state(x=before), x=before)
    for _ in range(20):
        output, state = snn.step(state, x=x)
    settled = list(_with_steps(snn, 20).ticks(x=x))[-1]
    assert torch.allclose(output, settled, atol=1e-4)


def _with_steps(snn: fasfx.SpikingModel, steps: int) -> fasfx.SpikingModel:
    other = fasfx.SpikingModel(snn.ranged)
    other.timesteps = steps
    return other


# --- running ---------------------------------------------------------------------------------------------


def test_outputs_have_the_original_type_at_every_tick(bert: fasfx.SpikingModel) -> None:
    batch = tiny_inputs("bert", batch_size=1, length=3)
    outputs = list(bert.ticks(**batch))
    assert len(outputs) == 4
    assert all(type(output).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions" for output in outputs)
    assert torch.equal(outputs[-1].last_hidden_state, bert(**batch).last_hidden_state)


@pytest.mark.parametrize("code", ["multi", "rate"])
def test_a_step_graph_is_as_spike_driven_as_its_neurons(code: str) -> None:
    """Spikes over ticks is one factor for the network: no float operator, and what carries it is spikes."""
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    found = fasfx.convert(module, [{"input": torch.randn(4, 8)}], SYNCHRONOUS.replace(code=code)).coverage
    assert found.spike_driven_macs == 1 and found.float_operators == []


def test_ticks_until_stops_when_the_output_settles(snn: fasfx.SpikingModel) -> None:
    deep, x = _with_steps(snn, 30), torch.randn(2, 6, 8)
    found = deep.ticks_until(0.01, x=x)
    assert found.settled and 2 < found.ticks < 30 and found.change <= 0.01
    outputs = list(deep.ticks(x=x))
    assert torch.equal(found.output, outputs[found.ticks - 1])
    assert not snn.ticks_until(1e-9, x=x).settled
    with pytest.raises(ConfigError, match="tolerance"):
        snn.ticks_until(0, x=x)


def test_a_sequential_network_has_no_ticks() -> None:
    snn = small(fasfx.SpikeConfig())
    with pytest.raises(ConfigError, match="synchronous"):
        snn.ticks(x=torch.randn(1, 6, 8))
    with pytest.raises(ConfigError, match="closed"):
        snn.to_onnx("nowhere", form="step")
    snn.schedule = "synchronous"
    assert len(list(snn.ticks(x=torch.randn(1, 6, 8)))) == snn.timesteps


def test_schedule_and_t_survive_a_checkpoint(snn: fasfx.SpikingModel, tmp_path: Any) -> None:
    snn.save_pretrained(tmp_path)
    again = fasfx.SpikingModel.from_pretrained(tmp_path)
    x = torch.randn(2, 6, 8)
    assert again.schedule == "synchronous" and torch.equal(again(x=x), snn(x=x))


def test_radix_has_no_synchronous_schedule() -> None:
    with pytest.raises(ConfigError, match="'multi', 'rate'"):
        fasfx.SpikeConfig(code="radix", schedule="synchronous")


def test_dynamic_thresholds_tick_too() -> None:
    snn = small(SYNCHRONOUS.replace(granularity="token", timesteps=10))
    x = 100 * torch.randn(2, 6, 8)  # far beyond the calibration
    torch.manual_seed(0)
    assert torch.allclose(snn(x=x), Small().eval()(x), rtol=0.01, atol=0.05)
    for train in snn.spikes(x=x).values():
        assert train.events.shape[0] == 10 and bool(train.decode().isfinite().all())


# --- rows that move --------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Picks the rows with the largest score: which ones, values decide."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.score, self.expert = how, nn.Linear(8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)[..., 0]
        if self.how == "gather":
            index = score.topk(2, dim=-1).indices
            return self.expert(x.gather(1, index[..., None].expand(-1, -1, 8)))
        if self.how == "index":
            return self.expert(x[:, score.sum(0).argsort()])
        return self.expert(x.sort(dim=1).values)


@pytest.mark.parametrize("how", ["gather", "index", "sort"])
def test_rows_placed_by_values_are_refused(how: str) -> None:
    batch = {"x": torch.randn(4, 6, 8)}
    fasfx.convert(Routed(how).eval(), [batch])  # sequentially there is nothing to keep
    with pytest.raises(ConfigError, match=r"keep their place(.|\n)*test_ticks.py:\d+ in forward"):
        fasfx.convert(Routed(how).eval(), [batch], SYNCHRONOUS)


def test_rows_placed_by_inputs_alone_are_kept() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.b(self.a(x).gather(1, index[..., None].expand(-1, -1, 8)))

    batch = {"x": torch.randn(4, 6, 8), "index": torch.tensor([[3, 1, 2]]).repeat(4, 1)}
    snn = fasfx.convert(Picks().eval(), [batch], SYNCHRONOUS)
    assert snn(**batch).shape == (4, 3, 8)


# --- gradients -------------------------------------------------------------------------------------------


def test_gradients_flow_through_ticks_and_checkpointing_gives_the_same(snn: fasfx.SpikingModel) -> None:
    x = torch.randn(2, 6, 8)
    found = []
    for recompute in (False, True):
        (snn.gradient_checkpointing_enable if recompute else snn.gradient_checkpointing_disable)()
        leaf = x.clone().requires_grad_()
        sum(output.square().sum() for output in snn.ticks(x=leaf)).backward()
        found.append(leaf.grad)
    snn.gradient_checkpointing_disable()
    assert torch.equal(*found) and bool(found[0].any())
    leaf = x.clone().requires_grad_()
    torch.manual_seed(0)
    original = Small().eval()
    (4 * original(leaf).square().sum()).backward()
    assert torch.nn.functional.cosine_similarity(found[0].flatten(), leaf.grad.flatten(), 0) > 0.9


def test_recomputing_keeps_less(snn: fasfx.SpikingModel) -> None:
    def kept(recompute: bool) -> int:
        sizes: list[int] = []
        (snn.gradient_checkpointing_enable if recompute else snn.gradient_checkpointing_disable)()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            snn(x=torch.randn(2, 6, 8, requires_grad=True))
        snn.gradient_checkpointing_disable()
        return sum(sizes)

    assert kept(True) < kept(False) / 2


# --- many calls ------------------------------------------------------------------------------------------


def test_a_thousand_calls_leave_nothing_behind(snn: fasfx.SpikingModel) -> None:
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, 6, 8)
    with torch.no_grad():
        expected = snn(x=probe)
        gc.collect()
        before = sum(isinstance(o, Tensor) for o in gc.get_objects())
        for call in range(1000):
            size = int(torch.randint(1, 30, (), generator=generator))
            steps = snn.ticks(x=torch.randn(size, 6, 8, generator=generator))
            next(steps)
            if call % 3:  # a third of the calls is given up half way
                list(steps)
        del steps
        gc.collect()
        assert sum(isinstance(o, Tensor) for o in gc.get_objects()) <= before
        assert torch.equal(snn(x=probe), expected)


def test_two_threads_get_their_own_answers(snn: fasfx.SpikingModel) -> None:
    inputs = [torch.randn(size, 6, 8) for size in (2, 5)]
    with torch.no_grad():
        expected = [snn(x=x) for x in inputs]
    wrong: list[int] = []

    def work(which: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(snn(x=inputs[which]), expected[which]):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- the report ------------------------------------------------------------------------------------------


def test_check_tells_error_and_spikes_by_tick(bert: fasfx.SpikingModel, tmp_path: Any) -> None:
    batches = [tiny_inputs("bert", seed=seed) for seed in range(2)]
    found = fasfx.check(tiny("bert"), bert, batches, timesteps=(6, 1, 3))
    assert list(found.table["timesteps"]) == [1, 3, 6] and bert.timesteps == 4
    assert found.table["relative_l2"].is_monotonic_decreasing
    assert found.table["spikes"].is_monotonic_increasing and found.table["spikes"].iloc[0] <= _most(bert)
    bert.timesteps = 3
    one = fasfx.check(tiny("bert"), bert, batches, timesteps=(3,))
    bert.timesteps = 4
    assert one.table["relative_l2"].iloc[0] == found.table["relative_l2"].iloc[1]
    tolerance = float(found.table["relative_l2"].iloc[1])
    assert found.latency(tolerance) == {"timesteps": 3, "ticks": 3}
    assert found.latency(0.0) is None
    found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def _most(snn: fasfx.SpikingModel) -> float:
    """Neurons per value: none sends more than one spike a tick."""
    values = snn.count_spikes(**tiny_inputs("bert"))["values"]
    neurons = sum(facts(snn.ranged).sites[site].population * count for site, count in values.items())
    return float(neurons / values.sum())


def test_sequential_latency_is_depth_times_t(bert: fasfx.SpikingModel) -> None:
    other = fasfx.SpikingModel(bert.ranged)
    other.schedule = "sequential"
    found = fasfx.check(tiny("bert"), other, [tiny_inputs("bert")], timesteps=(2, 4))
    assert found.latency(1.0) == {"timesteps": 2, "ticks": 2 * other.latency_ticks["sequential"] // 4}


def test_count_spikes_counts_what_spikes_has(bert: fasfx.SpikingModel) -> None:
    batch = tiny_inputs("bert")
    frame = bert.count_spikes(**batch)
    trains = bert.spikes(**batch)
    assert list(frame.index) == list(trains) and list(frame.columns) == [1, 2, 3, 4, "values"]
    for site, train in trains.items():
        sent = (train.events != 0).view(4, -1).sum(1)  # two neurons' spikes of a step together
        assert frame.loc[site, "values"] == train.events[0].numel()
        assert (frame.loc[site, [1, 2, 3, 4]] * frame.loc[site, "values"]).round().tolist() == sent.tolist()


def test_raster_draws_and_refuses_nothing(bert: fasfx.SpikingModel, tmp_path: Any) -> None:
    trains = bert.spikes(**tiny_inputs("bert"))
    figure = fasfx.runtime.raster(trains, tmp_path / "raster.png")
    assert len([axis for axis in figure.axes if axis.get_visible()]) == 6
    assert (tmp_path / "raster.png").stat().st_size > 1000
    empty = SpikeTrain(torch.zeros(4, 9, dtype=torch.int8), torch.ones(()), "rate", 1)
    fasfx.runtime.raster({"silent": empty})
    with pytest.raises(InputError, match="nothing to draw"):
        fasfx.runtime.raster({})


# --- ONNX ------------------------------------------------------------------------------------------------


def test_loop_and_step_form_of_a_language_model(tmp_path: Any) -> None:
    snn = fasfx.convert(tiny("llama"), [tiny_inputs("llama") | {"use_cache": False}], SYNCHRONOUS)
    snn.to_onnx(tmp_path / "loop")
    snn.to_onnx(tmp_path / "step", form="step")
    loop, step = (fasfx.runtime.OnnxModel(tmp_path / form) for form in ("loop", "step"))
    with pytest.raises(ConfigError, match="step form"):
        loop.ticks(**tiny_inputs("llama"))
    for timesteps in (0, -1, 2.5):
        with pytest.raises(ConfigError, match="at least 1"):
            loop(timesteps=timesteps, **tiny_inputs("llama"))
    for size, length in ((1, 2), (3, 11)):
        batch = tiny_inputs("llama", batch_size=size, length=length)
        with torch.no_grad():
            expected = [main_output(output) for output in snn.ticks(**batch)]
        streamed = [main_output(output) for output in step.ticks(**batch)]
        assert len(streamed) == len(expected)
        for found, wanted in zip([*streamed, main_output(loop(**batch))], [*expected, expected[-1]], strict=True):
            assert torch.allclose(found, wanted, atol=0.02 * float(wanted.abs().max()))  # single spikes may differ
        assert torch.equal(main_output(step(timesteps=2, **batch)), streamed[1])


def test_a_sequential_export_has_a_fixed_t(tmp_path: Any) -> None:
    small(fasfx.SpikeConfig()).to_onnx(tmp_path)
    with pytest.raises(ConfigError, match="fixed T"):
        fasfx.runtime.OnnxModel(tmp_path)(timesteps=3, x=torch.randn(1, 6, 8))


# --- corners ---------------------------------------------------------------------------------------------


class Unit(nn.Module):
    """Rows of unit length without an epsilon: 0 / 0 before the first spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h / h.square().sum(-1, keepdim=True).sqrt())


@pytest.mark.parametrize("code", ["multi", "rate"])
def test_nothing_over_nothing_is_not_remembered(code: str) -> None:
    module, x = Unit().eval(), torch.randn(4, 8)
    snn = fasfx.convert(module, [{"x": x}], SYNCHRONOUS.replace(code=code, timesteps=300 if code == "rate" else 12))
    x = x.clone()
    x[0] /= 50  # sends nothing for a while
    assert torch.allclose(snn(x=x)[1:], module(x)[1:], atol=0.1)
    assert bool(snn(x=x).isfinite().all())


def test_large_finite_masks_of_whole_rows() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, mask)

    x, mask = torch.randn(2, 5, 8), torch.zeros(2, 5, 5)
    for schedule, code, steps in (("sequential", "radix", 8), ("synchronous", "multi", 12)):
        config = fasfx.SpikeConfig(code=code, timesteps=steps, schedule=schedule, levels=16)
        snn = fasfx.convert(Masked(), [{"x": x, "mask": mask}], config)
        for low in (-1e9, torch.finfo(torch.float32).min):
            hard = mask.clone()
            hard[0] = low
            assert torch.allclose(snn(x=x, mask=hard), Masked()(x, hard), atol=0.05)


def test_a_network_without_sites_is_exported(tmp_path: Any) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu() + 1

    x = torch.randn(2, 8)
    snn = fasfx.convert(Plain(), [{"x": x}], SYNCHRONOUS)
    for form in ("loop", "step"):
        snn.to_onnx(tmp_path / form, form=form)
        assert torch.allclose(fasfx.runtime.OnnxModel(tmp_path / form)(x=x), x.relu() + 1)


def test_states_that_do_not_fit_and_copies(snn: fasfx.SpikingModel) -> None:
    x = torch.randn(3, 6, 8)
    state = snn.state(x=x)
    turned = fasfx.runtime.NetworkState(dict(reversed(state.sent.items())))
    assert torch.equal(snn.step(turned, x=x)[0], snn.step(state, x=x)[0])
    for wrong in (snn.state(x=x[:1]), fasfx.runtime.NetworkState({})):
        with pytest.raises(InputError, match="state of site"):
            snn.step(wrong, x=x)
    assert torch.equal(copy.deepcopy(snn)(x=x), snn(x=x))


class Timed(nn.Module):
    """Has an input of the name that T has in an export."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.a(x + timesteps)


def test_exports_that_cannot_be_are_refused(tmp_path: Any) -> None:
    batch = {"x": torch.randn(4, 8), "timesteps": torch.randn(4, 8)}
    with pytest.raises(ConfigError, match="rename"):
        fasfx.convert(Timed(), [batch], SYNCHRONOUS).to_onnx(tmp_path / "timed")
    fine = small(SYNCHRONOUS.replace(levels=24))
    with pytest.raises(ConfigError, match='form="step"'):
        fine.to_onnx(tmp_path / "fine")
    fine.to_onnx(tmp_path / "step", form="step")
    model, x = fasfx.runtime.OnnxModel(tmp_path / "step"), torch.randn(2, 6, 8)
    assert torch.allclose(model(x=x), fine(x=x), atol=1e-5)
    with pytest.raises(ConfigError, match="at least 1"):
        model(timesteps=0, x=x)
    with pytest.raises(InputError, match="rank"):
        model(x=x[0])


def test_rows_of_zeros_have_a_dynamic_threshold() -> None:
    snn = small(SYNCHRONOUS.replace(granularity="token", levels=24))
    x = torch.randn(2, 6, 8)
    x[0, 0] = 0
    assert bool(snn(x=x).isfinite().all())


@pytest.mark.parametrize("schedule", ["sequential", "synchronous"])
def test_check_refuses_what_is_no_t_before_any_work(schedule: str) -> None:
    snn = small(fasfx.SpikeConfig(schedule=schedule))
    with pytest.raises(ConfigError, match="timesteps=0"):
        fasfx.check(Small(), snn, [{"x": torch.randn(2, 6, 8)}], timesteps=(3, 0))
    with pytest.raises(InputError, match="timesteps is empty"):
        fasfx.check(Small(), snn, [{"x": torch.randn(2, 6, 8)}], timesteps=())


@pytest.mark.parametrize("schedule", ["sequential", "synchronous"])
def test_check_of_a_network_without_neurons(schedule: str) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    batch = {"x": torch.randn(2, 8)}
    snn = fasfx.convert(Plain(), [batch], fasfx.SpikeConfig(schedule=schedule))
    found = fasfx.check(Plain(), snn, [batch], timesteps=(1, 2)).table
    assert list(found["relative_l2"]) == [0, 0] and list(found["spikes"]) == [0, 0]


def test_a_sequential_export_may_have_an_input_called_timesteps(tmp_path: Any) -> None:
    batch = {"x": torch.randn(4, 8), "timesteps": torch.randn(4, 8)}
    snn = fasfx.convert(Timed(), [batch])
    snn.to_onnx(tmp_path)
    assert torch.allclose(fasfx.runtime.OnnxModel(tmp_path)(**batch), snn(**batch), atol=1e-5)
