"""Models as the matrices that they are, and functions as models."""

import math

import torch
from torch import nn

from convnorm.network import operators

ORDS = (1, 2, math.inf)


class Of(nn.Module):
    """A function as a model."""

    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, *x):
        return self.function(*x, **dict(self.named_buffers(recurse=False)))


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_of(model, shape):
    """The model less its constant, on the identity, [outputs, inputs] in float64."""
    size = math.prod(shape)
    basis = torch.cat([torch.eye(size, dtype=torch.float64), torch.zeros(1, size, dtype=torch.float64)])
    with torch.no_grad():
        y = model.double().eval()(basis.view(-1, *shape)).flatten(1)
    return (y[:-1] - y[-1:]).T


def norm_of(matrix, ord):
    return torch.linalg.matrix_norm(matrix, ord).item()


def batch_normed(channels, kind=nn.BatchNorm2d):
    norm = kind(channels)
    with torch.no_grad():
        norm.weight.copy_(normal(channels, seed=2))
        norm.running_var.copy_(normal(channels, seed=3).abs() + 0.1)
        norm.running_mean.copy_(normal(channels, seed=4))
    return norm


def largest_jacobian(model, shape, ord, points):
    """The largest norm of explicit Jacobians."""
    model = model.double().eval()
    jacobians = torch.vmap(torch.func.jacrev(lambda x: model(x[None])[0].flatten()))(points.view(-1, *shape))
    return torch.linalg.matrix_norm(jacobians.flatten(2), ord).max().item()


def without_matrices(monkeypatch):
    """Composite operators are never small: only what is merged is composed."""
    monkeypatch.setattr(operators, "MOST_ENTRIES", 0)


def is_map_of(row, model, shape):
    """Whether a row of a report has the norms of a model."""
    matrix = matrix_of(model, shape)
    norms = ((row.norms.l1, 1), (row.norms.linf, math.inf))
    return all(math.isclose(found, norm_of(matrix, ord), rel_tol=1e-9) for found, ord in norms)
