"""A network with real weights to measure: ResNet-20, trained on CIFAR-10 for a few minutes."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.data import Images, load, normalised
from train.models import resnet20
from train.rows import replacing

BATCH = 128
LEARNING_RATE, MOMENTUM = 0.1, 0.9
TELL_EVERY = 50  # steps


def trained(data: str | Path, steps: int, device: str, checkpoint: Path | None) -> tuple[nn.Module, float]:
    """The network in evaluation mode and the share of test images that it names right; from ``checkpoint`` if that is
    there, else written to it.
    """
    if checkpoint and checkpoint.exists():
        kept = torch.load(checkpoint, map_location=device)
        if kept["steps"] != steps:
            raise ValueError(f"checkpoint {str(checkpoint)!r} is of {kept['steps']} steps, not {steps}")
    else:
        images = load("cifar10", data)
        network = train(images.training, steps, device)
        kept = {"steps": steps, "accuracy": accuracy(network, images.test, device), "weights": network.state_dict()}
        if checkpoint:
            with replacing(checkpoint) as new:
                torch.save(kept, new)
    network = resnet20().to(device)  # whose weights lie in memory as they do by default
    network.load_state_dict(kept["weights"])
    return network.eval(), kept["accuracy"]


def train(images: Images, steps: int, device: str) -> nn.Module:
    """By SGD, at a rate that falls to 0 along a line. Every epoch has its own order."""
    torch.manual_seed(0)
    network = resnet20().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, MOMENTUM, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    begin, order = time.perf_counter(), torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(images))
        batch, order = order[:BATCH], order[BATCH:]
        loss = F.cross_entropy(network(_input(images, batch, device)), images.labels[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % TELL_EVERY == 0 or step == steps:
            print(f"step {step} of {steps}: loss {loss.item():.3f}, {time.perf_counter() - begin:.0f} s", flush=True)
    return network


@torch.no_grad()
def accuracy(network: nn.Module, images: Images, device: str) -> float:
    network.eval()
    right = 0
    for batch in torch.arange(len(images)).split(500):
        guess = network(_input(images, batch, device)).argmax(1)
        right += int((guess.cpu() == images.labels[batch]).sum())
    return right / len(images)


def _input(images: Images, batch: Tensor, device: str) -> Tensor:
    pixels = images.pixels[batch].to(device, memory_format=torch.channels_last)
    return normalised(pixels)
