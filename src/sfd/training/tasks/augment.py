"""Colour and texture augmentations that keep geometry, to which a semantic encoder should be invariant."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

DRAWS = 15  # uniform numbers a view


def recolour(images: Tensor, draws: Tensor) -> Tensor:
    """Change colours, contrast, brightness, tone and sharpness of each image, and add noise; geometry stays.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        draws: (B, DRAWS) uniform numbers in [0, 1), row i for image i.

    Returns:
        (B, 3, H, W) in [-1, 1].
    """
    mixed = _mix_channels(images, draws[:, :9].unflatten(1, (3, 3)))
    contrast, brightness, gamma, blur, noise, phase = draws[:, 9:, None, None, None].unbind(1)
    mixed = (mixed * (0.6 + 0.6 * contrast) + (brightness - 0.5)).clamp(-1, 1)
    toned = 2 * (0.5 + 0.5 * mixed).clamp(min=1e-3) ** torch.exp(1.4 * (gamma - 0.5)) - 1
    blurred = F.avg_pool2d(F.pad(toned, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    softened = torch.lerp(toned, blurred, (2 * blur - 1).clamp(min=0))
    return (softened + 0.15 * noise * _grain(softened, phase)).clamp(-1, 1)


def _mix_channels(images: Tensor, matrix: Tensor) -> Tensor:
    """Send colours through a random (B, 3, 3) map, inverting ones included, around the image's mean colour."""
    rows = 2 * matrix - 1
    rows = rows / rows.norm(dim=2, keepdim=True).clamp(min=0.1)
    centred = images - images.mean(dim=(2, 3), keepdim=True)
    return torch.einsum("bij,bjhw->bihw", rows, centred)


def _grain(like: Tensor, phase: Tensor) -> Tensor:
    """Noise in [-1, 1] from each image's own phase: the fractional part of a steep sine of the pixel's number.

    Drawing real random numbers for each pixel would cost more than the network's own pass on the CPU.
    """
    number = torch.arange(like[0].numel(), device=like.device, dtype=torch.float32).view(1, *like.shape[1:])
    return 2 * torch.frac(torch.sin(number * 12.9898 + 1000 * phase) * 43758.5453).abs() - 1
