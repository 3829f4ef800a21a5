"""Distillation without labels: a recovered network learns the unpruned one's outputs on training images.

A few of the calibration images are held out. What the steps made is kept only where it is nearer to the unpruned
network on these than every earlier state, the start included, so that images too few to learn from do no harm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from paretoprune.pruning.device import nothing
from paretoprune.pruning.training.schedule import rate_factor, taught_rate
from paretoprune.pruning.training.teacher import TaughtModel
from paretoprune.pruning.yolo.precision import training_precision

STEPS = 300  # at most
_BATCH = 16
_PASSES = 10  # over the images, at most: more would learn them by heart
_LOOKS = 6  # at the held-out images


def distil(
    student: nn.Module,
    teacher: nn.Module,
    take: Callable[[Sequence[int], int], torch.Tensor],
    numbers: Sequence[int],
    held_out: torch.Tensor,
    classes: torch.Tensor | None = None,
    seed: int = 0,
    steps: int = STEPS,
    pause: Callable[[], None] = nothing,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[float, float]:
    """Train `student`, in place, towards the outputs of `teacher`: the divergence on held-out images before and after.

    AdamW at the rate of a trial's fine-tuning (`schedule.taught_rate`), batch norms' statistics as they are.

    Args:
        student, teacher: eval mode, on the device to compute on; the teacher is not changed.
        take: the images of these numbers, (N, C, H, W), float32; its second argument seeds what is random in them.
        numbers: of the images to learn from; without any nothing is done.
        held_out: (N, C, H, W), float32, of none of the `numbers`.
        classes: what each class counts (`output_distribution.class_weights`).
        steps: at most; no more than ten passes over the images take.
        pause: called between two steps, where others may use the device.

    Returns:
        Nats per image; the second is never larger than the first.
    """
    device = next(student.parameters()).device
    taught = TaughtModel(copy.deepcopy(teacher), student, classes)
    before = best = _mean_divergence(taught, held_out, device)
    if not len(numbers) or best == 0:
        return before, best
    steps = min(steps, _PASSES * -(-len(numbers) // _BATCH))
    kept, draws = copy.deepcopy(student.state_dict()), torch.Generator().manual_seed(seed)
    trained = [p.requires_grad_(p.is_floating_point() and "dfl" not in name) for name, p in student.named_parameters()]
    rate, queue = 0.0, list[int]()
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
    mixed = training_precision(student, str(device), True) == "bf16"
    for step in range(steps):
        pause()
        if len(queue) < min(_BATCH, len(numbers)):
            queue += torch.randperm(len(numbers), generator=draws).tolist()
        chosen, queue = queue[:_BATCH], queue[_BATCH:]
        batch = take([numbers[k] for k in chosen], seed + 1 + step).to(device)
        with torch.random.fork_rng(devices=[]), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            torch.manual_seed(seed + step)  # of the masks that are looked at
            if not step:
                with torch.no_grad():
                    taught({"img": batch})  # which the rate is found on
                rate = taught_rate(taught.longest_step())
            loss, _ = taught({"img": batch})
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(step, steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, steps // _LOOKS) == 0 or step + 1 == steps:
            now = _mean_divergence(taught, held_out, device)
            report(f"step {step + 1} of {steps}: {now:.3g} nats from the unpruned network on held-out images")
            if now < best:
                best, kept = now, copy.deepcopy(student.state_dict())
    student.load_state_dict(kept)
    student.requires_grad_(False)
    return before, best


@torch.no_grad()
def _mean_divergence(taught: TaughtModel, images: torch.Tensor, device: torch.device) -> float:
    total = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for start in range(0, len(images), _BATCH):
            part = images[start : start + _BATCH].to(device)
            total += float(taught({"img": part})[0]) * len(part)
    return total / max(1, len(images))
