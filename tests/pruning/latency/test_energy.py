"""Energy of an inference: by a pretended counter, and the line where there is none."""

from __future__ import annotations

import pytest
import torch

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.energy import energy_counter, energy_per_inference
from paretoprune.pruning.latency.runtimes import ExportCache
from paretoprune.pruning.latency.runtimes.base import SessionSpec
from tests.pruning.tiny import tiny_model


def test_the_counters_rise_is_shared_among_the_inferences() -> None:
    network = tiny_model()
    drawn = iter([100.0, 130.0])
    found = energy_per_inference(network, SessionSpec(64, "cpu"), "torch", ExportCache(), 0.0, lambda: next(drawn))
    assert found == 30.0  # one inference fits into no time


def test_a_device_without_a_counter_is_one_line() -> None:
    with pytest.raises(PruningError, match="counts its energy, but the device is cpu; take energy_j out"):
        energy_counter(torch.device("cpu"))
