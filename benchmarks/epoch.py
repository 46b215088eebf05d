"""The time of a training epoch: ``python -m benchmarks.epoch [--data DIR]``, written to benchmarks/results.

An epoch of the paper's ResNet-18 as ``python -m train`` runs it, against the loop that one would write first: a
DataLoader that crops and mirrors image by image in worker processes, float32, the default memory format. By turns, the
median of ``--rounds`` after one that does not count.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from train.cell import Cell, Protocol, protocol
from train.data import Data, Images, directory_of, load
from train.models import PAPER
from train.run import Training

from .record import aligned, save, short

WORKERS = 2  # of the DataLoader, as in the authors' release
SETTINGS = {  # of python -m train
    "float32": {},
    "float32, compiled": {"compiled": True},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, compiled": {"precision": "bfloat16", "compiled": True},
}


class ImageByImage(Dataset):
    def __init__(self, images: Images) -> None:
        self.pixels, self.labels = images.pixels.contiguous().numpy(), images.labels.numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        padded = np.pad(self.pixels[index], ((0, 0), (4, 4), (4, 4)))
        top, left = torch.randint(9, (2,)).tolist()
        image = padded[:, top : top + 32, left : left + 32]
        if torch.rand(()) < 0.5:
            image = image[:, :, ::-1]
        return torch.from_numpy(image.astype(np.float32) / 255), self.labels[index]


@dataclass(frozen=True)
class Row:
    loop: str
    seconds: float
    times: float  # as fast as the plain loop


def plain_loop(images: Images, how: Protocol, classes: int, device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    network = PAPER["resnet18"](classes, how.width).to(device)
    optimizer = torch.optim.SGD(network.parameters(), how.learning_rate, how.momentum)
    on_gpu = device.type == "cuda"
    batches = DataLoader(ImageByImage(images), how.batch, shuffle=True, num_workers=WORKERS, pin_memory=on_gpu)

    def epoch() -> None:
        loss_sum = right = 0
        for x, labels in batches:
            x, labels = x.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = network(x)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            right += (logits.argmax(1) == labels).sum().item()

    return epoch


def train_loop(data: Data, how: Protocol, device: torch.device) -> Callable[[], None]:
    training = Training(Cell("resnet18", "plain"), how, data, device)
    return lambda: training.one_epoch(lambda news: None)


def seconds(epoch: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    epoch()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", metavar="DIR", help="of CIFAR-10 (default: the synthetic images)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--width", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args(arguments)
    directory, device = directory_of(options.data), torch.device(options.device)
    data = load("cifar10" if directory else "synthetic", directory)
    images = min(options.images, len(data.training))
    data = replace(data, training=data.training.first(images))
    how = replace(protocol("table2", "paper"), training_images=images, width=options.width)

    loops = {"DataLoader, float32": plain_loop(data.training, how, data.classes, device)}
    on_device = data.to(device)
    for name in options.only:
        loops[f"train, {name}"] = train_loop(on_device, replace(how, **SETTINGS[name]), device)
    taken: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(1 + options.rounds):
        for name, epoch in loops.items():
            taken[name].append(seconds(epoch, device))
            print(f"round {turn}: {name}: {taken[name][-1]:.2f} s", flush=True)
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    first = next(iter(medians.values()))
    rows = [Row(name, median, first / median) for name, median in medians.items()]
    cells = [{"loop": row.loop, "s": short(row.seconds), "times as fast": f"{row.times:.3g}"} for row in rows]
    what = f"ResNet-18, width {options.width:g}, batches of {how.batch}, {images} images of {data.name}."
    text = f"{what}\n\n{aligned(cells)}"
    print(text)
    command = shlex.join(["python", "-m", "benchmarks.epoch", *arguments])
    print("Written to", save("A training epoch", text, rows, [], command, "-epoch"))


if __name__ == "__main__":
    main(sys.argv[1:])
