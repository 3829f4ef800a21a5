"""The divergence of two networks' outputs against torch's own distributions, for every kind of head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DepthModel

from paretoprune.pruning.importance.output_fisher import probe_of
from paretoprune.pruning.yolo.output_distribution import (
    class_probabilities,
    class_weights,
    output_divergence,
    raw_outputs,
)
from tests.pruning.output_oracle import CASES, drawn_outputs, replaced

DRAWS = 100  # of masks: their mean is off by 3 %


def head_of(model: nn.Module) -> nn.Module:
    return model.model[-1]  # type: ignore[index, return-value]


@pytest.mark.parametrize("case", CASES)
def test_the_divergence_is_that_of_the_distributions_and_flat_where_both_are_equal(case: str) -> None:
    model, raw, values = drawn_outputs(case)
    head, oracle, generator = head_of(model), CASES[case][2], torch.Generator().manual_seed(1)
    there = {name: value + 0.3 * torch.randn_like(value) for name, value in values.items()}
    teacher, student = replaced(raw, values), replaced(raw, there)
    masks = case == "masks"
    found = [float(output_divergence(head, teacher, student, generator)) for _ in range(DRAWS if masks else 1)]
    assert sum(found) / len(found) == pytest.approx(float(oracle(teacher, student)), rel=0.05 if masks else 1e-6)

    for kind in (torch.float64, torch.float32):  # not nearly flat: Adam makes full steps of the smallest gradient
        same = {name: value.to(kind).clone().requires_grad_(True) for name, value in values.items()}
        equal = replaced(raw, {name: value.to(kind) for name, value in values.items()})
        divergence = output_divergence(head, equal, replaced(raw, same), generator)
        assert float(divergence.detach()) == pytest.approx(0.0, abs=1e-3)
        gradients = torch.autograd.grad(divergence, list(same.values()), allow_unused=True)
        assert all(g is None or not g.any() for g in gradients)
        assert any(g is not None for g in gradients)


def test_the_second_derivative_is_the_fisher_information_that_the_probe_samples() -> None:
    """With the oracles of both this holds for every head; here without one, the two functions face to face."""
    model, raw, values = drawn_outputs("boxes with bins")
    head, generator = head_of(model), torch.Generator().manual_seed(1)
    for name, value in values.items():
        step = torch.randn_like(value)
        squares = 0.0
        leaf = {**values, name: value.clone().requires_grad_(True)}
        for _ in range(300):
            (u,) = torch.autograd.grad(probe_of(head, replaced(raw, leaf), generator), leaf[name])
            squares += float((u * step).sum()) ** 2 / 300
        ends = [replaced(raw, {**values, name: value + sign * 1e-3 * step}) for sign in (-1, 1)]
        apart = [float(output_divergence(head, replaced(raw, values), end, generator)) for end in ends]
        assert squares == pytest.approx(sum(apart) / 1e-6, rel=0.3), name


def test_classes_that_count_differently_are_weighed_so_by_divergence_and_probe() -> None:
    """Two classes' divergences taken apart by weights, boxes by the class that makes their anchor a detection."""
    model, raw, values = drawn_outputs("boxes with bins")
    head, generator = head_of(model), torch.Generator().manual_seed(1)
    there = {name: value + 0.3 * torch.randn_like(value) for name, value in values.items()}
    teacher, student = replaced(raw, values), replaced(raw, there)
    counts = torch.linspace(0.2, 3, teacher["scores"].shape[1], dtype=teacher["scores"].dtype)
    found = float(output_divergence(head, teacher, student, generator, counts))
    p, q = teacher["scores"].sigmoid(), student["scores"].sigmoid()
    apart = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    sides = [part["boxes"].unflatten(1, (4, -1)).log_softmax(2) for part in (teacher, student)]
    boxes = (sides[0].exp() * (sides[0] - sides[1])).sum((1, 2))
    reach = (counts[:, None] * p).amax(1)
    assert found == pytest.approx(float((counts[:, None] * apart).sum() + (reach * boxes).sum()), rel=1e-6)

    leaf = {name: value.clone().requires_grad_(True) for name, value in values.items()}
    probe = probe_of(head, replaced(raw, leaf), generator, counts)
    (u,) = torch.autograd.grad(probe, [value for name, value in leaf.items() if "scores" in name])
    assert torch.allclose(u.square(), counts[:, None] * p * (1 - p))  # signs are all that is drawn


def test_all_classes_together_count_alike() -> None:
    kind, yaml, _ = CASES["boxes with bins"]
    torch.manual_seed(0)
    model: Any = kind(yaml, verbose=False).eval()
    with torch.no_grad():
        for branch in head_of(model).cv3:  # type: ignore[union-attr]
            branch[-1].bias[0] += 2.0  # a class that is seen all the time
            branch[-1].bias[1] -= 1.0
            branch[-1].bias[2] = -30.0  # one that no image shows
    images = torch.rand(5, 3, 64, 64)
    p = class_probabilities(model, images)
    paused: list[None] = []
    weights = class_weights(model, images, chunk=2, pause=lambda: paused.append(None))
    assert len(paused) == 3  # a measurement is let in between the chunks
    assert p is not None
    assert weights is not None
    mass = (p * (1 - p)).sum((0, 2))
    share = weights * mass
    assert float(share.sum()) == pytest.approx(float(mass.sum()), rel=1e-4)
    common = [k for k in range(len(mass)) if k != 2]
    assert torch.allclose(share[common], share[common].mean().expand(len(common)), rtol=1e-4)
    assert weights[2] == weights.max()
    assert float(weights[2]) <= 31 * float((weights * mass).sum() / mass.sum())  # bounded: nothing is known of it
    single = kind(yaml, nc=1, verbose=False).eval()
    assert class_weights(single, images) is None
    classifier = CASES["classes"][0](CASES["classes"][1], verbose=False).eval()
    assert class_weights(classifier, images) is None


def perturbed(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)
    return other.requires_grad_(True)


@pytest.mark.parametrize("case", [*CASES, "depth"])
def test_two_networks_of_each_kind_have_a_finite_divergence_that_teaches(case: str) -> None:
    kind, yaml = CASES[case][:2] if case != "depth" else (DepthModel, "yolo26n-depth.yaml")
    torch.manual_seed(0)
    teacher: Any = kind(yaml, verbose=False).eval()
    student, images = perturbed(teacher), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        told = raw_outputs(teacher, images)
    divergence = output_divergence(head_of(teacher), told, raw_outputs(student, images, told), torch.Generator())
    divergence.backward()  # type: ignore[no-untyped-call]
    assert float(divergence.detach()) > 0
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    assert sum(bool(g.any()) for g in gradients) > 0.5 * len(gradients)


def test_queries_are_compared_by_position_however_the_student_ranks_them() -> None:
    kind, yaml, _ = CASES["queries"]
    torch.manual_seed(0)
    teacher = kind(yaml, verbose=False).eval()
    head: Any = head_of(teacher)
    head.num_queries = 20  # of 84 positions
    images = torch.rand(2, 3, 64, 64)
    student = perturbed(teacher)
    student.load_state_dict(teacher.state_dict())
    handle = head_of(student).enc_score_head.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda module, inputs, scores: scores + torch.linspace(0, 9, scores.shape[1])[:, None]
    )
    with torch.no_grad():
        told = raw_outputs(teacher, images)
        alone, forced = raw_outputs(student, images), raw_outputs(student, images, told)
    handle.remove()
    assert not torch.equal(alone["chosen"].sort(1)[0], told["chosen"].sort(1)[0])
    for name in ("scores", "boxes"):
        assert torch.allclose(forced[name], told[name], atol=1e-4), name
    assert torch.equal(raw_outputs(teacher, images)["chosen"], told["chosen"])  # nothing is left of it


def test_a_head_of_another_kind_is_named() -> None:
    with pytest.raises(TypeError, match="raw outputs must be a mapping or logits, but Identity gives"):
        output_divergence(nn.Identity(), [1], [1], torch.Generator())
