"""SENet (Hu, Shen and Sun, 2018) of pre-activation blocks (He et al., Identity Mappings, 2016), for CIFAR."""

from __future__ import annotations

from torch import Tensor, nn

from .residual import StagedNetwork, channels


class Excitation(nn.Module):
    """Every channel times a gate between 0 and 1, which a small network computes from all channels' averages."""

    def __init__(self, width: int, reduction: int = 16) -> None:
        super().__init__()
        squeezed = max(1, width // reduction)
        self.gates = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, width, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gates(x)


class PreActivation(nn.Module):
    """excitation(branch(y)) + x for y = relu(norm(x)), with a 1x1 convolution of y for x where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.excitation = Excitation(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(x)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.excitation(self.branch(y)) + shortcut


def senet18_cifar(classes: int = 10, width: float = 1) -> StagedNetwork:
    """11.3 million parameters."""
    stem, *_ = widths = [channels(full, width) for full in (64, 128, 256, 512)]
    return StagedNetwork(PreActivation, [2, 2, 2, 2], widths, [1, 2, 2, 2], classes=classes, stem=stem)
