"""Residual networks (He et al., 2016), for ImageNet and for CIFAR."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x)); the branch is two 3x3 convolutions, or 1x1, 3x3, 1x1 around a bottleneck."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            convs = [conv_norm(inputs, width, 1), conv_norm(width, width, 3, stride), conv_norm(width, outputs, 1)]
        else:
            convs = [conv_norm(inputs, width, 3, stride), conv_norm(width, width, 3)]
        self.branch = nn.Sequential(*[part for conv in convs for part in (conv, nn.ReLU())][:-1])
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class ResNet(nn.Sequential):
    """Stages of residual blocks, each of half the resolution of the one before; a global average; a linear layer."""

    def __init__(
        self, blocks: list[int], width: int, *, classes: int, bottleneck: bool = False, small_images: bool = True
    ) -> None:
        if small_images:
            stem = [conv_norm(3, width, 3), nn.ReLU()]
        else:
            stem = [conv_norm(3, width, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(Residual(inputs, width * 2**stage, stride, bottleneck))
                inputs = width * 2**stage * (4 if bottleneck else 1)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
        super().__init__(nn.Sequential(*stem), *stages, nn.Sequential(*head))


def resnet20() -> ResNet:
    """The 20-layer network for CIFAR-10: 0.27 million parameters."""
    return ResNet([3, 3, 3], 16, classes=10)


def resnet18() -> ResNet:
    """For ImageNet: 11.7 million parameters."""
    return ResNet([2, 2, 2, 2], 64, classes=1000, small_images=False)


def resnet50() -> ResNet:
    """For ImageNet, with bottlenecks: 25.6 million parameters."""
    return ResNet([3, 4, 6, 3], 64, classes=1000, bottleneck=True, small_images=False)
