"""The largest singular value from below: Lanczos, begun with the wave that the layer's circle passes on most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Layer
from .admit import admitted, admitted_start, at_least_one
from .circle import with_read_taps
from .krylov import LOOK_BACK, Lanczos, in_precision
from .rayleigh import Singular, in_best_group, rayleigh
from .wave import first_wave

NOISE = 0.1  # keeps the start from being blind to other waves, and to other groups
NEAR = 3  # steps to look back from a wave


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


def search(layer: Layer, rtol: float, steps: int, start: Tensor | None = None, look_back: int = NEAR) -> Lanczos:
    """Lanczos to about ``rtol``, from ``start``, or from the layer's largest wave, which needs less ``look_back``."""
    with torch.autocast(layer.weight.device.type, enabled=False):
        wave = first_wave(layer, rtol) if start is None else None
    process = Lanczos(layer, noisy(wave if start is None else start.to(layer.weight)))
    process.run(rtol, steps, LOOK_BACK if wave is None else look_back)
    return process


def noisy(start: Tensor | None) -> Tensor | None:
    if start is None:
        return None
    generator = torch.Generator(start.device).manual_seed(1)
    noise = torch.randn(start.shape, dtype=start.dtype, device=start.device, generator=generator)
    return _unit(start) + NOISE * _unit(noise)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
