"""The networks of the experiments and benchmarks, a file for each family.

Those whose names end in ``_cifar`` are the paper's four, as github.com/kuangliu/pytorch-cifar defines them, from where
the authors' release has them. ``resnet18``, ``resnet50`` and ``convnext_tiny`` are torchvision's. New weights are
PyTorch's default, in ``convnext_tiny`` as in the original.
"""

from collections.abc import Callable

from torch import nn

from .convnext import ConvNeXt, convnext_tiny
from .residual import ResNet, StagedNetwork, regnetx_200mf_cifar, resnet18, resnet18_cifar, resnet20, resnet50
from .senet import senet18_cifar
from .vgg import VGG, vgg11_cifar

PAPER: dict[str, Callable[..., nn.Module]] = {  # called with the number of classes and a factor of all widths
    "vgg11": vgg11_cifar,
    "resnet18": resnet18_cifar,
    "senet18": senet18_cifar,
    "regnetx200mf": regnetx_200mf_cifar,
}

__all__ = [
    "PAPER",
    "VGG",
    "ConvNeXt",
    "ResNet",
    "StagedNetwork",
    "convnext_tiny",
    "regnetx_200mf_cifar",
    "resnet18",
    "resnet18_cifar",
    "resnet20",
    "resnet50",
    "senet18_cifar",
    "vgg11_cifar",
]
