"""The explicit matrix of a layer: the identity pushed through PyTorch's own convolution, in float64.

It knows nothing of convnorm: no window, no merged tap, no theorem.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CONV = {0: F.linear, 1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def matrix(weight: Tensor, stride, padding, in_shape, **options) -> Tensor:
    """[outputs, inputs] of the layer, each a channel and its position flattened."""
    weight = weight.detach().to("cpu", torch.float64)
    channels = weight.shape[0] if options.get("transposed") else weight.shape[1] * options.get("groups", 1)
    size = torch.Size([channels, *in_shape])
    basis = torch.eye(size.numel(), dtype=torch.float64).reshape(size.numel(), *size)
    return forward(basis, weight, stride, padding, **options).flatten(1).T


def forward(
    x, weight, stride, padding, *, dilation=None, groups=1, padding_mode="zeros", transposed=False, output_padding=None
) -> Tensor:
    """The layer's output for inputs ``x[batch, channels, *in_shape]``."""
    axes = weight.dim() - 2
    if axes == 0:
        return F.linear(x, weight)
    stride, dilation = per_axis(stride, axes), per_axis(dilation or 1, axes)
    pairs = padding_pairs(padding, axes)
    if transposed:
        return _transposed(x, weight, stride, pairs, per_axis(output_padding or 0, axes), groups, dilation)
    sides = [p for pair in reversed(pairs) for p in pair]  # F.pad begins with the last axis
    x = F.pad(x, sides, "constant" if padding_mode == "zeros" else padding_mode)
    return CONV[axes](x, weight, None, stride, 0, dilation, groups)


def _transposed(x, weight, stride, pairs, extra, groups, dilation) -> Tensor:
    convolve = CONV_TRANSPOSE[weight.dim() - 2]
    if all(before == after for before, after in pairs):
        return convolve(x, weight, None, stride, [before for before, _ in pairs], extra, groups, dilation)
    y = convolve(x, weight, None, stride, 0, extra, groups, dilation)  # padding crops the output
    for axis, (before, after) in enumerate(pairs, 2):
        y = y.narrow(axis, before, y.shape[axis] - before - after)
    return y


def per_axis(value, axes) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def padding_pairs(padding, axes) -> list[tuple[int, int]]:
    values = [padding] if isinstance(padding, int) else list(padding)
    if len(values) == 2 * axes:
        return list(zip(values[::2], values[1::2], strict=True))
    return [(p, p) for p in per_axis(values, axes)]


def norms(m: Tensor) -> tuple[Tensor, Tensor]:
    """The largest absolute column sum and the largest absolute row sum."""
    return m.abs().sum(0).amax(), m.abs().sum(1).amax()
