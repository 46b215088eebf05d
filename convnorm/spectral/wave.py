"""The wave that a layer passes on most: where a search for its norm begins.

The largest singular vectors of a convolution are close to waves, under an envelope that fills the input. On the layer's
circle a wave of frequency ``f`` and channels ``v`` becomes one of channels ``K(f) v``, so that

    |K(f) v| / |v|

is to be made large, at a cost that does not depend on the size of the input. Waves of frequencies all over the circle
improve side by side: the channels of each by Chebyshev's iteration on K(f)^* K(f), its frequency by looking at those
beside it. Now and then those that lag behind are given up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from ..layers import Layer, as_layer
from .circle import Arc, Circle, circle_of, half_grid, symbol
from .krylov import Lanczos

MORE_THAN_TAPS = 9  # so many more frequencies are tried on an axis
ROUND, ROUGH_ROUND = 7, 5  # steps of all waves before the best are chosen
ONE_OF = 4  # waves is kept
ROUGH = 1e-3
BELOW = 0.95  # of the largest square so far, what the iteration damps
SHARPER = 0.1  # than asked, that the wave is no worse than the search
STEPS = 300
DECOMPOSED = 64  # columns or rows: of so few a decomposition takes less time
LOOKING = 10  # channels: what they cost, so much does a look at the frequencies beside
MEMORY = 1 << 28  # bytes that the waves may take


@dataclass(frozen=True)
class Wave:
    """A wave on a circle: ``phases[axes]`` from one tap to the next, ``channels[columns]`` where they are known."""

    group: int
    phases: Tensor
    channels: Tensor | None = None


def first_wave(layer: Layer, rtol: float) -> Tensor | None:
    """[1, channels, *in_shape]: the layer's wave; none where it costs as much as the search that it would begin, or
    where inputs that the padding repeats may be passed on more.
    """
    if not layer.in_shape:
        return None  # before the weight is copied: a matrix is its own circle
    circle = circle_of(layer)
    tried = half_grid([_tried(k) for k in circle.kernel.shape[3:]])
    through_taps = len(tried) * circle.kernel[:, :, 0].numel() * torch.complex64.itemsize
    cost = 2 * len(tried) * (1 + LOOKING / circle.kernel.shape[2])
    if cost >= math.prod(circle.points) or through_taps > MEMORY or circle.factor > 1:
        return None
    wave = largest_wave(circle, tried, ROUGH_ROUND if rtol > ROUGH else ROUND)
    return over_inputs(layer, circle, wave, rtol)


def over_inputs(layer: Layer, circle: Circle, wave: Wave, rtol: float) -> Tensor:
    """[1, channels, *in_shape]: the wave, of the best channels to about ``rtol``, under an envelope."""
    frequency = [_on(arc, phase) for arc, phase in zip(circle.arcs, wave.phases.tolist(), strict=True)]
    group = replace(circle, kernel=circle.kernel[wave.group : wave.group + 1].detach())
    matrix = symbol(group, torch.tensor([frequency], dtype=torch.float64, device="cpu"))[0, 0]
    channels = refined(matrix, wave.channels, rtol).to(matrix)
    own = spread(layer, circle, frequency, matrix @ channels if layer.transposed else channels)
    every = own.new_zeros(layer.groups, *own.shape)
    every[wave.group] = own
    return every.flatten(0, 1)[None].to(layer.weight)


@torch.no_grad()
def largest_wave(circle: Circle, phases: Tensor, round_steps: int) -> Wave:
    """The wave that grows most, in any group, of those that begin at ``phases[F, axes]``."""
    kernel = circle.kernel.float()
    groups, rows, columns, *sizes = kernel.shape
    if groups * len(phases) == 1:
        return Wave(0, phases[0])
    there = kernel.flatten(3).movedim(3, 1).flatten(1, 2).contiguous()  # [groups, taps * rows, columns]
    back = there.mT.contiguous()
    places = kernel.new_tensor(list(product(*map(range, sizes))))
    beside = kernel.new_tensor(list(product(*map(_beside, sizes))))
    phases = phases.to(places).T.expand(groups, -1, -1)  # [groups, axes, waves]
    tone = _tone(places, phases)  # [groups, taps, waves]
    generator = torch.Generator(kernel.device).manual_seed(0)
    channels = torch.randn(
        groups, columns, phases.shape[2], dtype=tone.dtype, device=kernel.device, generator=generator
    )
    before = torch.zeros_like(channels)
    while True:
        tones_beside = _tone(beside, places.T)  # [beside, taps]
        for _ in range(round_steps):
            length = _squares(channels, 1)[:, None].sqrt().clamp_min(torch.finfo(kernel.dtype).tiny)
            channels, before = channels / length, before / length
            passed = _times(there, channels).unflatten(1, (-1, rows)) * tone[:, :, None]
            images = (tones_beside @ passed.flatten(2)).unflatten(2, (rows, -1))  # [groups, beside, rows, waves]
            squares, best = _squares(images, 2).max(1)
            phases, tone = phases + beside.T[:, best].movedim(1, 0), tone * tones_beside.T[:, best].movedim(1, 0)
            image = images.take_along_dim(best[:, None, None], 1)
            returned = _times(back, (image * tone[:, :, None].conj()).flatten(1, 2))
            damped = BELOW * squares[:, None]
            channels, before = returned - damped / 2 * channels - (damped / 4).square() * before, channels
        waves = squares.shape[1]
        if waves <= ONE_OF:
            group, wave = divmod(int(squares.argmax()), waves)
            return Wave(group, phases[group, :, wave], channels[group, :, wave])
        kept = squares.topk(-(-waves // ONE_OF)).indices[:, None]
        phases, tone, channels, before = (x.take_along_dim(kept, 2) for x in (phases, tone, channels, before))
        beside = beside / 2


def refined(matrix: Tensor, channels: Tensor | None, rtol: float) -> Tensor:
    """The largest right singular vector of a complex matrix to about ``rtol``, from ``channels``; real, where it is."""
    if is_real := not matrix.imag.any():
        matrix = matrix.real
    if min(matrix.shape) <= DECOMPOSED:
        return torch.linalg.svd(matrix, full_matrices=False)[2][0].conj()
    if channels is not None:
        channels = channels.real if is_real else torch.cat([channels.real, channels.imag])
    if not is_real:
        real, imaginary = matrix.real, matrix.imag
        matrix = torch.cat([torch.cat([real, -imaginary], 1), torch.cat([imaginary, real], 1)])
    process = Lanczos(as_layer(matrix.float()), None if channels is None else channels[None])
    process.run(SHARPER * rtol, STEPS)
    right = process.right()[0]
    return right if is_real else torch.complex(*right.chunk(2))


def spread(layer: Layer, circle: Circle, frequency: list[float], channels: Tensor) -> Tensor:
    """The wave of one group over the layer's inputs, which are the circle's outputs where the layer is transposed."""
    strides = [1 if layer.transposed else arc.stride for arc in circle.arcs]
    wave = channels.unflatten(0, (*reversed(strides), -1))  # the polyphase components
    wave = wave.permute(*reversed(range(wave.dim())))
    for axis, (n, arc, stride) in enumerate(zip(layer.in_shape, circle.arcs, strides, strict=True)):
        inputs = torch.arange(n, device=wave.device)
        envelope = torch.ones_like(inputs) if arc.whole else torch.sin((inputs.double() + 1) * (math.pi / (n + 1)))
        place = inputs if layer.transposed else inputs + arc.first
        angles = (place // stride).double() * frequency[axis]
        tone = torch.polar(envelope.double(), angles)
        wave = wave.index_select(1 + axis, place % stride) * tone.view(-1, *[1] * (len(strides) - 1 - axis))
    return wave.real


def _tried(taps: int) -> int:
    return taps + MORE_THAN_TAPS if taps > 1 else 1


def _beside(taps: int) -> list[float]:
    """Steps of a phase, at first a quarter of what lies between two that are tried."""
    return [-0.5 * math.pi / _tried(taps), 0.0, 0.5 * math.pi / _tried(taps)] if taps > 1 else [0.0]


def _on(arc: Arc, phase: float) -> float:
    """The frequency of a phase between taps: one of the circle's own, where the layer is all of that."""
    frequency, step = phase / arc.spacing, 2 * math.pi / arc.points
    return round(frequency / step) * step if arc.whole else frequency


def _tone(places: Tensor, phases: Tensor) -> Tensor:
    """exp(i place . phase) [..., places, phases]"""
    angles = places @ phases
    return torch.polar(torch.ones_like(angles), angles)


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """A real matrix, read once, times complex vectors."""
    return torch.view_as_complex((matrix @ torch.view_as_real(vectors).flatten(2)).unflatten(2, (-1, 2)))


def _squares(vectors: Tensor, dim: int) -> Tensor:
    """Squared lengths of complex vectors: PyTorch's own norm of these takes many times as long."""
    return torch.view_as_real(vectors).square().sum(dim).sum(-1)
