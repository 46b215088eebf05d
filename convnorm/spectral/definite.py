"""How the largest eigenvalue of a Hermitian matrix is bounded from above, rounding errors included.

A Cholesky factorisation that succeeds proves a matrix positive definite, up to its backward error (Higham, *Accuracy
and Stability of Numerical Algorithms*, theorems 10.3 and 10.7), at a small part of the cost of eigenvalues:

    G <= level    where    (level - error) I - G    has a factorisation
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def factorisation_error(size: int, dtype: torch.dtype) -> float:
    """By how much, relative to its trace, a matrix that has a factorisation may be short of definite.

    (n + 1) u for real numbers, a little more for the products of complex ones.
    """
    return 1.1 * (size + 4) * unit_roundoff(dtype)


def is_below(gram: Tensor, level: float, error: float = 0.0) -> Tensor:
    """Whether all eigenvalues of each positive semidefinite ``gram[..., n, n]``, which itself may be off by ``error``
    (in the spectral norm), are proved to be at most ``level``. Only the upper triangles are read, which is faster.
    """
    n = gram.shape[-1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1).real
    trace = n * level - diagonal.sum(-1, keepdim=True)
    error = error + 4 * unit_roundoff(gram.dtype) * level + factorisation_error(n, gram.dtype) * trace
    rest = -gram
    rest.diagonal(dim1=-2, dim2=-1).add_(level - error)
    return torch.linalg.cholesky_ex(rest, upper=True).info == 0


def largest_eigenvalue(gram: Tensor, error: float = 0.0) -> Tensor:
    """At least the largest eigenvalue of each positive semidefinite ``gram[..., n, n]``, off by ``error`` at most."""
    largest = torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0)
    return largest * (1 + 16 * gram.shape[-1] * unit_roundoff(gram.dtype)) + error
