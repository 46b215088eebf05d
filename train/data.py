"""CIFAR-10, from the files of its binary version, cifar-10-binary.tar.gz of www.cs.toronto.edu/~kriz/cifar.html.

A file is rows of bytes: a label, then the red, the green and the blue plane of its image, each row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = "cifar-10-batches-bin"  # as the archive unpacks
TRAINING = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = ("test_batch.bin",)
CLASSES = 10
IMAGE = (3, 32, 32)

MEAN = (0.4914, 0.4822, 0.4465)  # of each channel over the training images, whose pixels are from 0 to 1
DEVIATION = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Images:
    """``pixels[images, 3, 32, 32]``, uint8, and ``labels[images]``, int64 from 0 to 9."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def cifar10(directory: str | Path) -> tuple[Images, Images]:
    """The training images and the test images, in the order of the files.

    ``directory`` holds the files themselves, or the folder of them that the archive unpacks to.
    """
    folder = Path(directory)
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    missing = [name for name in (*TRAINING, *TEST) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"data {str(folder)!r} has no {', '.join(missing)}: these are of CIFAR-10's binary version"
        )
    return _read(folder, TRAINING), _read(folder, TEST)


def _read(folder: Path, names: tuple[str, ...]) -> Images:
    rows = torch.from_numpy(np.concatenate([_rows(folder / name) for name in names]))
    return Images(rows[:, 1:].reshape(-1, *IMAGE), rows[:, 0].long())


def _rows(file: Path) -> np.ndarray:
    """[images, a byte for the label and one for each pixel and channel]."""
    content, size = np.fromfile(file, np.uint8), 1 + np.prod(IMAGE)
    if len(content) == 0 or len(content) % size:
        raise ValueError(f"data {str(file)!r} of {len(content)} bytes is not made of rows of {size}")
    rows = content.reshape(-1, size)
    if (largest := rows[:, 0].max()) >= CLASSES:
        raise ValueError(f"data {str(file)!r} has label {largest}, which must be less than {CLASSES}")
    return rows


def normalised(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 numbers, each channel of mean 0 and deviation 1 over the training images.

    >>> normalised(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    tensor([2.0591, 2.1265, 2.1158])
    """
    mean, deviation = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (pixels / 255 - mean) / deviation
