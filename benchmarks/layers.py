"""The layers that are measured: the kernels of the paper's Table 1, all layers of two residual networks, and what the
paper leaves out.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from convnorm.layers import Layer, as_layer
from convnorm.uses import observe
from train.models import convnext_tiny, resnet18, resnet50

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
VARIANTS = {  # of a 3x3 kernel, on inputs of 32x32
    "stride2": ((256, 128, 3, 3), {"stride": 2, "padding": 1}),
    "dilation2": ((256, 128, 3, 3), {"dilation": 2, "padding": 2}),
    "groups32": ((256, 8, 3, 3), {"groups": 32, "padding": 1}),
}
DEPTHWISE = "convnext_depthwise"  # the depthwise 7x7 layers of a ConvNeXt-T, on images of 224x224
BEYOND = (*VARIANTS, DEPTHWISE, "resnet50")  # what the paper's Table 1 leaves out


@cache
def layers(name: str) -> tuple[Layer, ...]:
    torch.manual_seed(0)
    if name in NETWORKS:
        return tuple(use.layer for use in observe(NETWORKS[name](), [1, 3, 224, 224]))
    if name == DEPTHWISE:
        return tuple(use.layer for use in observe(convnext_tiny(), [1, 3, 224, 224]) if use.layer.groups > 1)
    if name in VARIANTS:
        shape, options = VARIANTS[name]
        return (as_layer(torch.randn(shape), [32, 32], **options),)
    weight = torch.randn(TABLE1[name])
    return (as_layer(weight, [32, 32], padding=weight.shape[-1] // 2),)


def weights_of(name: str, device: str, gradients: bool) -> list[Tensor]:
    """A new set of the weights on every call."""
    return [layer.weight.detach().clone().to(device).requires_grad_(gradients) for layer in layers(name)]


def size(name: str) -> int:
    """Bytes of the weights."""
    return sum(layer.weight.nbytes for layer in layers(name))
