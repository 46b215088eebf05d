"""The theorem as a picture: every column of a convolution's matrix is a slice of its kernel seen through a window.

A 3x3 convolution with stride 2, two channels to two, on a 5x5 input. The 50 columns of its matrix are two slices seen
through four windows: the l1 norm, the largest absolute column sum, is the largest of eight small sums. Rows are cut
short by the edges, but for those that see all of a slice: the linf norm is the larger of two sums.
"""

import sys
from itertools import product

import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Rectangle

from convnorm.layers import as_layer

PICTURE = sys.argv[1] if len(sys.argv) > 1 else "windows.png"
COLOURS = ["#56B4E9", "#E69F00", "#009E73", "#CC79A7"]  # of the four windows
INK, GREY, PALE = "#222222", "#999999", "#cccccc"

conv = torch.nn.Conv2d(2, 2, 3, stride=2, padding=1, bias=False)
torch.manual_seed(76)  # sums that are far apart
conv.weight.data = torch.randint(1, 10, (2, 2, 3, 3)) * torch.randn(2, 2, 3, 3).sign()  # integers: sums are exact
l1, linf = (norm.item() for norm in torch.ops.convnorm.norms(conv.weight, 2, 1, [5, 5]))
matrix = conv(torch.eye(50).reshape(50, 2, 5, 5)).flatten(1).T.detach().abs()  # [outputs, inputs]
columns, rows = matrix.sum(0).tolist(), matrix.sum(1).tolist()
by_input, by_output = conv.weight.detach().abs().sum(0), conv.weight.detach().abs().sum(1)  # what windows look at

vertical, horizontal = as_layer(conv, [5, 5]).geometry.axes
windows = [torch.outer(*(torch.tensor(w.counts) for w in pair)) for pair in product(vertical.inputs, horizontal.inputs)]
window_of = [2 * (y % 2) + x % 2 for _, y, x in product(range(2), range(5), range(5))]  # at stride 2: two remainders
sums = [[(window * taps).sum().item() for window in windows] for taps in by_input]
assert columns == [sums[i // 25][window] for i, window in enumerate(window_of)]  # the theorem, on all columns
assert max(columns) == max(map(max, sums)) == l1
assert max(rows) == max(taps.sum().item() for taps in by_output) == linf

figure = Figure(figsize=(10, 7.2), facecolor="white")
upper = figure.add_gridspec(2, 2, left=0.04, right=0.96, top=0.9, bottom=0.45, hspace=0.06, wspace=0.03)
upper.set_width_ratios([9, 1])
upper.set_height_ratios([1, 3])
middle, above, beside = (figure.add_subplot(place) for place in (upper[1, 0], upper[0, 0], upper[1, 1]))
figure.text(0.04, 0.955, "Absolute values of the matrix: 18 outputs x 50 inputs", size=13, color=INK)
colours = torch.tensor([to_rgb(COLOURS[window]) for window in window_of])
middle.imshow(1 - (matrix / matrix.max())[..., None] * (1 - colours), aspect="auto")
above.bar(range(50), columns, color=[COLOURS[window] for window in window_of])
beside.barh(range(18), rows, color=[GREY if row in by_output.sum((1, 2)) else PALE for row in rows])
column, row = columns.index(l1), rows.index(linf)
middle.add_patch(Rectangle((column - 0.5, -0.5), 1, 18, fill=False, lw=2, clip_on=False))
middle.add_patch(Rectangle((-0.5, row - 0.5), 50, 1, fill=False, lw=2, clip_on=False))
above.set(xlim=(-0.5, 49.5))
above.annotate(f"largest column sum: l1 = {l1:.0f}", (column, l1), (column - 0.5, l1 * 1.08), size=11)
beside.set(ylim=(17.5, -0.5))
beside.annotate(f"linf = {linf:.0f}", (linf, row), (0, -1.2), size=11, annotation_clip=False)
for axes in (middle, above, beside):
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(axes is middle)


def draw(place: SubplotSpec, taps: torch.Tensor, window: torch.Tensor, colour: str, wins: bool) -> None:
    axes = figure.add_subplot(place)
    for (y, x), value in zip(product(range(3), repeat=2), taps.flatten().tolist(), strict=True):
        seen = bool(window[y, x])
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour if seen else "white", edgecolor=GREY, lw=0.8))
        axes.text(x + 0.5, y + 0.5, f"{value:.0f}", ha="center", va="center", size=11, color=INK if seen else GREY)
    axes.add_patch(Rectangle((0, 0), 3, 3, fill=False, lw=2.5 if wins else 0.8, clip_on=False))
    axes.set(xlim=(0, 3), ylim=(3, 0), aspect="equal")
    axes.set_axis_off()
    value = f"{(window * taps).sum():.0f}"
    axes.text(1.5, 3.25, value, ha="center", va="top", size=12, weight="bold" if wins else None)


figure.text(0.04, 0.385, "Columns: |K| of each input channel, summed over outputs, in four windows", size=12, color=INK)
figure.text(0.72, 0.385, "Rows: of each output channel", size=12, color=INK)
left = figure.add_gridspec(2, 4, left=0.04, right=0.66, top=0.36, bottom=0.05, hspace=0.3)
right = figure.add_gridspec(2, 1, left=0.72, right=0.86, top=0.36, bottom=0.05, hspace=0.3)
for channel, window in product(range(2), range(4)):
    value = sums[channel][window]
    draw(left[channel, window], by_input[channel], windows[window], COLOURS[window], value == l1)
for channel, taps in enumerate(by_output):
    draw(right[channel], taps, torch.ones(3, 3), PALE, taps.sum() == linf)
figure.savefig(PICTURE, dpi=120)
print(f"l1 norm {l1:.0f}, linf norm {linf:.0f}: {PICTURE}")
