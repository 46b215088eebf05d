"""VGG (Simonyan and Zisserman, 2015) with batch norm, for CIFAR."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from .residual import channels


class VGG(nn.Sequential):
    """Stages of 3x3 convolutions, a pooling to half the resolution after each; a linear layer.

    Five stages bring an image of 32x32 to a single point.
    """

    def __init__(self, stages: Sequence[Sequence[int]], *, classes: int) -> None:
        parts, inputs = OrderedDict[str, nn.Module](), 3
        for number, widths in enumerate(stages, 1):
            layers = []
            for width in widths:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            parts[f"stage{number}"] = nn.Sequential(*layers, nn.MaxPool2d(2))
        parts["head"] = nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))
        super().__init__(parts)


def vgg11_cifar(classes: int = 10, width: float = 1) -> VGG:
    """9.2 million parameters. Its last two convolutions have inputs of 2x2, smaller than their kernels."""
    stages = [[64], [128], [256, 256], [512, 512], [512, 512]]
    return VGG([[channels(full, width) for full in stage] for stage in stages], classes=classes)
