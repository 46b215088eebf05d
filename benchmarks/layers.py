"""The layers that are measured: the kernels of the paper's Table 1, and all layers of two residual networks."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from convnorm.layers import Layer, as_layer, observe
from train.models import resnet18, resnet50

TABLE1 = {  # height x width x inputs x outputs, on inputs of 32x32
    f"{height}x{width}x{inputs}x{outputs}": (outputs, inputs, height, width)
    for height, width, inputs, outputs in (
        (3, 3, 32, 32),
        (3, 3, 32, 128),
        (3, 3, 128, 256),
        (3, 3, 256, 512),
        (5, 5, 256, 128),
        (5, 5, 512, 256),
    )
}
NETWORKS = {"resnet18": resnet18, "resnet50": resnet50}  # on images of 224x224


@cache
def layers(name: str) -> tuple[Layer, ...]:
    torch.manual_seed(0)
    if name in NETWORKS:
        return tuple(use.layer for use in observe(NETWORKS[name](), [1, 3, 224, 224]))
    weight = torch.randn(TABLE1[name])
    return (as_layer(weight, [32, 32], padding=weight.shape[-1] // 2),)


def weights_of(name: str, device: str, gradients: bool) -> list[Tensor]:
    """A new set of the weights on every call."""
    return [layer.weight.detach().clone().to(device).requires_grad_(gradients) for layer in layers(name)]


def size(name: str) -> int:
    """Bytes of the weights."""
    return sum(layer.weight.nbytes for layer in layers(name))
