"""What a convolution sees at single places of its output."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def padded_rows(source: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """The convolution's input (N, C, H, W) padded as it pads, channels last: what `gather_patches` takes."""
    pad_y, pad_x = (int(p) for p in conv.padding)
    return F.pad(source, (pad_x, pad_x, pad_y, pad_y)).permute(0, 2, 3, 1).contiguous()


def output_size(conv: nn.Conv2d, side: int, axis: int) -> int:
    """Height (axis 0) or width (axis 1) of the convolution's output for an input of `side` pixels there."""
    padding, kernel = int(conv.padding[axis]), conv.kernel_size[axis]
    return (side + 2 * padding - conv.dilation[axis] * (kernel - 1) - 1) // conv.stride[axis] + 1


def gather_patches(rows: torch.Tensor, conv: nn.Conv2d, places: torch.Tensor) -> torch.Tensor:
    """What the convolution sees at the given output places.

    Args:
        rows: the padded input with channels last, (N, H, W, in).
        places: int64 (positions, 3): image, row, column of the output.

    Returns:
        (positions, kernel area, in channels)
    """
    image, row, column = places.unbind(1)
    top, left = row * conv.stride[0], column * conv.stride[1]
    taps = [
        rows[image, top + dy * conv.dilation[0], left + dx * conv.dilation[1]]
        for dy in range(conv.kernel_size[0])
        for dx in range(conv.kernel_size[1])
    ]
    return torch.stack(taps, dim=1)
