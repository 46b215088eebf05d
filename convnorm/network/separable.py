"""Maps that treat every axis by itself: pooling by averages, padding, interpolation, sums, repetition.

Their matrix is the Kronecker product of one small matrix for each axis, whose norms multiply:

    |A x B|_1 = |A|_1 |B|_1        the same for l2 and linf
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .operators import LayerOperator, Operator, Shape
from .rounding import matrix_norm, root, times

MOST_ENTRIES = 1 << 24  # of a matrix whose l2 norm is taken, dense


@dataclass(frozen=True, eq=False)
class Separable(Operator):
    """``matrices[axis]`` is what acts on that axis, in float64, [outputs, inputs], sparse where long axes would make it
    large; the batch is axis 0.

    ``layer`` is the same as a layer, where it can be one: layers before and after it are merged with that.

    >>> mean = Separable((2, 4), {2: torch.full((1, 4), 0.25, dtype=torch.float64)})
    >>> mean.out_shape, [round(mean.norm(ord)[0], 9) for ord in (1, 2, math.inf)]
    ((2, 1), [0.25, 0.5, 1.0])
    """

    in_shape: Shape
    matrices: dict[int, Tensor]
    layer: LayerOperator | None = None

    @property
    def out_shape(self) -> Shape:
        return tuple(len(self.matrices.get(axis, range(n))) for axis, n in enumerate(self.in_shape, 1))

    @property
    def terms(self) -> int:
        return sum(matrix.shape[1] for matrix in self.matrices.values()) + 8

    @property
    def work(self) -> int:
        sizes, work = list(self.in_shape), 0
        for axis, matrix in self.matrices.items():
            work += math.prod(sizes) * len(matrix)
            sizes[axis - 1] = len(matrix)
        return work

    def __call__(self, x: Tensor) -> Tensor:
        for axis, matrix in self.matrices.items():
            x = (x.movedim(axis, -1) @ matrix.to_dense().T).movedim(-1, axis)
        return x

    def measure(self, ord: float, rtol: float) -> tuple[float, str]:
        matrices = self.matrices.values()
        if ord == 2 and any(matrix.numel() > MOST_ENTRIES for matrix in matrices):
            return root(times(self.absolute(1), self.absolute(math.inf))), "l1 and linf norms"
        return times(*(matrix_norm(matrix.to_dense() if ord == 2 else matrix, ord) for matrix in matrices)), "exact"

    def absolute(self, ord: float) -> float:
        return times(*(matrix_norm(matrix, ord) for matrix in self.matrices.values()))


def sparse(rows: Tensor, columns: Tensor, values: Tensor, sizes: tuple[int, int]) -> Tensor:
    """A matrix of these entries, by rows."""
    matrix = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, sizes, check_invariants=False)
    return matrix.coalesce()


def selection(reads: Tensor, n: int) -> Tensor:
    """[outputs, n]: each output one of the inputs, or zero where that is negative.

    >>> selection(torch.tensor([1, -1, 0]), 2).to_dense().tolist()
    [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    """
    rows = (reads >= 0).nonzero().squeeze(1)
    return sparse(rows, reads[rows], torch.ones(len(rows), dtype=torch.float64), (len(reads), n))


def ranges(n: int, starts: Sequence[int], ends: Sequence[int], divisors: Sequence[float]) -> Tensor:
    """[outputs, n]: each output the sum of a range of inputs, as far as there are any, over its divisor.

    >>> ranges(3, [-1, 1], [2, 4], [3, 3]).to_dense().mul(3).tolist()
    [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
    """
    inside = [range(max(start, 0), min(end, n)) for start, end in zip(starts, ends, strict=True)]
    counts = torch.tensor([len(one) for one in inside])
    values = torch.tensor(divisors, dtype=torch.float64).reciprocal().repeat_interleave(counts)
    rows = torch.arange(len(inside)).repeat_interleave(counts)
    return sparse(rows, torch.tensor([x for one in inside for x in one]), values, (len(inside), n))


def average(n: int, outputs: int, kernel: int, stride: int, padding: int, counts_padding: bool) -> Tensor:
    """One axis of average pooling as PyTorch defines it: a window that ends beyond the padding is cut there, and its
    divisor with it; ``counts_padding`` says whether the divisor has what lies in the padding.
    """
    starts = [o * stride - padding for o in range(outputs)]
    ends = [min(start + kernel, n + padding) for start in starts]
    if counts_padding:
        return ranges(n, starts, ends, [end - start for start, end in zip(starts, ends, strict=True)])
    return ranges(n, starts, ends, [min(end, n) - max(start, 0) for start, end in zip(starts, ends, strict=True)])


def adaptive_windows(n: int, outputs: int) -> tuple[list[int], list[int]]:
    """Where the windows of adaptive pooling start and end: floor(o n / m) and ceil((o + 1) n / m).

    >>> adaptive_windows(5, 2)
    ([0, 2], [3, 5])
    """
    return [o * n // outputs for o in range(outputs)], [-(-(o + 1) * n // outputs) for o in range(outputs)]
