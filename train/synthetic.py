"""A small data set made of nothing but integers and a frozen generator: the same bits on every machine, and no file.

Each of 10 classes has a pattern of coarse coloured squares. An image blends its own class's with another class's, each
shifted, and noise. The other's share goes up to a half, so that some images can only be guessed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TRAINING, TEST = 5_000, 1_000
CLASSES = 10
SIZE, SQUARES = 32, 4  # of an image, in pixels and in squares
SHARES = 32  # what the two patterns' add up to
SEED = 0


def images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images, each as ``pixels[images, 3, 32, 32]``, channels last, and ``labels[images]``."""
    count, side = TRAINING + TEST, SIZE // SQUARES
    random = np.random.PCG64(SEED)  # its raw output is frozen; what NumPy's distributions make of it is not

    def drawn(*shape: int) -> np.ndarray:
        """Bytes."""
        size = int(np.prod(shape))
        return random.random_raw(-(-size // 8)).astype("<u8").view(np.uint8)[:size].reshape(shape)

    squares = 64 + (drawn(CLASSES, SQUARES, SQUARES, 3) >> 1)  # from 64 to 191
    patterns = squares.repeat(side, axis=1).repeat(side, axis=2)
    shifts = [(down, right) for down in range(side) for right in range(side)]
    shifted = np.stack(
        [np.roll(patterns, shift, axis=(1, 2)) for shift in shifts]
    )  # [shift, class, row, column, channel]

    label = drawn(count) % CLASSES
    other = (label + 1 + drawn(count) % (CLASSES - 1)) % CLASSES
    share = (SHARES - drawn(count) % (SHARES // 2 + 1)).astype(np.int16).reshape(-1, 1, 1, 1)  # from 16 to 32
    pixels = shifted[drawn(count) % len(shifts), label] * share
    pixels += shifted[drawn(count) % len(shifts), other] * (SHARES - share)
    pixels >>= 5
    pixels += drawn(*pixels.shape).view(np.int8) >> 2  # noise from -32 to 31
    result = torch.from_numpy(pixels.astype(np.uint8)).permute(0, 3, 1, 2), torch.from_numpy(label).long()
    return tuple(part[:TRAINING] for part in result), tuple(part[TRAINING:] for part in result)
