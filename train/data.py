"""What is trained on: the data sets by name, and batches of them, augmented.

Images stay bytes, on whatever device they are moved to, and are shuffled, cropped and mirrored there, batch by batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cifar, synthetic

NAMES = (*cifar.SOURCES, "synthetic")
MARGIN = 4  # zeros around a training image before it is cropped

MEAN = (0.4914, 0.4822, 0.4465)  # of each channel over CIFAR-10's training images, whose pixels are from 0 to 1
DEVIATION = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Images:
    """``pixels[images, 3, 32, 32]``, uint8, with channels last in memory, and ``labels[images]``, int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))

    def first(self, count: int) -> Images:
        """A copy, so that the memory of the others can be freed."""
        if not 1 <= count <= len(self):
            raise ValueError(f"count {count} must be from 1 to the {len(self)} images that there are")
        return Images(self.pixels[:count].clone(), self.labels[:count].clone())


@dataclass(frozen=True)
class Data:
    """A data set, with labels from 0 to ``classes`` - 1."""

    name: str
    classes: int
    training: Images
    test: Images

    def to(self, device: torch.device | str) -> Data:
        return Data(self.name, self.classes, self.training.to(device), self.test.to(device))


def directory_of(option: str | Path | None) -> Path | None:
    """Where the data lies: as ``--data`` says, else as CONVNORM_DATA says."""
    directory = option or os.environ.get("CONVNORM_DATA")
    return Path(directory).expanduser() if directory else None


def load(name: str, directory: str | Path | None) -> Data:
    """``"cifar10"``, ``"cifar100"`` with its fine labels, or ``"synthetic"``, which needs no directory.

    ``directory`` holds the files of CIFAR, or the folder that their archive unpacks to. If it has not one of them, they
    are downloaded into it. Images are in the order of the files.
    """
    if name not in NAMES:
        raise ValueError(f"data set {name!r} must be one of {', '.join(map(repr, NAMES))}")
    if name == "synthetic":
        training, test = synthetic.images()
        return Data(name, synthetic.CLASSES, Images(*training), Images(*test))
    if directory is None:
        raise ValueError(f"data set {name!r} needs a directory: --data DIR, or CONVNORM_DATA=DIR in the environment")
    source = cifar.SOURCES[name]
    training, test = cifar.read(source, Path(directory))
    return Data(name, source.classes, Images(*training), Images(*test))


def inputs(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 numbers from 0 to 1.

    >>> inputs(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    return pixels / 255


def normalised(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 numbers, each channel of mean 0 and deviation 1 over CIFAR-10's training images.

    >>> normalised(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    tensor([2.0591, 2.1265, 2.1158])
    """
    mean, deviation = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (inputs(pixels) - mean) / deviation


def epoch(
    images: Images, batch: int, generator: torch.Generator, *, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled and augmented batches ``x[batch, 3, 32, 32]``, float32 from 0 to 1 with channels last, and their labels.

    All is drawn from ``generator`` at once, by the call itself: the generator's state there decides the epoch, whatever
    else is drawn from it between batches. Images that fill no batch are left out. With ``share=(rank, world)`` all
    ranks draw the same, and each gets the rows rank::world of every batch.
    """
    rank, world = share
    if not 1 <= batch <= len(images):
        raise ValueError(f"batch {batch} must be from 1 to the {len(images)} images that there are")
    if not 0 <= rank < world or batch % world:
        raise ValueError(f"share {share} must be (rank, world), rank below world, and world a divisor of batch {batch}")
    steps = len(images) // batch

    def drawn(below: int) -> Tensor:
        return torch.randint(below, (steps, batch), generator=generator, device=generator.device)

    order = torch.randperm(len(images), generator=generator, device=generator.device)[: steps * batch]
    choices = (order.view(steps, batch), drawn(2 * MARGIN + 1), drawn(2 * MARGIN + 1), drawn(2))
    own = (choice[:, rank::world].to(images.pixels.device) for choice in choices)
    return (
        (augmented(images.pixels[chosen], top, left, mirrored.bool()), images.labels[chosen])
        for chosen, top, left, mirrored in zip(*own, strict=True)
    )


def augmented(pixels: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
    """``inputs`` of each image cropped out of itself and its margin of zeros, from row ``top`` and column ``left`` on,
    and mirrored where ``mirrored`` says so; with channels last.
    """
    count, _, height, width = pixels.shape
    padded = F.pad(pixels, (MARGIN,) * 4).permute(0, 2, 3, 1)  # [image, row, column, channel]
    image, row, column = (torch.arange(size, device=pixels.device) for size in (count, height, width))
    row = top[:, None] + row
    column = left[:, None] + torch.where(mirrored[:, None], width - 1 - column, column)
    at = (image[:, None, None] * padded.shape[1] + row[:, :, None]) * padded.shape[2] + column[:, None, :]
    cropped = padded.reshape(-1, 3).index_select(0, at.flatten())  # one row for each pixel: 3 bytes
    return inputs(cropped.view(count, height, width, 3).permute(0, 3, 1, 2))
