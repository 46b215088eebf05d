"""The inputs that a layer amplifies most, in each norm, and what it makes of them.

A first layer of 16 oriented Gabor filters, as training finds them: 11x11, stride 2, on 32x32 grey images. In the l1
norm the worst is one pixel, in l2 a wave (proved to be within 0.1 % of the worst), in linf a pattern of plus and minus
one, aimed at one output (circled). Below each, the 16 channels of its output.
"""

import math
import sys

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import convnorm

PICTURE = sys.argv[1] if len(sys.argv) > 1 else "worst_input.png"
SIZE = [32, 32]


def gabor(angle: float, frequency: float) -> Tensor:
    """[11, 11]: a wave under a bell, of l2 norm 1 and mean 0."""
    y, x = torch.meshgrid(torch.arange(-5.0, 6), torch.arange(-5.0, 6), indexing="ij")
    wave = torch.cos(2 * math.pi * frequency * (x * math.cos(angle) + y * math.sin(angle)))
    bell = torch.exp(-(x**2 + y**2) / 12)
    bank = bell * (wave - (bell * wave).sum() / bell.sum())
    return bank / bank.norm()


conv = nn.Conv2d(1, 16, 11, stride=2, padding=5, bias=False, dtype=torch.float64)
filters = [gabor(math.pi * i / 8, frequency) for frequency in (0.12, 0.22) for i in range(8)]
conv.weight.data = torch.stack(filters)[:, None].double()

norms, bracket = convnorm.norms(conv, SIZE), convnorm.l2(conv, SIZE, rtol=1e-3)
assert bracket.ratio <= 1.001
worst = {  # the norm, the input that attains it
    1: (norms.l1, convnorm.witness(conv, SIZE, ord=1)),
    2: (bracket.lower, bracket.right),
    math.inf: (norms.linf, convnorm.witness(conv, SIZE, ord=math.inf)),
}


def gain(x: Tensor, ord: float) -> float:
    return (torch.linalg.vector_norm(conv(x), ord) / torch.linalg.vector_norm(x, ord)).item()


torch.manual_seed(0)
noise = torch.randn(1, 1, *SIZE, dtype=torch.float64)

figure = Figure(figsize=(10, 7.4), layout="constrained")
for (ord, (norm, x)), (above, below) in zip(worst.items(), figure.subplots(2, 3).T, strict=True):
    name = {1: "l1", 2: "l2", math.inf: "linf"}[ord]
    assert abs(gain(x, ord) / norm.item() - 1) < 1e-9
    assert gain(noise, ord) < norm
    tiles = nn.functional.pad(conv(x)[0].detach(), (1, 1, 1, 1), value=math.nan)  # [16, 18, 18]
    mosaic = tiles.unflatten(0, (4, 4)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    for axes, image in ((above, x[0, 0]), (below, mosaic)):
        most = image.nan_to_num().abs().max().item()
        axes.imshow(image, cmap="PuOr", vmin=-most, vmax=most, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(axes is above)
    above.set_title(f"{name} norm: output / input = {norm.item():.1f}\n(of noise: {gain(noise, ord):.1f})", size=12)
    if ord == math.inf:
        y, x = divmod(int(mosaic.nan_to_num().abs().argmax()), mosaic.shape[1])
        below.plot(x, y, "o", ms=14, mfc="none", mec="#222222", mew=1.5)
figure.savefig(PICTURE, dpi=120)
print(f"l1 {norms.l1:.4f}, l2 between {bracket.lower:.4f} and {bracket.upper:.4f}, linf {norms.linf:.4f}: {PICTURE}")
