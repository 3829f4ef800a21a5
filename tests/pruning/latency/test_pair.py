"""Latency: the statistics against known series, the measuring against sessions with a known clock."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.export.check import measure_export
from paretoprune.pruning.latency.group import measure_group
from paretoprune.pruning.latency.pair import USEFUL_HALFWIDTH, PairedTimes, measure_pair, time_pair
from paretoprune.pruning.latency.runtimes import open_session
from paretoprune.pruning.latency.statistics import (
    SESSION_SD,
    Quad,
    Speedup,
    agree,
    block_length_ms,
    inferences_per_block,
    is_steady,
    neighbours_correlation,
    speedup,
    with_session_variance,
)
from tests.pruning.recovery_material import fresh_yolov8n, same_weights, weights
from tests.pruning.tiny import tiny_model

pytestmark = pytest.mark.slow


def quads_of(candidate_ms: float, baseline_ms: float, slowness: Callable[[int], float], count: int) -> list[Quad]:
    """Quads of one inference a block; `slowness` is the factor on the time at each of the 4 x count positions."""
    return [
        Quad(
            ((candidate_ms * slowness(4 * i),), (candidate_ms * slowness(4 * i + 3),)),
            ((baseline_ms * slowness(4 * i + 1),), (baseline_ms * slowness(4 * i + 2),)),
        )
        for i in range(count)
    ]


def quads_of_speedups(speedups: np.ndarray) -> list[Quad]:
    """Quads of one inference a block with exactly these speed-ups."""
    return [Quad(((4.0,), (4.0,)), ((4.0 * value,), (4.0 * value,))) for value in speedups.tolist()]


def autoregression(correlation: float, count: int, generator: np.random.Generator) -> np.ndarray:
    """A stationary first-order autoregression of mean 0 and standard deviation 1."""
    values = [generator.normal()]
    for innovation in generator.normal(size=count - 1):
        values.append(correlation * values[-1] + math.sqrt(1 - correlation**2) * innovation)
    return np.array(values)


class TestStatistics:
    def test_linear_drift_cancels_exactly(self) -> None:
        result = speedup(quads_of(4.0, 10.0, lambda position: 1 + 0.05 * position, 20))
        assert result.value == pytest.approx(2.5, rel=1e-12)
        assert result.halfwidth < 1e-9

    def test_noise_is_covered_about_as_often_as_promised(self) -> None:
        generator = np.random.default_rng(0)

        def contains() -> bool:
            noise = np.exp(0.03 * generator.standard_t(3, size=100))
            result = speedup(quads_of(4.0, 6.0, lambda position: float(noise[position]), 25))
            return result.low <= 1.5 <= result.high

        assert sum(contains() for _ in range(200)) >= 184  # 92 %: three standard errors below 97 %

    @pytest.mark.parametrize(("correlation", "at_least"), [(0.0, 0.93), (0.3, 0.92), (0.6, 0.90)])
    def test_noise_that_lasts_over_several_quads_is_covered(self, correlation: float, at_least: float) -> None:
        """Oracle: a first-order autoregression of known mean, simulated; the plain block bootstrap had 0.85 to 0.9."""
        generator = np.random.default_rng(7)
        covered, agreed, results = 0, 0, []
        for _ in range(300):
            drift = autoregression(correlation, 48, generator)
            results.append(speedup(quads_of_speedups(1.5 * np.exp(0.02 * drift))))
            covered += results[-1].low <= 1.5 <= results[-1].high
        agreed = sum(agree(one, other) for one, other in zip(results[::2], results[1::2], strict=True))
        assert covered >= at_least * 300
        assert agreed >= at_least * 150

    @pytest.mark.parametrize("correlation", [0.0, 0.4, 0.8])
    def test_the_correlation_of_neighbours_is_found(self, correlation: float) -> None:
        generator = np.random.default_rng(3)
        found = [neighbours_correlation(autoregression(correlation, 60, generator)) for _ in range(200)]
        assert float(np.mean(found)) == pytest.approx(correlation, abs=0.08)

    def test_a_longer_memory_widens_the_interval(self) -> None:
        generator = np.random.default_rng(5)
        halfwidths = []
        for correlation in (0.0, 0.8):
            drift = autoregression(correlation, 100, generator)
            halfwidths.append(speedup(quads_of_speedups(np.exp(0.02 * drift / drift.std()))).halfwidth)
        # The standard error of a mean of such a series is sqrt((1 + r) / (1 - r)) = 3 times that of independent values
        assert halfwidths[1] > 2 * halfwidths[0]

    def test_sessions_differ_by_more_than_one_session_shows(self) -> None:
        narrow = with_session_variance(Speedup(2.0, 2.0, 2.0))
        assert math.log(narrow.high / 2.0) == pytest.approx(1.96 * SESSION_SD, rel=1e-3)
        assert math.log(2.0 / narrow.low) == pytest.approx(1.96 * SESSION_SD, rel=1e-3)
        wide = with_session_variance(Speedup(2.0, 1.0, 4.0))
        assert (wide.low, wide.high) == pytest.approx((1.0, 4.0), rel=1e-3)
        unknown = Speedup(2.0, 0.0, math.inf)
        assert with_session_variance(unknown) == unknown

    def test_two_measurements_agree_or_not(self) -> None:
        assert agree(Speedup(1.50, 1.48, 1.52), Speedup(1.52, 1.50, 1.54))
        assert not agree(Speedup(1.50, 1.49, 1.51), Speedup(1.60, 1.59, 1.61))
        assert not agree(Speedup(1.50, 1.48, 1.52), Speedup(1.535, 1.515, 1.555)), "they overlap, and differ"
        assert agree(Speedup(1.0, 0.0, math.inf), Speedup(9.0, 8.9, 9.1)), "knows nothing"

    def test_swapping_the_models_inverts_the_figure(self) -> None:
        noise = np.exp(0.1 * np.random.default_rng(1).normal(size=64))
        there = quads_of(4.0, 6.0, lambda position: float(noise[position]), 16)
        back = [Quad(quad.baseline, quad.candidate) for quad in there]
        a, b = speedup(there), speedup(back)
        assert a.value == pytest.approx(1 / b.value, rel=1e-12)
        assert (a.low, a.high) == pytest.approx((1 / b.high, 1 / b.low), rel=0.02)

    def test_an_interrupted_quad_does_not_move_it(self) -> None:
        calm = quads_of(5.0, 5.0, lambda _: 1.0, 16)
        calm[3] = Quad(((500.0,), (500.0,)), ((5.0,), (5.0,)))
        assert speedup(calm).value == pytest.approx(1.0)

    def test_more_quads_narrow_the_interval(self) -> None:
        noise = np.exp(0.05 * np.random.default_rng(2).normal(size=800))
        few, many = (speedup(quads_of(5.0, 5.0, lambda p: float(noise[p]), n)).halfwidth for n in (12, 200))
        assert many < few / 2

    def test_same_seed_same_interval(self) -> None:
        quads = quads_of(4.0, 6.0, lambda position: 1 + 0.1 * math.sin(position), 16)
        assert speedup(quads, seed=3) == speedup(quads, seed=3)

    def test_one_quad_says_that_it_knows_nothing(self) -> None:
        assert speedup(quads_of(4.0, 6.0, lambda _: 1.0, 1)).halfwidth == math.inf

    @pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
    def test_impossible_times_are_refused(self, bad: float) -> None:
        with pytest.raises(ValueError, match="positive and finite"):
            speedup(quads_of(bad, 5.0, lambda _: 1.0, 4))

    def test_no_quads_are_refused(self) -> None:
        with pytest.raises(ValueError, match="at least one quad"):
            speedup([])

    def test_settled(self) -> None:
        assert not is_steady([10.0] * 9)
        assert is_steady([10.0] * 10)
        assert not is_steady([30 - i for i in range(10)])
        assert is_steady([100.0, 60.0, 30.0] + [10.0] * 10)
        assert is_steady([10.0] * 5 + [11.0] * 5)  # slower is not a warm-up

    def test_block_length(self) -> None:
        assert [inferences_per_block([ms]) for ms in (500.0, 20.0, 5.0, 0.001)] == [1, 1, 4, 200]
        assert inferences_per_block([5.0, 25.0, 40.0]) == 4  # the others were interrupted


class FakeTime:
    """A clock that only the fake models move; `order` is the sequence of their inferences."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.order = ""

    def clock(self) -> float:
        return self.now_s


class Constant:
    """A session whose every inference takes the same time, as it says."""

    threads, precision, version = 1, "fp32", ""

    def __init__(self, ms: float) -> None:
        self._ms = ms

    def time_ms(self) -> float:
        return self._ms


CONSTANT = {"fast": Constant(30.0), "slow": Constant(45.0)}


class FakeSession:
    def __init__(self, world: FakeTime, name: str, time_ms: Callable[[int], float]) -> None:
        self.world, self.name, self._time_ms, self.runs = world, name, time_ms, 0

    def time_ms(self) -> float:
        took = self._time_ms(self.runs)
        self.runs += 1
        self.world.order += self.name
        self.world.now_s += took / 1e3
        return took


def by_pair(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("paretoprune.pruning.latency.pair.open_session", lambda model, *_: CONSTANT[model])
    return measure_pair("fast", "slow", 64, threads=1).to_dict()["speedup_ci95"]  # type: ignore[arg-type]


def by_group(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("paretoprune.pruning.latency.group.open_session", lambda model, *_: CONSTANT[model])
    found = measure_group({"base": "slow", "new": "fast"}, "base", 64)  # type: ignore[dict-item]
    assert found["base"]["speedup_ci95"] == [1.0, 1.0]  # over itself, by definition
    assert found["new"]["over"]["base"][1:] == found["new"]["speedup_ci95"]
    return found["new"]["speedup_ci95"]


def by_export(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("paretoprune.pruning.export.check.Backend", lambda path, *_: CONSTANT[path])
    return measure_export("fast", "slow", 64).to_dict()["speedup_ci95"]


@pytest.mark.parametrize("by", [by_pair, by_group, by_export])
def test_the_interval_means_the_same_whoever_measures(by: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of times without any noise there is left what sessions differ by: the interval of a measurement another day."""
    low, high = by(monkeypatch)
    assert (low, high) == pytest.approx((1.5 * math.exp(-1.959964 * SESSION_SD), 1.5 * math.exp(1.959964 * SESSION_SD)))


class TestMeasuring:
    def test_steady_models_end_early_with_the_exact_ratio(self) -> None:
        world = FakeTime()
        a, b = FakeSession(world, "A", lambda _: 30.0), FakeSession(world, "B", lambda _: 45.0)
        times = time_pair(a, b, max_seconds=100, target_halfwidth=0.01, clock=world.clock)
        assert times.converged
        assert times.speedup.value == pytest.approx(1.5)
        assert len(times.quads) == 24
        assert world.now_s < 10

    def test_blocks_alternate_and_the_first_after_a_change_is_not_counted(self) -> None:
        world = FakeTime()
        a, b = FakeSession(world, "A", lambda _: 30.0), FakeSession(world, "B", lambda _: 45.0)
        times = time_pair(a, b, max_seconds=100, target_halfwidth=0.01, clock=world.clock)
        timed = world.order[2 * times.warmup_iterations :]
        assert timed == "A" + "ABBBAA" * 24
        assert len(times.all_ms("candidate")) == len(times.all_ms("baseline")) == 48

    def test_noisy_models_end_with_the_time(self) -> None:
        world, generator = FakeTime(), np.random.default_rng(0)

        def noisy(_: int) -> float:
            return float(30 * np.exp(0.5 * generator.normal()))

        a, b = FakeSession(world, "A", noisy), FakeSession(world, "B", noisy)
        times = time_pair(a, b, max_seconds=5, target_halfwidth=0.001, clock=world.clock)
        assert not times.converged
        assert 5 <= world.now_s < 6
        assert times.speedup.halfwidth > 0.001

    def test_patience_lasts_until_the_interval_tells_something(self) -> None:
        def of(noise: float, patience: float) -> tuple[PairedTimes, float]:
            world, generator = FakeTime(), np.random.default_rng(0)

            def noisy(_: int) -> float:
                return float(30 * np.exp(noise * generator.normal()))

            a, b = FakeSession(world, "A", noisy), FakeSession(world, "B", noisy)
            return time_pair(a, b, 2, 0.001, clock=world.clock, patience=patience), world.now_s

        (_, calm_s), (busy, busy_s), (wild, wild_s) = of(0.02, 4), of(0.15, 4), of(2.0, 4)
        assert 2 <= calm_s < 3  # one look past the time: three quads at most
        assert calm_s + 0.5 < busy_s < 8
        assert with_session_variance(busy.speedup).halfwidth <= USEFUL_HALFWIDTH
        assert 8 <= wild_s < 9
        assert with_session_variance(wild.speedup).halfwidth > USEFUL_HALFWIDTH
        assert 2 <= of(0.15, 1)[1] < 2.4

    @pytest.mark.parametrize("patience", [1, 4])
    def test_even_no_time_gives_a_figure(self, patience: float) -> None:
        """However short: four quads, so that the interval is Student's over three degrees of freedom, not over one."""
        world, generator = FakeTime(), np.random.default_rng(0)

        def of(name: str, ms: float) -> FakeSession:
            return FakeSession(world, name, lambda _: float(ms * np.exp(0.02 * generator.normal())))

        times = time_pair(of("A", 3e3), of("B", 6e3), 0.1, 0.01, clock=world.clock, patience=patience)
        assert not times.converged
        assert len(times.quads) == 4
        found = with_session_variance(times.speedup)
        logs = np.array([quad.log_speedup for quad in times.quads])
        # t(3) = 3.18 and 6.2 (the most that correlated neighbours add) on a spread of at most the whole range
        bound = 3.18 / 1.96 * math.sqrt(4 / 3) * 6.25 * np.ptp(logs) + 1.96 * SESSION_SD
        assert math.log(found.high / found.value) < bound < 1.5
        assert math.log(found.value / found.low) < bound

    def test_a_short_time_is_shared_out_in_short_blocks(self) -> None:
        world = FakeTime()
        a, b = FakeSession(world, "A", lambda _: 1.0), FakeSession(world, "B", lambda _: 2.0)
        times = time_pair(a, b, max_seconds=0.96 / 0.7, target_halfwidth=0.01, clock=world.clock)
        assert times.converged
        assert [len(block) for block in (*times.quads[0].candidate, *times.quads[0].baseline)] == [10, 10, 5, 5]
        assert world.now_s < 1.4
        assert [block_length_ms(seconds, 96) for seconds in (0.096, 0.96, 1.92, 9.0)] == pytest.approx([1, 10, 20, 20])

    def test_warm_up_is_waited_for(self) -> None:
        world = FakeTime()
        a = FakeSession(world, "A", lambda run: 10.0 + max(0, 40 - run))
        b = FakeSession(world, "B", lambda _: 20.0)
        times = time_pair(a, b, max_seconds=100, target_halfwidth=0.01, clock=world.clock)
        assert times.warmup_iterations >= 40
        assert set(times.all_ms("candidate")) == {10.0}

    def test_fast_models_are_timed_in_longer_blocks(self) -> None:
        world = FakeTime()
        a, b = FakeSession(world, "A", lambda _: 1.0), FakeSession(world, "B", lambda _: 4.0)
        quad = time_pair(a, b, max_seconds=100, target_halfwidth=0.01, clock=world.clock).quads[0]
        assert [len(block) for block in (*quad.candidate, *quad.baseline)] == [20, 20, 5, 5]


class TestRealNetwork:
    def test_each_of_the_two_is_timed_at_its_own_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[Any] = []

        def opened(network: Any, spec: Any, *_: Any) -> Any:
            sizes.append(spec.imgsz)
            return CONSTANT["fast"]

        monkeypatch.setattr("paretoprune.pruning.latency.pair.open_session", opened)
        model = tiny_model()
        found = measure_pair(model, model, 64, threads=1, baseline_imgsz=(96, 128))
        assert sizes == [64, (96, 128)]
        assert found.imgsz == 64
        with pytest.raises(PruningError, match="must be a multiple of 32, but got 100"):
            measure_pair(model, model, 64, baseline_imgsz=100)

    def test_against_itself(self) -> None:
        model = fresh_yolov8n()
        before, threads = weights(model), torch.get_num_threads()
        result = measure_pair(model, model, imgsz=64, max_seconds=1.0, threads=1)
        assert 0.5 < result.speedup < 2.0
        assert result.speedup_ci95[0] <= result.speedup <= result.speedup_ci95[1]
        assert (result.threads, result.device, result.runtime, result.batch) == (1, "cpu", "torch", 1)
        assert 0 < result.median_ms <= result.p90_ms
        assert result.blocks % 4 == 0
        assert torch.get_num_threads() == threads
        assert same_weights(before, weights(model))
        assert "bn" in dict(model.model[0].named_children())  # type: ignore[index]  # fused was a copy
        plain = json.loads(json.dumps(result.to_dict()))
        keys = {"median_ms", "p90_ms", "iterations", "baseline_median_ms", "speedup", "speedup_ci95"}
        assert keys <= plain.keys()

    def test_networks_are_made_ready_beside_others_and_timed_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        states: list[str] = []
        opened: list[str] = []
        timed: list[str] = []

        class Door:
            @contextmanager
            def held(self, state: str) -> Iterator[None]:
                states.append(state)
                yield
                states.pop()

            def using(self) -> AbstractContextManager[None]:
                return self.held("shared")

            def measuring(self) -> AbstractContextManager[None]:
                return self.held("alone")

        def note(kept: list[str], function: Callable[..., Any]) -> Callable[..., Any]:
            def noting(*given: Any, **named: Any) -> Any:
                kept.append(" ".join(states))
                return function(*given, **named)

            return noting

        monkeypatch.setattr("paretoprune.pruning.latency.pair.open_session", note(opened, open_session))
        monkeypatch.setattr("paretoprune.pruning.latency.pair.time_pair", note(timed, time_pair))
        model = fresh_yolov8n()
        measure_pair(model, model, imgsz=64, max_seconds=0.1, threads=1, gate=Door())
        assert (opened, timed, states) == (["shared", "shared"], ["alone"], [])

    def test_a_much_smaller_input_network_is_faster(self) -> None:
        from ultralytics.nn.tasks import DetectionModel

        small = fresh_yolov8n()
        large = DetectionModel("yolov8m.yaml", nc=3, verbose=False).eval()
        assert measure_pair(small, large, imgsz=64, max_seconds=1.0).speedup > 1.5

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"runtime": "abacus"}, "the runtime must be one of torch, "),
            ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
            ({"device": "toaster"}, "the device must be 'cpu' or 'cuda"),
            ({"imgsz": 100}, "the image size must be a multiple of 32, but got 100: use 128"),
            ({"max_seconds": 0.0}, "`max_seconds > 0` must hold, but got max_seconds=0.0"),
            ({"threads": 0}, "`threads > 0` must hold"),
        ],
    )
    def test_bad_input_is_one_line(self, change: dict[str, object], message: str) -> None:
        model = fresh_yolov8n()
        with pytest.raises(PruningError) as caught:
            measure_pair(model, model, **{"imgsz": 64, **change})  # type: ignore[arg-type]
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
