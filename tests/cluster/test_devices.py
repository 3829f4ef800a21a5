from __future__ import annotations

import pytest

from paretoprune.cluster.devices import CudaDriver, default_device, device_key
from paretoprune.cluster.environment import query_gpus
from paretoprune.cluster.errors import DeviceNotFoundError


class TwoGpus:
    """As seen by a process with CUDA_VISIBLE_DEVICES=3,1."""

    def uuid(self, index: int) -> str | None:
        return dict(enumerate(["GPU-three", "GPU-one"])).get(index)


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("cpu", "cpu"),
        (" CPU ", "cpu"),
        ("mps", "mps"),
        ("cuda", "GPU-three"),
        ("0", "GPU-three"),
        ("cuda:1", "GPU-one"),
    ],
)
def test_key(device: str, key: str) -> None:
    assert device_key(device, TwoGpus()) == key


class NoGpu:
    def uuid(self, index: int) -> str | None:
        return None


def test_the_default_is_the_first_gpu_where_there_is_one() -> None:
    assert default_device(TwoGpus()) == "cuda:0"
    assert default_device(NoGpu()) == "cpu"


@pytest.mark.parametrize("device", ["cuda:2", "7"])
def test_a_gpu_that_is_not_there(device: str) -> None:
    with pytest.raises(DeviceNotFoundError, match=r"sees no GPU number \d; use device cpu"):
        device_key(device, TwoGpus())


@pytest.mark.parametrize("device", ["0,1", "gpu", "", "cuda:-1", "cuda:x"])
def test_not_one_device(device: str) -> None:
    with pytest.raises(DeviceNotFoundError, match=r"must be one of cpu, mps, cuda, cuda:N or N, but got"):
        device_key(device, TwoGpus())


def test_the_driver_agrees_with_nvidia_smi() -> None:
    """On a host without a GPU both must say so."""
    known = {gpu["uuid"].replace("-", "").lower() for gpu in query_gpus()}
    seen = [uuid for i in range(len(known) + 1) if (uuid := CudaDriver().uuid(i)) is not None]
    assert {uuid.replace("-", "").lower() for uuid in seen} == known
