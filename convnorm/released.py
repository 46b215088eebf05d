"""What the authors' released code does where it differs from the paper's Algorithm 1.

    h *= γ;  h[winning slice] = sign(weight[winning slice]);  g += β h

The slice overwrites the average where Algorithm 1 mixes, without the factor 1 - γ, and β is not divided by N. Only
Conv2d without groups or dilation, with zero padding, on inputs that cover the kernel, and Linear layers take part. Two
faults are not repeated: rows and columns of non-square layers mixed up, and weights turned into their signs where the
stride equals the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import library
from .batch import Batch
from .plan import read_plan
from .uses import Use
from .winners import as_matrix, slice_index


def takes_part(use: Use) -> bool:
    module = use.module
    if isinstance(module, nn.Linear):
        return True
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or module.padding_mode != "zeros":
        return False
    if set(module.dilation) != {1} or isinstance(module.padding, str):
        return False
    axes = zip(module.kernel_size, module.stride, module.padding, use.in_shape, strict=True)
    return all(kernel + -(-padding // stride) * stride - padding <= size for kernel, stride, padding, size in axes)


class Released(Batch):
    def __init__(self, uses: Sequence[Use], members: Sequence[int], linf: bool, momentum: float) -> None:
        super().__init__(uses, members, linf, momentum=0)  # no terms
        self.momentum = momentum
        self._layers = [(layer, layer.text) for layer in read_plan(self.plan)]
        self._averages = [torch.zeros_like(weight) for weight in self.weights]

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        state, which = self.state, int(self.linf)
        values = library.read(self.weights, self.plan)
        state.norms.copy_(values[which])
        state.winners.copy_(values[2][:, which])
        state.clock.add_(1)
        for i, (weight, (layer, text)) in enumerate(zip(self.weights, self._layers, strict=True)):
            column, winner = not self.linf, state.winners[i]
            index = slice_index(weight, layer, winner[:1], column)
            average = as_matrix(self._averages[i].mul_(self.momentum), layer)
            signs = as_matrix(weight, layer)[index].sign()
            if not layer.sees_all(column):
                counts = torch.ops.convnorm.window_counts(winner, text, column)
                signs = torch.where(counts > 0, signs, average[index])
            average[index] = signs
            if weight.grad is not None and weight.requires_grad:
                weight.grad.add_(self._averages[i] * rates[i])

    def remembered(self, i: int) -> dict[str, Tensor]:
        return {"norm": self.state.norms[i], "winner": self.state.winners[i], "average": self._averages[i]}
