"""Singular value clipping: the nearest kernel whose convolution has no singular value above a bound.

On a circle a convolution is block diagonal (``circle.py``), and the nearest one of norm at most ``c`` is had block by
block (Sedghi, Gupta and Long, *The Singular Values of Convolutional Layers*, 2019):

    K(f) = U S V^*    ->    U min(S, c) V^*

Its kernel reaches all round the circle. Cut to the taps that the layer has, as in their experiments, it exceeds the
bound again. The nearest kernel *of these taps*,

    minimise ||w - w0||^2   such that   ||K_w(f)|| <= c   at each frequency f,

comes of alternating projections, between the kernels of these taps and the circle's convolutions of norm at most ``c``,
with Dykstra's corrections ``Y``. They are the steps of the proximal gradient method on the dual problem,

    w = w0 - A* Y,    Y(f) <- U max(S - step c, 0) V^*    where    U S V^* = Y(f) + step K_w(f)

with ``A`` the map ``w -> K_w`` and ``A*`` its adjoint, so that Nesterov's momentum makes them faster. The corrections
are zero where the bound is slack: only frequencies at which it was exceeded take part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import GeometryError
from ..layers import Layer
from ..winners import as_matrix
from .admit import admitted
from .circle import circle_of, half_grid, power_of_two, waves
from .definite import is_below
from .on_circle import GramSymbol

CHUNK = 1 << 25  # bytes of blocks at a time
NEAR = 1e-5  # relative to the bound: what is left over it, rescaling takes away
SQUARED = 1e-4  # singular values relative to the largest, of which the squares are precise to eight digits
MOST_STEPS = 2000


def clip_singular_values(
    layer: nn.Module | Tensor, in_shape: Sequence[int], bound: float, *, cut: bool = False, **options: Any
) -> Tensor:
    """The nearest kernel to the layer's that has singular values of at most ``bound``: [out, in / groups, *in_shape].

    As published: for stride 1 and circular padding that keeps the size of the input. The kernel is as large as that,
    its taps go on from the layer's own. ``cut`` leaves but the layer's own, as Sedghi et al. train with: the norm may
    then exceed the bound. ``convnorm.project(..., ord=2, method="clip")`` gives the nearest kernel of these taps, for
    any layer.

    >>> from convnorm.layers import as_layer
    >>> conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    >>> kernel = clip_singular_values(conv, [8, 8], bound=0.25)
    >>> kernel.shape
    torch.Size([4, 3, 8, 8])
    >>> clipped = as_layer(kernel, [8, 8], padding=[1, 6, 1, 6], padding_mode="circular")
    >>> x = torch.randn(1, 3, 8, 8)
    >>> bool(torch.linalg.vector_norm(clipped(x)) <= 0.25001 * torch.linalg.vector_norm(x))
    True
    """
    one = admitted(layer, in_shape, options)
    _check_published(one)
    if not bound >= 0:
        raise GeometryError(f"convnorm: bound {bound} must be at least 0")
    weight, sizes = one.weight.detach(), one.in_shape
    scale = power_of_two(weight)
    kernel = as_matrix(weight, one.plan).double() / scale
    axes = tuple(range(3, kernel.dim()))
    if axes:
        kernel = torch.fft.rfftn(kernel, sizes, axes)
    blocks = kernel.movedim((1, 2), (-2, -1))
    blocks = blocks - excess(blocks.flatten(0, -3), bound / scale).view(blocks.shape)
    kernel = blocks.movedim((-2, -1), (1, 2))
    if axes:
        kernel = torch.fft.irfftn(kernel, sizes, axes)
    full = (kernel * scale).flatten(0, 1).to(weight.dtype)
    return full[tuple(map(slice, weight.shape))] if cut else full


def _check_published(layer: Layer) -> None:
    what = "is not what singular value clipping is published for:"
    if layer.transposed:
        raise GeometryError(f"convnorm: transposed {layer.transposed} {what} a convolution")
    for name in ("stride", "dilation"):
        if set(getattr(layer, name)) - {1}:
            raise GeometryError(f"convnorm: {name} {list(getattr(layer, name))} {what} 1 on each axis")
    taps = layer.weight.shape[2:]
    if layer.padding_mode != "circular" and max(taps, default=1) > 1:
        raise GeometryError(f"convnorm: padding_mode {layer.padding_mode!r} {what} 'circular'")
    if layer.geometry.out_shape != layer.in_shape:
        raise GeometryError(f"convnorm: padding {list(layer.padding)} {what} as many outputs as inputs")
    if any(k > n for k, n in zip(taps, layer.in_shape, strict=True)):
        raise GeometryError(f"convnorm: in_shape {list(layer.in_shape)} {what} not smaller than the kernel")


def excess(blocks: Tensor, bound: float) -> Tensor:
    """What ``blocks[F, rows, columns]`` have over a bound: U max(S - bound, 0) V^*, which taken away from them leaves
    the nearest ones of singular values at most ``bound``. Those that are within it are not decomposed.
    """
    over = torch.zeros_like(blocks)
    if not len(blocks):
        return over
    sizes = torch.linalg.vector_norm(blocks, dim=(1, 2))
    decompose = _by_eigenvalues if bound > SQUARED * sizes.max() else partial(torch.linalg.svd, full_matrices=False)
    for some in (sizes > bound).nonzero().squeeze(1).split(max(1, CHUNK // (16 * blocks[0].numel()))):
        u, s, vh = decompose(blocks[some])
        over[some] = u * (s - bound).clamp_min(0)[:, None] @ vh
    return over


def _by_eigenvalues(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition by that of the smaller Gram matrix: sooner, and as good where it is needed, that
    is for singular values above ``SQUARED`` times the largest.
    """
    if blocks.shape[1] < blocks.shape[2]:
        u, s, vh = _by_eigenvalues(blocks.mH)
        return vh.mH, s, u.mH
    squares, v = torch.linalg.eigh(blocks.mH @ blocks)
    s = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
    return blocks @ v / s[:, None], s, v.mH


class Use:
    """A weight in one of its uses: the linear map from the weight, flat, to the symbol on the circle; its adjoint.

    The inner product of two symbols is that of their convolutions' kernels on the circle. A frequency stands for
    itself and its negative, which is the ``share`` that it has of the circle.
    """

    def __init__(self, layer: Layer) -> None:
        count = layer.weight.numel()
        numbered = torch.arange(1, count + 1, dtype=torch.float64, device=layer.weight.device)
        self._layer = replace(layer, weight=numbered.view(layer.weight.shape))
        circle = circle_of(self._layer)
        self.factor = circle.factor
        self._shape = circle.kernel.shape  # [groups, rows, columns, *taps]
        number = (circle.kernel * circle.scale).flatten().long()
        # a weight that reads nothing but padding has no place on the circle: it goes behind the last
        self._place = torch.full((count,), len(number), device=number.device)
        self._place[number[number > 0] - 1] = number.nonzero().squeeze(1)
        taps, arcs = self._shape[3:], circle.arcs
        # of one tap, all frequencies of an axis are the same
        points = [1 if k == 1 else arc.points for k, arc in zip(taps, arcs, strict=True)]
        grid = half_grid(points)
        self._phases = grid * torch.tensor([float(arc.spacing) for arc in arcs], dtype=torch.float64, device="cpu")
        off = ((grid / math.pi).round() * math.pi - grid).abs()
        self._share = (torch.where((off < 1e-9).all(1), 1.0, 2.0).double() / math.prod(points)).to(number.device)
        places = [torch.arange(k, device="cpu") for k in taps]
        self._wave = waves(self._phases, places).reshape(len(grid), -1).to(number.device)

    def square(self, frequencies: Tensor) -> float:
        """|A|^2, at some frequencies: 1 at all of them, or how many taps meet on a point of the circle."""
        wave = self._wave[frequencies]
        gram = ((wave.conj() * self._share[frequencies, None]).T @ wave).real
        return torch.linalg.eigvalsh(gram)[-1].item()

    def blocks(self, w: Tensor, frequencies: Tensor) -> Tensor:
        """A w, at some frequencies: [F, groups, rows, columns]."""
        kernel = w.new_zeros(math.prod(self._shape) + 1).index_copy(0, self._place, w)[:-1].view(*self._shape[:3], -1)
        return torch.einsum("ft,grct->fgrc", self._wave[frequencies], kernel.to(self._wave.dtype))

    def adjoint(self, blocks: Tensor, frequencies: Tensor) -> Tensor:
        """A* of blocks that are zero at other frequencies."""
        wave = self._wave[frequencies].conj() * self._share[frequencies, None]
        kernel = torch.einsum("ft,fgrc->grct", wave, blocks).real
        return F.pad(kernel.flatten(), (0, 1))[self._place]

    def exceeding(self, w: Tensor, bound: float) -> Tensor:
        """The frequencies at which the norm is not proved to be at most ``bound``, in any group."""
        circle = circle_of(replace(self._layer, weight=w.view(self._layer.weight.shape)))
        square = (bound / circle.scale) ** 2
        within = [is_below(gram, square).all(0) for _, gram in GramSymbol(circle).at(self._phases)]
        return (~torch.cat(within)).nonzero().squeeze(1)


def nearest(weight: Tensor, layers: Sequence[Layer], bound: float) -> Tensor:
    """The weight nearest to ``weight`` whose norm on the circle is at most ``bound``, but for ``NEAR``, in each use.

    In float64.
    """
    scale = power_of_two(weight)
    w0 = weight.detach().double().flatten() / scale
    problem = _Dual(w0, [Use(replace(layer, weight=weight.detach())) for layer in layers], bound / scale)
    w = w0
    while problem.extend(w):
        w = problem.solve()
    return (w * scale).view(weight.shape)


class _Dual:
    """The corrections of each use, at its frequencies where the bound was exceeded."""

    def __init__(self, w0: Tensor, uses: Sequence[Use], bound: float) -> None:
        self._w0, self._uses = w0, uses
        self._bounds = [bound / use.factor for use in uses]
        self._active = [torch.empty(0, dtype=torch.long, device=w0.device) for _ in uses]
        self._corrections = [use.blocks(w0, active) for use, active in zip(uses, self._active, strict=True)]

    def extend(self, w: Tensor) -> bool:
        """Take in the frequencies where the bound is exceeded, if any were not in yet."""
        grown = False
        for i, use in enumerate(self._uses):
            over = use.exceeding(w, self._bounds[i] * (1 + 2 * NEAR))
            new = over[~torch.isin(over, self._active[i])]
            if len(new):
                self._active[i] = torch.cat([self._active[i], new])
                zeros = torch.zeros_like(use.blocks(w, new))
                self._corrections[i] = torch.cat([self._corrections[i], zeros])
                grown = True
        return grown

    def solve(self) -> Tensor:
        """The nearest weight that is within the bound at the frequencies taken in so far, but for ``NEAR``."""
        step = 1 / sum(map(Use.square, self._uses, self._active))
        ahead, momentum = self._corrections, 1.0
        for _ in range(MOST_STEPS):
            w = self._w0 - sum(map(Use.adjoint, self._uses, ahead, self._active))
            stepped, off = [], 0.0
            for use, bound, active, y in zip(self._uses, self._bounds, self._active, ahead, strict=True):
                moved = y + step * use.blocks(w, active)
                stepped.append(excess(moved.flatten(0, 1), step * bound).view(moved.shape))
                # so far, in units of the bound, is the symbol of w from one that is within it
                change = torch.linalg.vector_norm(stepped[-1] - y, dim=(2, 3))
                off = max(off, change.amax().item() / (step * bound)) if len(active) else off
            pairs = list(zip(ahead, stepped, self._corrections, strict=True))
            turned = sum(torch.sum((y - new).conj() * (new - old)).real for y, new, old in pairs) > 0
            previous, momentum = (1.0, 1.0) if turned else (momentum, (1 + math.sqrt(1 + 4 * momentum**2)) / 2)
            ahead = [new + (previous - 1) / momentum * (new - old) for _, new, old in pairs]
            self._corrections = stepped
            if off <= NEAR:
                break
        return w
