"""Augmentations against slow transcriptions, one example at a time."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from data_echo import Draw, Draws
from data_echo.augment import colour, crop, cutmix, flip, mixup, normalise, random_resized_crop

N = 24


def pictures(height: int = 12, width: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (N, height, width, 3), dtype=torch.uint8, generator=generator)


def draws(index: np.ndarray | None = None) -> Draws:
    index = np.arange(N) if index is None else index
    return Draws(5, "augment", np.zeros_like(index), index, np.ones_like(index), "cpu")


def draw(index: int) -> Draw:
    return Draw(5, "augment", 0, index, 1)


def test_crop_cuts_windows_out_of_padded_pictures() -> None:
    images = pictures()
    cropped = crop(images, draws(), 3)
    assert cropped.dtype == torch.uint8
    for index in range(N):
        one = draw(index)
        top, left = int(one.integers(0, 7)), int(one.integers(0, 7))
        padded = np.pad(images[index].numpy(), ((3, 3), (3, 3), (0, 0)))
        assert np.array_equal(cropped[index], padded[top : top + 12, left : left + 10])


def test_crop_to_another_size() -> None:
    assert crop(pictures(), draws(), 0, size=7).shape == (N, 7, 7, 3)


def test_flip_mirrors_about_half() -> None:
    images = pictures()
    flipped = flip(images, draws())
    mirrored = [bool(draw(index).bernoulli(0.5)) for index in range(N)]
    assert 4 < sum(mirrored) < 20
    for index in range(N):
        expected = images[index].flip(1) if mirrored[index] else images[index]
        assert torch.equal(flipped[index], expected)
    assert torch.equal(flip(images, draws(), 0.0), images)
    assert torch.equal(flip(images, draws(), 1.0), images.flip(2))


def test_normalise() -> None:
    images, mean, std = pictures(), (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    expected = (images.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    ours = normalise(images, mean, std)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(ours.permute(0, 2, 3, 1).double(), expected, atol=1e-5)


def test_random_resized_crop_of_the_whole_is_the_whole() -> None:
    images = pictures(9, 9)
    whole = random_resized_crop(images, draws(), 9, scale=(1, 1), ratio=(1, 1))
    assert torch.allclose(whole, images.float(), atol=1e-3)


def test_random_resized_crop_shows_windows_of_the_right_area() -> None:
    # On a picture whose channels are its coordinates, the corners' values give the window away.
    side = 64
    along = (torch.arange(side) + 0.5) / side
    coordinates = torch.stack([along[:, None].expand(side, side), along[None].expand(side, side)], 2)
    images = torch.cat([coordinates, torch.zeros(side, side, 1)], 2).expand(N, side, side, 3)
    shown = random_resized_crop(images, draws(), 32, scale=(0.2, 0.5), ratio=(0.8, 1.25))
    low, high = shown[:, 0, 0, :2], shown[:, -1, -1, :2]
    tall, wide = ((high - low) * 32 / 31).unbind(1)
    area, ratio = tall * wide, wide / tall
    assert area.min() > 0.17
    assert area.max() < 0.53
    assert area.std() > 0.05
    assert ratio.min() > 0.75
    assert ratio.max() < 1.33
    assert (low > -0.01).all()
    assert (high < 1.01).all()


def test_colour_does_what_its_numbers_say() -> None:
    images = pictures()
    assert torch.allclose(colour(images, draws()), images.float(), atol=1e-3)
    brighter = colour(images, draws(), brightness=0.4)
    flat = colour(images, draws(), contrast=1.0)
    grey = torch.tensor([0.299, 0.587, 0.114])
    for index in range(N):
        factor = 1 + 0.4 * (2 * float(draw(index).uniform()) - 1)
        assert torch.allclose(brighter[index], (images[index].float() * factor).clamp(0, 255), atol=1e-2)
        one = draw(index)
        one.uniform()  # the brightness's
        factor = 1 + (2 * float(one.uniform()) - 1)
        mean = (images[index].float() @ grey).mean()
        expected = (mean + (images[index].float() - mean) * factor).clamp(0, 255)
        assert torch.allclose(flat[index], expected, atol=1e-2)
    assert brighter.min() >= 0
    assert brighter.max() <= 255


def test_saturation_keeps_greys() -> None:
    greys = pictures()[..., :1].expand(-1, -1, -1, 3)
    assert torch.allclose(colour(greys, draws(), saturation=0.9), greys.float(), atol=1e-2)


def test_mixup_blends_with_the_partner() -> None:
    images = pictures()
    blended, partner, share = mixup(images, draws(), 0.4)
    assert sorted(partner.tolist()) == list(range(N))
    weight = share[:, None, None, None]
    assert torch.allclose(blended, weight * images + (1 - weight) * images[partner], atol=1e-3)
    assert 0 <= share.min() < 0.2
    assert 0.8 < share.max() <= 1


def test_cutmix_pastes_a_rectangle_and_says_its_share() -> None:
    images = pictures(40, 40)
    mixed, partner, share = cutmix(images, draws())
    for index in range(N):
        pasted = (mixed[index] != images[index]).any(2)
        assert torch.equal(mixed[index][pasted], images[partner[index]][pasted])
        rows, columns = pasted.any(1).nonzero()[:, 0], pasted.any(0).nonzero()[:, 0]
        area = 0 if not len(rows) else int(rows[-1] - rows[0] + 1) * int(columns[-1] - columns[0] + 1)
        assert share[index] == pytest.approx(1 - area / 1600, abs=1e-3)
    assert share.std() > 0.1


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    count = 40_000
    index = np.arange(count)
    tiny = torch.zeros(count, 1, 1, 3)
    share = mixup(tiny, draws(index), alpha)[2].double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(share.mean()) - 0.5) < 5 * np.sqrt(variance / count)
    assert float(share.var()) == pytest.approx(variance, rel=0.03)


AUGMENTATIONS: list[Callable[[Tensor, Draws], Tensor]] = [
    lambda images, some: crop(images, some, 2),
    flip,
    lambda images, some: random_resized_crop(images, some, 8),
    lambda images, some: colour(images, some, 0.4, 0.4, 0.4),
]


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_an_example_looks_the_same_in_any_company(augment: Callable[[Tensor, Draws], Tensor]) -> None:
    images, order = pictures(), np.random.default_rng(0).permutation(N)[:10]
    alone = augment(images[order], draws(order))
    assert torch.allclose(alone.float(), augment(images, draws())[order].float(), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_the_same_on_cuda(augment: Callable[[Tensor, Draws], Tensor]) -> None:
    there = Draws(5, "augment", np.zeros(N, int), np.arange(N), np.ones(N, int), "cuda")
    assert torch.allclose(
        augment(pictures().cuda(), there).cpu().float(), augment(pictures(), draws()).float(), atol=1e-2
    )
