"""How a fine-tuning of a given length is run: learning rate, its course, averaging, mosaic. Pure functions."""

from __future__ import annotations

import math

# Measured with yolov8n at 320 px, batch 16, AdamW, half a cosine, on networks refitted after pruning. From 0.564 mAP,
# 39 steps: 4e-5 gives 0.590, 1e-4 gives 0.595, 2e-4 and 3e-4 give 0.577 and 0.579; 13 steps: 5e-5 gives 0.572, 1e-4
# gives 0.580 (one seed each). 195 steps at 5e-4 took another, heavier pruned one from 0.528 to 0.600.
_RATE_PER_STEP = 1e-4 / 39
_LOWEST_RATE, _HIGHEST_RATE = 5e-5, 5e-4
_RISE_SHARE, _LONGEST_RISE = 0.3, 40


def taught_rate(step: float) -> float:
    """The peak AdamW learning rate where a teacher is learned, at any length. `step`: `TaughtModel.longest_step`.

    Adam makes steps of full length however small the gradient is, so what a network bears depends on how far it is from
    its teacher: 4e-5 with half of the multiply-adds left (yolov8n and yolov8s on VOC) and a third (on blood cells),
    6e-5 with 55 % on COCO, but 2.5e-6 with 92 % on VOC, and less with 90 % on blood cells. Twice that: half of VOC's
    yolov8n went in 150 steps from 0.389 mAP to 0.418 with 5e-5, 0.421 with 1e-4 and 0.397 with 2e-4.
    """
    return 2 * step


def learning_rate(steps: int) -> float:
    """The peak AdamW learning rate for a fine-tuning of `steps` optimizer steps in all, by labels.

    Adam moves every weight by about the learning rate at each step, wherever it starts: few steps can only afford small
    ones, or they end farther from a good start than they can come back. Proportional to the steps through the two
    measured budgets (39 steps: 1e-4; 195: 5e-4), within [5e-5, 5e-4].
    """
    return min(_HIGHEST_RATE, max(_LOWEST_RATE, _RATE_PER_STEP * steps))


def rate_factor(step: int, steps: int, final: float = 0.05) -> float:
    """What the peak learning rate is multiplied with at `step` of `steps` (counted from 0): in (0, 1].

    A linear rise over the first 30 % (at most 40 steps), while Adam's second moments form; for biases like for all
    others, since the large bias rate of Ultralytics' warm-up is what ruins a good start. Then half a cosine down to
    `final`. By step, not by epoch, so that a single epoch already ends on small steps.
    """
    rise = min(int(_RISE_SHARE * steps), _LONGEST_RISE)
    if step < rise:
        return (step + 1) / (rise + 1)
    progress = min(1.0, (step - rise) / max(1, steps - 1 - rise))
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def averaging(steps: int) -> tuple[float, float]:
    """(decay, tau) of the weights' moving average, as Ultralytics' ModelEMA takes them.

    Its horizon is a tenth of the fine-tuning; the average forgets the start within the first tenth. Ultralytics' own
    (0.9999, 2000) is made for tens of thousands of steps: over 40 it averages nothing, over 1000 it lags behind.
    """
    horizon = max(1.0, steps / 10)
    return 1 - 1 / horizon, horizon


def epochs_with_mosaic(epochs: int) -> int:
    """For how many of the first `epochs` four images are joined into one: none of a short fine-tuning.

    A network that is to be judged after few epochs must not spend them on images unlike the ones it is judged on; a
    longer one (10 epochs and more) gains from them, with the last third, and at least five epochs, without.
    """
    return 0 if epochs < 10 else epochs - max(5, round(epochs / 3))
