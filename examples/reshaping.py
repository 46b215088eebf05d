"""Why the spectral norm of a reshaped kernel is not the norm of the layer, from either side; and what is.

A random 3x3 convolution, 8 channels to 8, on an 8x8 input, whose kernel, stride or input size then changes. Each
method's value over the true l2 norm, the largest singular value of the explicit matrix. Below 1 it promises what the
layer breaks.
"""

import sys

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from torch import nn

import convnorm
from convnorm import spectral

PICTURE = sys.argv[1] if len(sys.argv) > 1 else "reshaping.png"
METHODS = {
    "sqrt(l1 linf)": (spectral.sqrt_l1_linf, "#E69F00", "s"),
    "four reshapings": (spectral.four_reshapings, "#009E73", "^"),
    "reshaped kernel": (spectral.reshaped_estimate, "#D55E00", "X"),
}
BRACKET = "#0072B2"


def layer(kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 8, kernel, stride, kernel // 2, bias=False, dtype=torch.float64)


PANELS = {  # what changes: the layers, and the sizes of their inputs
    "kernel, k x k": {k: (layer(kernel=k), [8, 8]) for k in (1, 3, 5, 7)},
    "stride": {s: (layer(stride=s), [8, 8]) for s in (1, 2, 3)},
    "input, n x n": {n: (layer(), [n, n]) for n in (1, 2, 4, 8, 16)},
}

figure = Figure(figsize=(10, 4.4), layout="constrained")
figure.suptitle("Value / true l2 norm of a convolution: 3x3, stride 1, input 8x8, but for what changes", size=13)
each = figure.subplots(1, len(PANELS), sharey=True, width_ratios=[len(layers) + 1 for layers in PANELS.values()])
estimates = []
for axes, (title, layers) in zip(each, PANELS.items(), strict=True):
    places = range(len(layers))
    true = [spectral.singular_values(*one)[0].item() for one in layers.values()]
    brackets = [convnorm.l2(*one) for one in layers.values()]
    low = [bracket.lower.item() / value for bracket, value in zip(brackets, true, strict=True)]
    high = [bracket.upper.item() / value for bracket, value in zip(brackets, true, strict=True)]
    svd = 1e-12  # the rounding of the values that all is compared with
    assert max(low) <= 1 + svd
    assert min(high) >= 1 - svd
    axes.axhspan(0.4, 1, color="0.93", zorder=0)  # where a value is below the norm
    axes.fill_between(places, low, high, color=BRACKET, lw=3, zorder=2, label="convnorm.l2, both bounds")
    for name, (method, colour, marker) in METHODS.items():
        ratio = [method(*one).item() / value for one, value in zip(layers.values(), true, strict=True)]
        axes.plot(places, ratio, marker=marker, color=colour, ms=8, lw=2, label=name, clip_on=False)
        estimates += ratio if method is spectral.reshaped_estimate else []
        assert method is spectral.reshaped_estimate or min(ratio) >= 1 - svd  # the others are bounds
    axes.set_xticks(places, layers)
    axes.set(yscale="log", xlabel=title, xlim=(-0.4, len(layers) - 0.6), ylim=(0.4, 16))
    axes.yaxis.set_major_locator(FixedLocator([0.5, 1, 2, 4, 8, 16]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
assert min(estimates) < 0.9 < 1.1 < max(estimates)
each[0].text(-0.3, 0.43, "below the norm: no bound", color="0.35", size=11)
figure.legend(*each[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=11)
figure.savefig(PICTURE, dpi=120)
print(f"the reshaped kernel's norm is {min(estimates):.2f} to {max(estimates):.2f} times the layer's: {PICTURE}")
