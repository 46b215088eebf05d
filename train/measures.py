"""What a network is like around its images and in its layers, beyond how often it is right.

Perturbation stability and the empirical local Lipschitz constant: Wu et al., *Does Network Width Really Help
Adversarial Robustness?*, 2021. Margins, confidences and singular values: Wen et al., *Towards Understanding the
Regularization of Adversarial Robustness on Neural Networks*, ICML 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import convnorm
from convnorm.spectral.circle import circle_of
from convnorm.uses import Use

from .attacks import pgd

STEPS = 20  # of the ascents here, each a quarter of eps, from a start as far as one


def ascend(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], *, eps: float, generator: torch.Generator
) -> Tensor:
    """Images within ``eps`` of ``x`` where ``loss(logits)`` is large."""
    return pgd(model, x, loss, eps=eps, step=eps / 4, steps=STEPS, noise=eps / 4, generator=generator)


def robust_and_stable(
    withstands: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, predicted: Tensor
) -> tuple[Tensor, Tensor]:
    """Two times ``[n]`` booleans: the model is right under attack; an attack does not change what the model predicts.

    ``withstands(x, labels)`` tells of which images the model says these labels, and still does under attack. An image
    is robust if and only if the model is right about it and stable, so the share of the robust ones is at least
    accuracy + stability - 1.
    """
    robust, wrong = withstands(x, y), predicted != y
    stable = robust.clone()
    if wrong.any():
        stable[wrong] = withstands(x[wrong], predicted[wrong])
    return robust, stable


def local_lipschitz(model: nn.Module, x: Tensor, *, eps: float, generator: torch.Generator) -> Tensor:
    """``[n]``: the largest ``|f(x) - f(x')|_1 / |x - x'|_inf`` that was found within ``eps``, of the logits f.

    A lower bound of the maximum, by one ascent (Yang et al., *A Closer Look at Accuracy vs. Robustness*, 2020), here on
    the numerator: it ends at the boundary, where the denominator is eps, and where the gradient of the ratio would draw
    the farthest pixels back.
    """
    with torch.no_grad():
        before = model(x)
        found = ascend(model, x, lambda logits: (logits - before).abs().sum(), eps=eps, generator=generator)
        distance = (found - x).abs().flatten(1).amax(1).clamp(min=torch.finfo(x.dtype).tiny)
        return (model(found) - before).abs().sum(1) / distance


def margins(outputs: Tensor, y: Tensor) -> Tensor:
    """``[n]``: that of the right class minus the largest other one, of logits or probabilities ``[n, classes]``.

    >>> margins(torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 1]))
    tensor([ 1., -2.])
    """
    others = outputs.scatter(1, y[:, None], -math.inf)
    return outputs.gather(1, y[:, None]).squeeze(1) - others.amax(1)


def confidences(logits: Tensor) -> Tensor:
    """``[n]``: the probability of the class that the model predicts."""
    return logits.softmax(1).amax(1)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a layer as its input size has it, the largest first; batch norm is not folded in.

    They are the layer's own, or, where its matrix is too large to decompose, those of the layer with ``circular``
    padding, which Wen et al. look at: no bounds, but near. A layer that has neither has no ``values``.
    """

    name: str
    values: Tensor
    circular: bool


def spectrum(use: Use, largest: int = 2048) -> Spectrum:
    """Of the layer itself if a square matrix of size ``largest`` costs as much to decompose, or the FFT does it.

    >>> from convnorm.uses import observe
    >>> [use] = observe(torch.nn.Conv1d(1, 1, 3, padding=1, bias=False), [1, 1, 4])
    >>> len(spectrum(use).values), spectrum(use).circular, spectrum(use, largest=2).circular
    (4, False, True)
    """
    layer = use.layer
    circular = replace(layer, padding_mode="circular")
    inputs, outputs = layer.in_channels * math.prod(use.in_shape), layer.out_channels * math.prod(use.out_shape)
    work = inputs * outputs * min(inputs, outputs) / layer.groups**2
    with torch.no_grad():
        if circle_of(layer).whole or work <= largest**3:
            return Spectrum(use.name, convnorm.singular_values(layer), False)
        if circle_of(circular).whole:
            return Spectrum(use.name, convnorm.singular_values(circular), True)
    return Spectrum(use.name, layer.weight.new_empty(0), False)
