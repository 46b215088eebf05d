"""The largest singular value from below: Lanczos, begun with what it finds on an input half as large, made wider.

The largest singular vectors of a convolution are waves, of a frequency and of channels that hardly depend on the size
of the input, under an envelope that fills it. So most of the search is done on small inputs, where it costs little,
and a few steps at full size are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Layer
from .admit import admitted, admitted_start, at_least_one
from .circle import with_read_taps
from .krylov import Lanczos, in_precision
from .rayleigh import Singular, in_best_group, rayleigh

SMALLEST = 16  # inputs that an axis is left with, and so many times its kernel: on fewer, other waves may win,
SPANS, ROUGH_SPANS = 5, 3  # by some thousandths
ROUGH = 1e-3
SHARPER = 0.15  # the search keeps to the wave that it begins with, which ought to be the right one
SHARPEST = 1e-6
NOISE = 0.1  # keeps the start from being blind to other waves


def lanczos(
    layer: nn.Module | Tensor | Layer,
    in_shape: Sequence[int] = (),
    *,
    rtol: float = 1e-3,
    steps: int = 300,
    start: Tensor | None = None,
    **options: Any,
) -> Singular:
    """The largest singular value of any layer, from below, to about ``rtol``.

    ``start[1, channels, *in_shape]`` begins where another search ended, after a few steps of training for instance.

    >>> conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    >>> found = lanczos(conv, [16, 16])
    >>> bool(found.value <= torch.linalg.matrix_norm(conv.weight.flatten(1)) * 2)
    True
    """
    at_least_one(steps=steps)
    one = with_read_taps(admitted(layer, in_shape, options))
    start = admitted_start(start, one)
    rough = in_precision(one, torch.float64 if rtol < 1e-5 else torch.float32)
    return rayleigh(one, in_best_group(rough, search(rough, rtol, steps, start).right()))


def search(layer: Layer, rtol: float, steps: int, start: Tensor | None = None, spans: int | None = None) -> Lanczos:
    """Lanczos to about ``rtol``, from ``start``, or from what it finds on smaller inputs, of so many ``spans``."""
    spans = spans or (ROUGH_SPANS if rtol > ROUGH else SPANS)
    if start is None and (smaller := _halved(layer, spans)):
        start = widened(search(smaller, max(SHARPER * rtol, SHARPEST), steps, spans=spans), layer)
    elif start is not None:  # it may be blind to what is largest now: to another group, for instance
        start = noisy(start.to(layer.weight))
    process = Lanczos(layer, start)
    process.run(rtol, steps)
    return process


def _halved(layer: Layer, spans: int) -> Layer | None:
    """The layer on inputs half as large, where that leaves enough of them for its kernel."""
    shape = layer.geometry
    axes = zip(layer.in_shape, layer.weight.shape[2:], shape.dilation, shape.padding, strict=True)
    least = [(n, max(SMALLEST, spans * (d * (k - 1) + 1), 2 * max(padding) + 1)) for n, k, d, padding in axes]
    halves = tuple(-(-n // 2) if n >= 2 * enough else n for n, enough in least)
    return replace(layer, in_shape=halves) if halves != layer.in_shape else None


def widened(process: Lanczos, layer: Layer) -> Tensor:
    """[1, channels, *in_shape]: the wave that a search on smaller inputs found, as wide as the layer's."""
    weight = layer.weight
    right = process.right()
    axes = tuple(range(2, right.dim()))
    spectrum = torch.fft.rfftn(right, s=[2 * n for n in layer.in_shape], dim=axes)
    energy = spectrum.abs().square().sum((0, 1))
    place = torch.unravel_index(energy.argmax(), energy.shape)
    wave = spectrum[(..., *place)]
    for at, n in zip(place, layer.in_shape, strict=True):
        x = torch.arange(n, device=weight.device, dtype=weight.dtype)
        envelope = torch.sin((x + 1) * (math.pi / (n + 1)))
        wave = wave.unsqueeze(-1) * torch.polar(envelope, at * x * (math.pi / n))
    return noisy(wave.real)


def noisy(start: Tensor) -> Tensor:
    generator = torch.Generator(start.device).manual_seed(1)
    noise = torch.randn(start.shape, dtype=start.dtype, device=start.device, generator=generator)
    return _unit(start) + NOISE * _unit(noise)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
