"""Small inputs and padding change a layer's norms: those of one kernel, at every input size and padding.

A 5x5 convolution with padding 2, four channels to four. The paper's formula is for zero padding, and holds
from the size of the kernel on; the authors' released code skips smaller inputs, and every other padding. On smaller
inputs, zero-padded norms are smaller: no input is read through, and no output reads, the whole kernel. Padding that
reflects or replicates reads inputs near the edge more than once: the l1 norm can exceed the formula at any size.
"""

import sys

import torch
from matplotlib.figure import Figure
from torch import nn

import convnorm
from convnorm.released import takes_part
from convnorm.uses import observe

PICTURE = sys.argv[1] if len(sys.argv) > 1 else "input_sizes.png"
SIZES = range(1, 11)
MODES = {  # the least input that PyTorch pads so; a colour, and a width that leaves lines below it visible
    "zeros": (1, "#0072B2", 7),
    "circular": (2, "#E69F00", 5),
    "reflect": (3, "#009E73", 3),
    "replicate": (1, "#222222", 1.2),
}


def layer(mode: str) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(4, 4, 5, padding=2, padding_mode=mode, bias=False, dtype=torch.float64).requires_grad_(False)


def matrix(conv: nn.Conv2d, n: int) -> torch.Tensor:
    """[outputs, inputs], by PyTorch: what the norms are norms of."""
    return conv(torch.eye(4 * n * n, dtype=torch.float64).unflatten(1, (4, n, n))).flatten(1).T


norms = {
    mode: {n: convnorm.norms(layer(mode), [n, n]) for n in SIZES if n >= least} for mode, (least, *_) in MODES.items()
}
for mode, by_size in norms.items():
    for n, found in by_size.items():
        entries = matrix(layer(mode), n).abs()
        torch.testing.assert_close(found.l1, entries.sum(0).max(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.linf, entries.sum(1).max(), rtol=1e-12, atol=0)

kernel = layer("zeros").weight.abs()
formula = {"l1": kernel.sum((0, 2, 3)).max(), "linf": kernel.sum((1, 2, 3)).max()}  # Theorem 1 at stride 1
skipped = [n for n in SIZES if not takes_part(observe(layer("zeros"), [1, 4, n, n])[0])]
for name, value in formula.items():
    off = [n for n in SIZES if not torch.isclose(getattr(norms["zeros"][n], name), value, rtol=1e-12)]
    assert off == skipped == [1, 2, 3, 4]  # smaller than the kernel
assert min(norms["reflect"][10].l1, norms["replicate"][10].l1) > formula["l1"]

figure = Figure(figsize=(10, 4.6), layout="constrained")
for axes, (name, value) in zip(figure.subplots(1, 2, sharey=True), formula.items(), strict=True):
    axes.axvspan(skipped[0] - 0.5, skipped[-1] + 0.5, color="0.93", zorder=0)
    axes.axhline(value, color="#D55E00", lw=1.5, ls="--", label="the paper's formula")
    for mode, (_, colour, width) in MODES.items():
        values = [getattr(found, name) for found in norms[mode].values()]
        axes.plot(
            list(norms[mode]), values, color=colour, marker="o", ms=1.8 * width, lw=width, label=f"padding: {mode}"
        )
    axes.text(0.7, 7.9, "skipped by the\nreleased code", va="top", color="0.35", size=11)
    axes.set(xlabel="input, n x n", xticks=SIZES, xlim=(0.5, SIZES[-1] + 0.5), ylim=(0, 8))
    axes.set_title(f"{name} norm of a 5x5 convolution, padding 2", loc="left", size=13)
    axes.spines[["top", "right"]].set_visible(False)
figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=11)
figure.savefig(PICTURE, dpi=120)
most = (norms["reflect"][10].l1 / formula["l1"]).item()
print(f"reflected padding: l1 is {most:.2f} times the formula at 10x10: {PICTURE}")
