"""A network with every kind of layer, its training, and Algorithm 1 with dense tensors: for tests of norm decay."""

import math

import oracle
import torch
from torch import nn

from convnorm.layers import TRANSPOSED, as_layer
from convnorm.uses import observe

SHAPE = [2, 3, 8, 8]


class Network(nn.Module):
    """Every kind of layer: merged taps, groups, transposed, depthwise, dilated, an input smaller than its kernel."""

    def __init__(self):
        super().__init__()
        self.reflect = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=3)
        self.transposed = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1)
        self.depthwise = nn.Conv2d(4, 4, 5, stride=(1, 2), padding=2, groups=4)
        self.dilated = nn.Conv1d(4, 3, 5, dilation=3, stride=4)
        self.solid = nn.Conv3d(1, 2, (2, 3, 3), padding=(0, 1, 1))
        self.small = nn.Conv1d(10, 5, 5, padding=2)
        self.linear = nn.Linear(5, 4)

    def forward(self, x):
        x = self.grouped(self.reflect(x).relu()).relu()
        x = self.depthwise(self.transposed(x).relu()).flatten(2)
        x = self.dilated(x.relu())  # [2, 3, 5]
        x = self.solid(x.unflatten(2, (1, 5)).unsqueeze(1)).relu()  # [2, 2, 2, 1, 5]
        x = self.small(x.flatten(1, 3).mT.repeat(1, 2, 1)[..., :2]).relu()
        return self.linear(x.mean(-1))


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return Network().to(dtype)


def largest_sum(use, ord):
    """The norm by the explicit matrix, differentiable."""
    layer = as_layer(use.module, use.in_shape)
    options = dict(layer.options)
    if use.module.__class__ in TRANSPOSED:
        options["output_padding"] = use.layer.output_padding
    channels = layer.in_channels
    basis = torch.eye(channels * math.prod(use.in_shape), dtype=layer.weight.dtype)
    basis = basis.reshape(-1, channels, *use.in_shape)
    matrix = oracle.forward(basis, layer.weight, layer.stride, layer.padding, **options).flatten(1).T
    return matrix.abs().sum(0 if ord == 1 else 1).max()


class DenseDecay:
    """Algorithm 1, as slow and plain as can be."""

    def __init__(self, model, ord, beta, momentum):
        self.uses, self.ord, self.beta, self.momentum = observe(model, SHAPE), ord, beta, momentum
        self.averages = [torch.zeros_like(use.module.weight) for use in self.uses]

    def step(self):
        for i, use in enumerate(self.uses):
            (p,) = torch.autograd.grad(largest_sum(use, self.ord), use.module.weight)
            self.averages[i] = self.momentum * self.averages[i] + (1 - self.momentum) * p
            use.module.weight.grad += self.beta / len(self.uses) * self.averages[i]


def train(model, step, steps, lr=0.05):
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        x = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        step()
        optimizer.step()
    return [p.detach() for p in model.parameters()]
