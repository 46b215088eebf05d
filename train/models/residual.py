"""Networks of residual blocks: ResNet (He et al., 2016) and RegNetX (Radosavovic et al., 2020)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x)); where the branch changes the shape, the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, branch: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def basic_block(inputs: int, outputs: int, stride: int) -> Residual:
    """3x3, 3x3."""
    branch = [*conv_norm(inputs, outputs, 3, stride), nn.ReLU(), *conv_norm(outputs, outputs, 3)]
    return Residual(inputs, outputs, stride, branch)


def bottleneck_block(inputs: int, outputs: int, stride: int, width: int, groups: int = 1) -> Residual:
    """1x1 to ``width`` channels, 3x3 between them, 1x1."""
    first = [*conv_norm(inputs, width, 1), nn.ReLU()]
    second = [*conv_norm(width, width, 3, stride, groups), nn.ReLU()]
    return Residual(inputs, outputs, stride, [*first, *second, *conv_norm(width, outputs, 1)])


def narrow_block(inputs: int, outputs: int, stride: int) -> Residual:
    """ResNet's bottleneck: a quarter of the outputs wide."""
    return bottleneck_block(inputs, outputs, stride, outputs // 4)


def grouped_block(inputs: int, outputs: int, stride: int, group_width: int) -> Residual:
    """RegNetX's: of one width throughout, its 3x3 in groups of ``group_width`` channels."""
    return bottleneck_block(inputs, outputs, stride, outputs, outputs // group_width)


class StagedNetwork(nn.Sequential):
    """A stem; stages of blocks, the first of each with the stage's stride; a global average; a linear layer.

    ``block(inputs, outputs, stride)`` makes a block. A stem for small images is a 3x3 convolution, another one takes
    them to a quarter of their resolution.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        *,
        classes: int,
        stem: int = 64,
        small_images: bool = True,
    ) -> None:
        first = conv_norm(3, stem, 3) if small_images else conv_norm(3, stem, 7, stride=2)
        pool = [] if small_images else [nn.MaxPool2d(3, stride=2, padding=1)]
        parts, inputs = OrderedDict(stem=nn.Sequential(*first, nn.ReLU(), *pool)), stem
        for number, (depth, width, stride) in enumerate(zip(depths, widths, strides, strict=True), 1):
            blocks = [block(inputs, width, stride), *(block(width, width, 1) for _ in range(depth - 1))]
            parts[f"stage{number}"] = nn.Sequential(*blocks)
            inputs = width
        parts["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
        super().__init__(parts)


class ResNet(StagedNetwork):
    """Every stage has half the resolution and twice the width of the one before."""

    def __init__(
        self, depths: Sequence[int], width: int, *, classes: int, bottleneck: bool = False, small_images: bool = True
    ) -> None:
        block, expansion = (narrow_block, 4) if bottleneck else (basic_block, 1)
        widths = [width * expansion * 2**stage for stage in range(len(depths))]
        strides = [1] + [2] * (len(depths) - 1)
        super().__init__(block, depths, widths, strides, classes=classes, stem=width, small_images=small_images)


def resnet20(classes: int = 10) -> ResNet:
    """The 20-layer network for CIFAR-10, with 1x1 shortcuts: 0.27 million parameters."""
    return ResNet([3, 3, 3], 16, classes=classes)


def channels(full: int, width: float, multiple: int = 1) -> int:
    """``width`` times as many, rounded to a multiple, which is also the least.

    >>> channels(152, 1, 8), channels(152, 0.25, 8), channels(24, 0.125, 8)
    (152, 40, 8)
    """
    return max(1, round(full * width / multiple)) * multiple


def resnet18_cifar(classes: int = 10, width: float = 1) -> ResNet:
    """11.2 million parameters."""
    return ResNet([2, 2, 2, 2], channels(64, width), classes=classes)


def resnet18(classes: int = 1000) -> ResNet:
    """For ImageNet: 11.7 million parameters."""
    return ResNet([2, 2, 2, 2], 64, classes=classes, small_images=False)


def resnet50(classes: int = 1000) -> ResNet:
    """For ImageNet, with bottlenecks: 25.6 million parameters."""
    return ResNet([3, 4, 6, 3], 64, classes=classes, bottleneck=True, small_images=False)


def regnetx_200mf_cifar(classes: int = 10, width: float = 1) -> StagedNetwork:
    """2.3 million parameters, 13 of its convolutions grouped."""
    block = partial(grouped_block, group_width=8)
    widths = [channels(full, width, 8) for full in (24, 56, 152, 368)]
    return StagedNetwork(block, [1, 1, 4, 7], widths, [1, 1, 2, 2], classes=classes, stem=channels(64, width))
