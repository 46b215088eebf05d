"""Norm decay in a training loop: a small CNN learns as much with it as without, and its norms end far smaller."""

from __future__ import annotations

import torch
from torch import nn

import convnorm

IMAGES = [64, 3, 16, 16]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and in half of the images waves: which ones is to be learned."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, IMAGES[:1], generator=generator)
    waves = torch.arange(IMAGES[-1]).mul(torch.pi / 2).sin().expand(IMAGES)
    return torch.randn(IMAGES, generator=generator) + labels[:, None, None, None] * waves, labels


def train(beta: float) -> tuple[nn.Sequential, float]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if beta > 0:
        decay = convnorm.NormDecay(model, IMAGES, beta=beta)
        decay.attach(optimizer)  # it steps before each optimizer.step() from now on
    for step in range(150):
        images, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, labels = batch(-1)
    return model, (model(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    (without, accuracy), (with_decay, accuracy_with_decay) = train(beta=0.0), train(beta=0.02)
    print(f"{'l1 norm of layer':>18} {'at first':>10} {'without':>10} {'with norm decay':>16}")
    for use in convnorm.observe(network(), IMAGES):
        models = (network(), without, with_decay)
        norms = [convnorm.norms(model.get_submodule(use.name), use.in_shape).l1.item() for model in models]
        print(f"{use.name:>18} {norms[0]:10.2f} {norms[1]:10.2f} {norms[2]:16.2f}")
    print(f"{'accuracy':>18} {'':>10} {accuracy:10.2f} {accuracy_with_decay:16.2f}")
