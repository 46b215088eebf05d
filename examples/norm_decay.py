"""Norm decay at work: the l1 norms of a small network's layers while it trains, with it and without, and its loss.

The network and the task are those of ``plain_loop.py``, images of noise with waves in half of them: made as they are
needed, nothing to download.
"""

from __future__ import annotations

import math
import sys

import torch
from matplotlib.figure import Figure
from plain_loop import IMAGES, batch, network
from torch import nn

import convnorm

PICTURE = sys.argv[1] if len(sys.argv) > 1 else "norm_decay.png"
STEPS = 150
RUNS = {"without": (0.0, "#D55E00"), "with norm decay": (0.02, "#0072B2")}  # beta; Okabe & Ito


def train(beta: float) -> tuple[dict[str, list[float]], list[float], float]:
    """Each layer's norm by step, the loss by step, and the accuracy on new images at the end."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    decay = convnorm.NormDecay(model, IMAGES, beta=beta)  # with beta=0 it only measures
    decay.attach(optimizer)
    norms, losses = {}, []
    for step in range(STEPS):
        images, labels = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for layer, norm in decay.norms.items():  # those that the step began with
            norms.setdefault(layer, []).append(norm.item())
    hits = [(model(images).argmax(1) == labels).float().mean().item() for images, labels in map(batch, range(-8, 0))]
    return norms, losses, sum(hits) / len(hits)


histories = {name: train(beta) for name, (beta, _) in RUNS.items()}
(without, _, accuracy), (with_decay, _, accuracy_with_decay) = histories.values()
for use in convnorm.observe(network(), IMAGES):
    at_first = convnorm.norms(use.layer).l1.item()
    assert math.isclose(without[use.name][0], at_first, rel_tol=1e-6)
    assert math.isclose(with_decay[use.name][0], at_first, rel_tol=1e-6)
assert all(with_decay[layer][-1] < 0.75 * without[layer][-1] for layer in without)
assert min(accuracy, accuracy_with_decay) > 0.95

figure = Figure(figsize=(10, 5.6), layout="constrained")
*panels, product, training = figure.subplots(2, 3, sharex=True).flat
for (name, (_, colour)), (norms, losses, hits) in zip(RUNS.items(), histories.values(), strict=True):
    line = {"color": colour, "lw": 2}
    for axes, (layer, values) in zip(panels, norms.items(), strict=True):
        axes.plot(values, **line, label=name)
        axes.set_title(f"{type(network().get_submodule(layer)).__name__} {layer!r}: l1 norm", loc="left", size=12)
    product.plot([math.prod(values) for values in zip(*norms.values(), strict=True)], **line)
    training.plot(losses, **line, label=f"accuracy {hits:.1%}")
product.set_title("product of the norms", loc="left", size=12)
product.set(yscale="log", xlabel="step", yticks=[30, 100, 300], yticklabels=["30", "100", "300"])
product.minorticks_off()
training.set_title("loss", loc="left", size=12)
training.set(ylim=(0, None), xlabel="step")
training.legend(frameon=False, fontsize=11)
for axes in panels:
    axes.set(ylim=(0, None))
for axes in figure.axes:
    axes.spines[["top", "right"]].set_visible(False)
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=12)
figure.savefig(PICTURE, dpi=120)
print(f"accuracy {accuracy:.3f} without, {accuracy_with_decay:.3f} with norm decay: {PICTURE}")
