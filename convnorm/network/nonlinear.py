"""Operations that join several numbers: largest ones, softmax, normalisation by a sample's own statistics."""

from __future__ import annotations

import math

import torch

from .calls import Call, Refused, rule
from .linear import broadcast, by_statistics, linear
from .rounding import root, times
from .separable import adaptive_windows
from .steps import Joint, Nonlinear, Step


@rule(*(f"max_pool{axes}d{kind}" for axes in (1, 2, 3) for kind in ("", "_with_indices")))
def max_pooling(call: Call) -> Step | tuple[Step, None]:
    source, axes = call.source(), int(call.operation[8])
    if len(source.shape) != axes + 1:
        raise Refused("has an input without a batch axis")
    kernel, dilation = call.per_axis("kernel_size", axes), call.per_axis("dilation", axes)
    padding = call.per_axis("padding", axes)
    stride = call.per_axis("stride", axes) if call.arguments["stride"] else kernel
    overlap = 1
    for n, m, k, s, p, d in zip(source.shape[1:], call.shape[1:], kernel, stride, padding, dilation, strict=True):
        reads = torch.arange(m)[:, None] * s - p + torch.arange(k) * d
        overlap *= int(torch.bincount(reads[(reads >= 0) & (reads < n)]).max())
    step = of_largest(call, source, overlap)
    return (step, None) if call.operation.endswith("indices") else step


@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pooling(call: Call) -> tuple[Step, None]:
    source, axes, overlap = call.source(), int(call.operation[-2]), 1
    if len(source.shape) != axes + 1:
        raise Refused("has an input without a batch axis")
    for n, m in zip(source.shape[1:], call.shape[1:], strict=True):
        starts, ends = adaptive_windows(n, m)
        overlap *= max(sum(a <= x < b for a, b in zip(starts, ends, strict=True)) for x in range(n))
    return of_largest(call, source, overlap), None


def of_largest(call: Call, source: Step, overlap: int = 1) -> Nonlinear:
    """Largest elements of windows, where no input is in more than ``overlap`` of them.

    |max over w of a - max over w of b| <= max over w of |a - b|, whose sum, or sum of squares, over windows counts no
    input more than ``overlap`` times: overlap in l1, its root in l2, 1 in linf. An input that is the largest of all its
    windows attains them.
    """
    return Nonlinear(
        call.shape, (source,), constants=lambda ord: {1: float(overlap), 2: root(float(overlap)), math.inf: 1.0}[ord]
    )


@rule("amax", "amin", "max", "min")
def largest(call: Call) -> Step | tuple[Step, None]:
    if "other" in call.arguments:
        return elementwise_largest(call)
    source, dims = call.source(), call.arguments.get("dim")
    if dims is None or dims == []:
        raise Refused("looks through the batch")
    call.axes(dims)  # none of them the batch's
    step = of_largest(call, source)
    return (step, None) if call.operation in ("max", "min") else step


@rule("maximum", "minimum")
def elementwise_largest(call: Call) -> Step:
    """|max(a, b) - max(a', b')| <= max(|a - a'|, |b - b'|): no more than both differences, as parts of one."""
    one, other = tuple(call.arguments)[:2]
    parts = []
    for name, beside in ((one, other), (other, one)):
        if call.depends(name):
            source, spread = broadcast(call, name, beside)
            parts.append(source if source.shape == call.shape else linear(source, spread))
    return Joint(call.shape, tuple(parts))


@rule("softmax", "_softmax")
def softmax(call: Call) -> Nonlinear:
    """The Jacobian diag(p) - p p^T is symmetric, its row i has the absolute sum 2 p_i (1 - p_i) <= 1/2: so l1 = linf
    <= 1/2, and l2 <= sqrt(l1 linf). Two equal numbers far above all others attain it.
    """
    several = call.source().shape[call.axis(call.arguments["dim"]) - 1] > 1
    return Nonlinear(call.shape, (call.source(),), constants=lambda ord: 0.5 if several else 0.0)


@rule("log_softmax", "_log_softmax")
def log_softmax(call: Call) -> Nonlinear:
    """The Jacobian is I - 1 p^T. Its row i has the absolute sum 2 (1 - p_i) < 2, its column j 1 + (n - 2) p_j < n - 1.
    It is a projection, along 1, so that its l2 norm is that of the complement, |1| |p| < sqrt n.
    """
    n = call.source().shape[call.axis(call.arguments["dim"]) - 1]
    by_ord = {1: float(n - 1), 2: root(float(n)), math.inf: 2.0}
    return Nonlinear(call.shape, (call.source(),), constants=lambda ord: by_ord[ord] if n > 1 else 0.0)


@rule("logsumexp")
def logsumexp(call: Call) -> Nonlinear:
    """The gradient p has nonnegative entries that sum to 1: its l1, l2 and linf norms are at most 1."""
    call.axes(call.arguments["dim"])  # none of them the batch's
    return Nonlinear(call.shape, (call.source(),), constants=lambda ord: 1.0)


@rule("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "native_group_norm")
def own_statistics(call: Call) -> Step | tuple[Step, None, None]:
    source, given = call.source(), call.arguments
    if "group" in call.operation:
        count = math.prod(source.shape) // given["num_groups" if "num_groups" in given else "group"]
    else:
        count = math.prod(given["normalized_shape"])
        if len(given["normalized_shape"]) > len(source.shape):
            raise Refused("normalises over the batch")
    step = normalised(call, source, count, centred=call.operation != "rms_norm")
    return (step, None, None) if call.operation.startswith("native") else step


@rule("instance_norm")
def instance_norm(call: Call) -> Step:
    if not call.arguments["use_input_stats"]:
        return linear(call.source("input"), by_statistics(call))
    source = call.source("input")
    return normalised(call, source, math.prod(source.shape[1:]), centred=True)


def default_eps(dtype: torch.dtype) -> float:
    """Of rms_norm; for half precision PyTorch takes that of float32, in which it computes."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def normalised(call: Call, source: Step, count: int, centred: bool) -> Nonlinear:
    """w z / sqrt(|z|^2 / n + eps) of n numbers, z those less their mean: Lipschitz through eps alone.

    With s^2 = |z|^2 / n + eps, u = z / |z| and c = 1 - eps / s^2 in [0, 1), the Jacobian of z / s is

        (I - c u u^T) P / s,    P = I - 1 1^T / n (or I),    1 / s = sqrt((1 - c) / eps)

    P u = u, so that its l2 norm is at most 1 / sqrt(eps), as it is at z = 0. Symmetric, it has the same l1 and linf
    norm: with |P|_inf = 2 - 2 / n =: a (or 1), and |u u^T|_inf = max |u_i| sum |u_j| <= (1 + sqrt n) / 2 =: b, at most

        sqrt((1 - c) / eps) (a + b c),    largest at  c = (2 b - a) / (3 b), or at 0 where that is negative
    """
    eps = call.arguments["eps"]
    eps = default_eps(call.first.dtype) if eps is None else eps
    if not eps > 0:
        raise Refused("has no eps to bound it: it is not globally Lipschitz")
    weight = call.arguments.get("weight")
    largest = 1.0 if weight is None else float(call.constant("weight").double().abs().max())
    if not math.isfinite(largest):
        raise Refused("has a weight that is no number")
    row, outer = (2 - 2 / count if centred else 1.0), (1 + math.sqrt(count)) / 2
    at = max(0.0, (2 * outer - row) / (3 * outer))
    sides = {2: 1.0, 1: math.sqrt(1 - at) * (row + outer * at)}
    sides[math.inf] = sides[1]
    if centred and count == 1:
        sides = dict.fromkeys(sides, 0.0)
    slack = 1 + 1e-14  # of some ten roundings
    return Nonlinear(
        call.shape,
        (source,),
        constants=lambda ord: times(largest, sides[ord] / math.sqrt(eps), slack),
        how="through eps",
    )
