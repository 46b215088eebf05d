"""ConvNeXt (Liu et al., 2022), for ImageNet, without stochastic depth."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each point of a feature map."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + scale * (a depthwise 7x7 convolution, a norm, and two fully connected layers at each point)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), 1e-6))  # so that a new block is nearly the identity
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)  # channels last, as the layers for points take them
        y = self.scale * self.contract(F.gelu(self.expand(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Sequential):
    """A stem to a quarter of the resolution; stages of blocks, each of half the resolution of the one before; a global
    average; a norm; a linear layer.
    """

    def __init__(self, depths: Sequence[int], widths: Sequence[int], *, classes: int) -> None:
        parts = OrderedDict(stem=nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0])))
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            if number > 1:
                inputs = widths[number - 2]
                parts[f"halving{number}"] = nn.Sequential(ChannelNorm(inputs), nn.Conv2d(inputs, width, 2, stride=2))
            parts[f"stage{number}"] = nn.Sequential(*(Block(width) for _ in range(depth)))
        last = widths[-1]
        head = [nn.AdaptiveAvgPool2d(1), ChannelNorm(last), nn.Flatten(), nn.Linear(last, classes)]
        super().__init__(parts | {"head": nn.Sequential(*head)})
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


def convnext_tiny(classes: int = 1000) -> ConvNeXt:
    """28.6 million parameters."""
    return ConvNeXt([3, 3, 9, 3], [96, 192, 384, 768], classes=classes)
