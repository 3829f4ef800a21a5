"""The probe's expected square is the curvature of the outputs' divergence, for every kind of head."""

from __future__ import annotations

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel

from paretoprune.pruning.importance.output_fisher import output_probe, probe_of
from tests.pruning.output_oracle import CASES, drawn_outputs, replaced

PROBES = 500  # the mean of so many squares is off by 6 % (one standard deviation)


@pytest.mark.parametrize("case", CASES)
def test_the_expected_square_is_the_curvature_of_the_divergence(case: str) -> None:
    model, raw, values = drawn_outputs(case)
    leaves = {name: value.requires_grad_(True) for name, value in values.items()}
    outputs, divergence = replaced(raw, leaves), CASES[case][2]
    generator = torch.Generator().manual_seed(1)
    steps = {name: torch.randn(value.shape, dtype=torch.float64) for name, value in leaves.items()}
    squares = dict.fromkeys(leaves, 0.0)
    for _ in range(PROBES):
        probe = probe_of(model.model[-1], outputs, generator)  # type: ignore[index]
        for name, u in zip(leaves, torch.autograd.grad(probe, list(leaves.values()), allow_unused=True), strict=True):
            squares[name] += 0.0 if u is None else float((u * steps[name]).sum()) ** 2 / PROBES
    h, looked_at = 1e-3, 0
    for name, step in steps.items():
        with torch.no_grad():
            ends = [replaced(raw, {**leaves, name: leaves[name] + sign * h * step}) for sign in (-1, 1)]
            curvature = float(sum(divergence(outputs, end) for end in ends)) / h**2
        assert squares[name] == pytest.approx(curvature, rel=0.25, abs=1e-9), name
        looked_at += curvature > 0
    assert looked_at >= (1 if "class" in case else 2)


def test_equal_seeds_give_equal_probes_and_images_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", verbose=False).eval()
    images = torch.rand(2, 3, 64, 64).requires_grad_(True)
    probes = [output_probe(model, images, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*probes)
    (gradient,) = torch.autograd.grad(probes[0], images)
    assert float(gradient.abs().sum()) > 0


def test_a_head_of_another_kind_is_named() -> None:
    with pytest.raises(TypeError, match="raw outputs must be a mapping or logits, but Identity gives"):
        probe_of(torch.nn.Identity(), [1], torch.Generator())
