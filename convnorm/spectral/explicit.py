"""The explicit matrix of a layer, group by group: where it is small, every question has its answer there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import GeometryError, fold
from ..layers import Layer
from ..winners import as_matrix
from .admit import admitted
from .circle import circle_of, groups_of, half_grid, symbol, with_read_taps
from .definite import is_below, largest_eigenvalue, unit_roundoff

LARGEST = 8192  # rows or columns, the fewer of them, of a matrix that is decomposed
CHUNK = 1 << 28  # bytes of Gram matrices at a time
PAIR = 2e6  # what adding up a product of two taps costs, in operations of a product of matrices


def matrix_sizes(layer: Layer) -> tuple[int, int]:
    """(outputs, inputs) of the matrix of one group."""
    return (
        layer.out_channels // layer.groups * math.prod(layer.geometry.out_shape),
        layer.in_channels // layer.groups * math.prod(layer.in_shape),
    )


def explicit_uppers(layer: Layer, level: float) -> Tensor:
    """upper[groups] of a layer in float64: ``level`` where a group's norm is proved to be at most that, else the norm
    itself, rounded up.
    """
    size = min(matrix_sizes(layer))
    uppers = []
    for part in torch.arange(layer.groups, device="cpu").split(max(1, CHUNK // (8 * size**2))):
        own = groups_of(layer, part)
        gram, error = gram_matrices(own), gram_error(own)
        squares = torch.full((own.groups,), level**2, dtype=gram.dtype, device=gram.device)
        above = ~is_below(gram, level**2, error)
        if above.any():
            squares[above] = largest_eigenvalue(gram[above], error)
        uppers.append(squares.sqrt() * (1 + 4 * unit_roundoff(gram.dtype)))
    return torch.cat(uppers).cpu()


def gram_error(layer: Layer) -> float:
    """By how much ``gram_matrices`` are off, in the spectral norm: so many roundings of |M|^T |M|."""
    reads = tap_reads(layer)
    most = np.bincount(reads[reads >= 0]).max(initial=reads.shape[1])  # times that an input is read
    products = most * reads.shape[1] * max(layer.weight.shape[:2])
    l1, linf = torch.ops.convnorm.norms(layer.weight.detach().abs(), *layer.sizes, **layer.options)
    return (products + 8) * unit_roundoff(torch.float64) * 1.01 * float(l1) * float(linf)


def gram_matrices(layer: Layer) -> Tensor:
    """M^T M of each group, or M M^T where that is smaller, [groups, n, n] in float64, from products of taps:

    (M^T M)[x, x'] = sum over outputs, and their taps a and b that read x and x', of K_a^T K_b

    or, where these are more work, from M itself.
    """
    sizes = matrix_sizes(layer)
    more_work = PAIR * layer.weight[0, 0].numel() ** 2 > layer.groups * math.prod(sizes) * min(sizes)
    if more_work and math.prod(sizes) <= LARGEST**2:
        each = torch.arange(layer.groups, device="cpu").split(1)
        matrices = [explicit_matrix(groups_of(layer, group)).detach().double() for group in each]
        return torch.stack([m.T @ m if sizes[1] <= sizes[0] else m @ m.T for m in matrices])
    kernel = as_matrix(layer.weight.detach(), layer.plan).double()
    kernel = kernel.reshape(*kernel.shape[:3], -1)  # [groups, rows, columns, taps]
    reads = tap_reads(layer)
    outputs, taps = reads.shape
    inputs = math.prod(layer.geometry.out_shape if layer.transposed else layer.in_shape)
    by_column = kernel.shape[2] * inputs <= kernel.shape[1] * outputs
    places, channels = (inputs, kernel.shape[2]) if by_column else (outputs, kernel.shape[1])
    gram = kernel.new_zeros(layer.groups, places**2, channels**2)
    for a, b in product(range(taps), repeat=2):
        one, other = kernel[..., a], kernel[..., b]
        if by_column:
            both = (reads[:, a] >= 0) & (reads[:, b] >= 0)
            first, second, block = reads[both, a], reads[both, b], one.mT @ other
        else:
            first, second = _equal(reads[:, a], reads[:, b])
            block = one @ other.mT
        index = torch.from_numpy(first * places + second).to(gram.device)
        gram.index_add_(1, index, block.flatten(1)[:, None].expand(-1, len(index), -1))
    blocks = gram.unflatten(2, (channels, channels)).unflatten(1, (places, places)).transpose(2, 3)
    return blocks.reshape(layer.groups, places * channels, places * channels)


def tap_reads(layer: Layer) -> np.ndarray:
    """[outputs, taps]: the place of the input that an output reads through a tap, -1 for a zero of the padding.

    Of a transposed layer, those of the convolution whose adjoint it is.
    """
    shape = layer.geometry
    inputs, outputs = (shape.out_shape, shape.in_shape) if layer.transposed else (shape.in_shape, shape.out_shape)
    reads = np.zeros((1, 1), np.int64)
    for axis, (n, m) in enumerate(zip(inputs, outputs, strict=True)):
        tap = np.arange(layer.weight.shape[2 + axis]) * shape.dilation[axis] - shape.padding[axis][0]
        own = fold(np.add.outer(np.arange(m) * shape.stride[axis], tap), n, layer.padding_mode)
        joined = reads[:, None, :, None] * n + own[None, :, None, :]
        joined = np.where((reads[:, None, :, None] < 0) | (own[None, :, None, :] < 0), -1, joined)
        reads = joined.reshape(len(reads) * m, -1)
    return reads


def _equal(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of places where two arrays hold the same, and that not negative."""
    order = np.argsort(other, kind="stable")
    low, high = (np.searchsorted(other, one, side, sorter=order) for side in ("left", "right"))
    counts = np.where(one >= 0, high - low, 0)
    first = np.repeat(np.arange(len(one)), counts)
    within = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
    return first, order[np.repeat(low, counts) + within]


def explicit_matrix(layer: Layer) -> Tensor:
    """[outputs, inputs] of a layer of one group, each a channel and its place flattened. Differentiable."""
    kernel = as_matrix(layer.weight, layer.plan)[0]
    kernel = kernel.reshape(*kernel.shape[:2], -1).movedim(2, 0)  # [taps, rows, columns]
    inputs = math.prod(layer.geometry.out_shape if layer.transposed else layer.in_shape)
    reads = tap_reads(layer)
    output, tap = (reads >= 0).nonzero()
    place, tap = (torch.from_numpy(x).to(kernel.device) for x in (output * inputs + reads[output, tap], tap))
    matrix = kernel.new_zeros(len(reads) * inputs, *kernel.shape[1:]).index_add(0, place, kernel[tap])
    matrix = matrix.unflatten(0, (-1, inputs)).permute(2, 0, 3, 1).flatten(2).flatten(0, 1)
    return matrix.T if layer.transposed else matrix


def singular_values(
    layer: nn.Module | Tensor | Layer, in_shape: Sequence[int] = (), *, scale: Tensor | None = None, **options: Any
) -> Tensor:
    """All singular values of a layer's matrix, the largest first, as many as its fewer of rows and columns.

    From the circle where the layer is all of it (circular padding over whole strides, a fully connected layer, kernels
    of one tap), else from the explicit matrix, which must not be too large. In float64; differentiable where they are
    distinct.

    >>> singular_values(torch.tensor([[[1.0, 0.0, -1.0]]]), [6], padding=1)
    tensor([1.8019, 1.8019, 1.2470, 1.2470, 0.4450, 0.4450], dtype=torch.float64)
    """
    one = with_read_taps(admitted(layer, in_shape, options, scale))
    circle = circle_of(one)
    if circle.whole:
        points = [torch.from_numpy(np.arange(n) * (2 * math.pi / n)) for n in circle.points]
        grid = torch.cartesian_prod(*points).view(-1, len(points)) if points else half_grid(())
        values = torch.linalg.svdvals(symbol(circle, grid)).flatten().sort(descending=True).values
        unread = min(map(math.prod, zip((one.groups, one.groups), matrix_sizes(one), strict=True))) - len(values)
        values = F.pad(values, (0, unread))  # zeros of what the layer has beyond its circle, or the circle beyond it
    else:
        rows, columns = matrix_sizes(one)
        if min(rows, columns) > LARGEST or rows * columns > LARGEST**2:
            raise GeometryError(f"convnorm: a matrix of {rows} x {columns} is too large to decompose")
        exact = replace(one, weight=one.weight.double() / circle.scale)
        each = torch.arange(one.groups, device="cpu").split(1)
        values = torch.cat([torch.linalg.svdvals(explicit_matrix(groups_of(exact, group))) for group in each])
    return values.sort(descending=True).values * circle.scale
