"""Augmentations after the echo: vectorised operations on a whole micro-batch, on its device.

Images are uint8 or float [n, height, width, channels], as they are stored; `normalise` comes last and gives
float32 [n, channels, height, width]. Each takes the micro-batch's `Draws`, so the result for an example
depends only on (seed, pass, index, echo) and on the order of the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from data_echo.draws import Draws


def crop(images: Tensor, draw: Draws, padding: int, size: int | None = None) -> Tensor:
    """Pad with black, then cut out a window of the original size (or `size` x `size`) at a random place."""
    height, width = (size, size) if size else images.shape[1:3]
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    top = draw.integers(0, padded.shape[1] - height + 1)
    left = draw.integers(0, padded.shape[2] - width + 1)
    # A view: [n, tops, lefts, channels, height, width].
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)
    return windows.permute(0, 1, 2, 4, 5, 3)[torch.arange(len(images), device=images.device), top, left]


def flip(images: Tensor, draw: Draws, p: float = 0.5) -> Tensor:
    """Mirror left to right with probability p."""
    # Picking whole images is faster than choosing pixel by pixel.
    both = torch.stack([images, images.flip(2)])
    return both[draw.bernoulli(p).long(), torch.arange(len(images), device=images.device)]


def random_resized_crop(
    images: Tensor,
    draw: Draws,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Cut out a window of random area and shape, resized to size x size: float32, in the images' range.

    The fraction of the area is uniform in `scale`, the aspect ratio log-uniform in `ratio`; a window larger
    than the image is clipped (torchvision tries ten times instead). Bilinear, without antialiasing.
    """
    height, width = images.shape[1:3]
    area = scale[0] + (scale[1] - scale[0]) * draw.uniform()
    low, high = torch.log(torch.tensor(ratio)).tolist()
    aspect = torch.exp(low + (high - low) * draw.uniform())
    # Fractions of the image's height and width.
    tall = torch.sqrt(area * (width / height) / aspect).clamp(max=1.0)
    wide = torch.sqrt(area * (height / width) * aspect).clamp(max=1.0)
    # The window's centre; the image spans -1 to 1.
    down = (1 - tall) * (2 * draw.uniform() - 1)
    right = (1 - wide) * (2 * draw.uniform() - 1)
    zero = torch.zeros_like(tall)
    affine = torch.stack([torch.stack([wide, zero, right], 1), torch.stack([zero, tall, down], 1)], 1)
    grid = F.affine_grid(affine, [len(images), images.shape[3], size, size], align_corners=False)
    picked = F.grid_sample(
        images.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False
    )
    return picked.permute(0, 2, 3, 1)


def colour(
    images: Tensor, draw: Draws, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0
) -> Tensor:
    """Scale brightness, contrast and saturation by factors uniform in [1 - x, 1 + x]: float32 in 0..255.

    In this order; greys weigh red, green, blue as .299, .587, .114 (ITU-R BT.601).
    """
    images = images.float()
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    images = (images * _factor(draw, brightness)).clamp(0, 255)
    mean = (images * weights).sum(3, keepdim=True).mean((1, 2), keepdim=True)
    images = (mean + (images - mean) * _factor(draw, contrast)).clamp(0, 255)
    grey = (images * weights).sum(3, keepdim=True)
    return (grey + (images - grey) * _factor(draw, saturation)).clamp(0, 255)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Compute (images / 255 - mean) / std for each channel: float32 [n, channels, height, width].

    The result keeps the images' channels-last memory, with which convolutions and pooling are faster on CPU
    and GPU.
    """
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    planes = images.permute(0, 3, 1, 2).to(torch.float32)
    return torch.addcmul(shift[:, None, None], planes, scale[:, None, None])


def mixup(images: Tensor, draw: Draws, alpha: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Blend each image with its partner. Zhang et al. 2018, arXiv:1710.09412v2.

    Returns:
        blended float32 images; int64 [n], each one's partner in the micro-batch; float32 [n], the weight of
        the image itself: the loss is weight * loss(label) + (1 - weight) * loss(label[partner]).
    """
    weight, partner = _beta(draw, alpha), _partners(images)
    of_image = weight[:, None, None, None]
    return of_image * images.float() + (1 - of_image) * images[partner].float(), partner, weight


def cutmix(images: Tensor, draw: Draws, alpha: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Paste a rectangle of the partner into each image. Yun et al. 2019, arXiv:1905.04899v2.

    Returns what `mixup` does; the weight is the fraction of the image's own pixels.
    """
    height, width = images.shape[1:3]
    side = torch.sqrt(1 - _beta(draw, alpha))
    inside = []
    for length in (height, width):
        half = (side * length).long() // 2
        centre = draw.integers(0, length)
        place = torch.arange(length, device=images.device)
        inside.append((place >= (centre - half)[:, None]) & (place < (centre + half)[:, None]))
    pasted = inside[0][:, :, None] & inside[1][:, None, :]
    partner = _partners(images)
    weight = 1 - pasted.float().mean((1, 2))
    return torch.where(pasted[..., None], images[partner], images), partner, weight


def _factor(draw: Draws, spread: float) -> Any:
    return (1 + spread * (2 * draw.uniform() - 1))[:, None, None, None]


def _partners(images: Tensor) -> Tensor:
    """Each image's partner, the next one: micro-batches are shuffled already."""
    return torch.arange(len(images), device=images.device).roll(-1)


def _beta(draw: Draws, alpha: float) -> Tensor:
    """Beta(alpha, alpha), float32 [n], by Jöhnk's method (1964): the first of 32 trials that is accepted."""
    x, y = (torch.log(1 - draw.uniform(32).double()) / alpha for _ in range(2))
    total = torch.logaddexp(x, y)
    first = (total <= 0).int().argmax(1, keepdim=True)
    return torch.exp(x - total).gather(1, first)[:, 0].float()
