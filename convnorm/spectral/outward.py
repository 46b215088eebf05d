"""How a bound leaves a method: rounded away from the norm, with the gradient of what attains it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..geometry import GeometryError

EPS = torch.finfo(torch.float64).eps  # twice the largest relative error of one operation
LEAST = 5e-324  # the smallest number there is


def upward(bound: Tensor, scale: float) -> Tensor:
    """At least ``bound * scale``, and 0 for 0. For a bound that is itself a few operations from an upper one.

    >>> upward(torch.tensor(1.5, dtype=torch.float64), 5e-324).item()  # the product would be rounded to 1e-323
    1.5e-323
    """
    return bound * (1 + 8 * EPS) * scale + LEAST * bound.detach().sign()


def carried(bound: Tensor, attained: Tensor) -> Tensor:
    """``bound``, with the relative gradient of ``attained``; none where that is 0.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> carried(torch.tensor(12.0), 5 * x)
    tensor(12., grad_fn=<MulBackward0>)
    """
    at = attained.detach()
    return bound.detach() * (1 + (attained - at) / at.where(at > 0, 1))


def norms_from_above(matrices: Tensor) -> Tensor:
    """[...]: at least the spectral norm of each of ``matrices[..., rows, columns]``, real or complex.

    The root of the largest eigenvalue of the smaller Gram matrix. Sums of ``m`` products are off by at most ``2 (m + 2)
    EPS`` times those of their absolute values, which in the spectral norm are at most the trace.
    """
    gram = smaller_gram(matrices)
    trace = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    error = 2 * (max(matrices.shape[-2:]) + 2) * EPS * trace
    largest = trace if gram.shape[-1] == 1 else torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0)
    # an eigenvalue is that of a matrix that differs by a modest multiple of n roundoffs
    return (largest + error + 8 * gram.shape[-1] * EPS * trace).sqrt()


def smaller_gram(matrices: Tensor) -> Tensor:
    """M^* M, or M M^* where that is smaller."""
    rows, columns = matrices.shape[-2:]
    return matrices @ matrices.mH if rows < columns else matrices.mH @ matrices


def attained_norm(matrix: Tensor) -> Tensor:
    """|M v| for the singular vector v of the largest singular value: differentiable once, where it repeats too."""
    wide = matrix.shape[-2] < matrix.shape[-1]
    vector = torch.linalg.eigh(smaller_gram(matrix.detach()))[1][..., -1:]
    matrix = once(matrix)
    return once(torch.linalg.vector_norm((matrix.mH if wide else matrix) @ vector))


def once(x: Tensor) -> Tensor:
    """``x``, without second derivatives. For a weight, and for what comes of it with singular vectors held fixed: these
    turn with the weight, which first derivatives do not see and second ones would have to.
    """
    return _Once.apply(x)


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Derivative.apply(grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _Derivative.apply(tangent)


class _Derivative(_Once):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise GeometryError("convnorm: this l2 norm has first derivatives, and no second ones: singular_values has")

    jvp = backward
