"""What a device was like: read from the kernel's files and NVML's answers, null where they do not say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from paretoprune.pruning.latency.device_state import CpuWatch, GpuWatch, watch


def counters(root: Path, core: int, kind: str, count: int) -> None:
    folder = root / f"cpu{core}" / "thermal_throttle"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{kind}_throttle_count").write_text(f"{count}\n")


class TestCpu:
    def test_a_counter_that_rose_is_throttling(self, tmp_path: Path) -> None:
        for core in (0, 1):
            counters(tmp_path, core, "core", 7)
        first = CpuWatch(tmp_path)
        assert first.finish().throttled is False
        counters(tmp_path, 1, "core", 8)
        seen = first.finish()
        assert seen.throttled is True
        assert seen.throttle_reasons == ("thermal",)

    def test_without_counters_it_is_not_known(self, tmp_path: Path) -> None:
        seen = CpuWatch(tmp_path).finish()
        assert seen.throttled is None
        assert seen.throttle_reasons is None
        assert seen.device_name

    def test_clock_at_start_and_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clocks = iter([3000.0, 1200.0])
        monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=next(clocks)))
        seen = CpuWatch(tmp_path).finish()
        assert (seen.clock_mhz_start, seen.clock_mhz_end) == (3000.0, 1200.0)

    @pytest.mark.parametrize("answer", [lambda: None, lambda: SimpleNamespace(current=0.0)])
    def test_a_clock_that_cannot_be_read_is_null(
        self, answer: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(psutil, "cpu_freq", answer)
        seen = CpuWatch(tmp_path).finish()
        assert seen.clock_mhz_start is None
        assert seen.clock_mhz_end is None

    def test_this_machine(self) -> None:
        seen = watch(torch.device("cpu")).finish()
        assert seen.device_name not in ("", "unknown")


class FakeNvml:
    """NVML's answers for one GPU, in its own words."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM = 1

    def __init__(self, uuid: str = "GPU-1234", refuses: tuple[str, ...] = ()) -> None:
        self.uuid, self.refuses = uuid, refuses
        self.bits, self.clock = 0x1, 1980

    def _answer(self, name: str, value: Any) -> Any:
        if name in self.refuses:
            raise self.NVMLError(name)
        return value

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise self.NVMLError(uuid)
        return uuid

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        assert kind == self.NVML_CLOCK_SM
        return self._answer("clock", self.clock)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self._answer("power", 312_500)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self._answer("reasons", self.bits)

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        return self._answer("driver", b"570.86")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return torch.device("cuda:0")


class TestGpu:
    def test_clocks_power_and_driver(self, gpu: torch.device) -> None:
        nvml = FakeNvml()
        seen = GpuWatch(gpu, nvml)
        nvml.clock = 1410
        result = seen.finish()
        assert (result.device_name, result.driver) == ("Some GPU", "570.86")
        assert (result.clock_mhz_start, result.clock_mhz_end) == (1980.0, 1410.0)
        assert (result.power_w_start, result.power_w_end) == (312.5, 312.5)
        assert result.throttled is False  # idle is no throttling
        assert result.throttle_reasons == ()

    def test_throttling_that_was_over_before_the_end_is_seen(self, gpu: torch.device) -> None:
        nvml = FakeNvml()
        seen = GpuWatch(gpu, nvml)
        nvml.bits = 0x4 | 0x40
        seen.look()
        nvml.bits = 0
        result = seen.finish()
        assert result.throttled is True
        assert result.throttle_reasons == ("power cap", "hardware thermal slowdown")

    def test_a_clock_that_somebody_set_is_no_throttling(self, gpu: torch.device) -> None:
        nvml = FakeNvml()
        nvml.bits = 0x2
        result = GpuWatch(gpu, nvml).finish()
        assert result.throttled is False
        assert result.throttle_reasons == ("application clock setting",)

    def test_what_the_driver_refuses_is_null(self, gpu: torch.device) -> None:
        result = GpuWatch(gpu, FakeNvml(refuses=("clock", "power", "reasons", "driver"))).finish()
        assert result.device_name == "Some GPU"
        figures = (result.driver, result.clock_mhz_start, result.power_w_end, result.throttled, result.throttle_reasons)
        assert figures == (None,) * 5

    @pytest.mark.parametrize("nvml", [None, FakeNvml(uuid="GPU-another")])
    def test_without_nvml_or_its_handle_all_is_null(self, nvml: FakeNvml | None, gpu: torch.device) -> None:
        result = GpuWatch(gpu, nvml).finish()
        assert (result.driver, result.clock_mhz_start, result.throttled) == (None, None, None)

    def test_a_mig_instance_is_found(self, gpu: torch.device) -> None:
        assert GpuWatch(gpu, FakeNvml(uuid="MIG-1234")).finish().clock_mhz_end == 1980.0
