"""How tight l2 brackets are on whole networks: ``python -m benchmarks.brackets``, written to benchmarks/results.

Every layer at the size of its input: deterministically to 1e-2, and to 1e-3 where Lanczos from random starts may serve,
with failure probability 1e-12. ``--only resnet50 convnext_tiny`` selects networks; nothing is then written.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import convnorm
from convnorm.uses import Use, observe
from train import models

from .record import aligned, save, short

NETWORKS = {  # and their input
    "resnet18_cifar": 32,
    "vgg11_cifar": 32,
    "regnetx_200mf_cifar": 32,
    "resnet18": 224,
    "resnet50": 224,
    "convnext_tiny": 224,
}
WIDE, NARROW, FAILURE = 1e-2, 1e-3, 1e-12


@dataclass(frozen=True)
class Row:
    network: str
    layer: str
    weight: tuple[int, ...]
    in_shape: tuple[int, ...]
    groups: int
    lower: float
    upper: float
    certificate: str
    stopped: str
    seconds: float
    narrow_lower: float
    narrow_upper: float
    narrow_certificate: str
    narrow_stopped: str
    narrow_seconds: float

    @property
    def closed(self) -> bool:
        return self.upper <= (1 + WIDE) * self.lower

    @property
    def narrowly(self) -> bool:
        return self.narrow_upper <= (1 + NARROW) * self.narrow_lower

    def cells(self) -> dict[str, str]:
        return {
            "layer": self.layer,
            "weight": "x".join(map(str, self.weight)) + (f", {self.groups} groups" if self.groups > 1 else ""),
            "input": "x".join(map(str, self.in_shape)),
            "lower": f"{self.lower:.5g}",
            "upper": f"{self.upper:.5g}",
            "proved by": self.certificate + ("" if self.closed else ", OPEN"),
            "s": short(self.seconds),
            "upper / lower - 1": f"{self.narrow_upper / self.narrow_lower - 1:.1e}",
            "to 1e-3 by": self.narrow_certificate.partition(",")[0] + ("" if self.narrowly else ", OPEN"),
            "s ": short(self.narrow_seconds),
        }


def measure(network: str, use: Use) -> Row:
    layer = use.layer
    start = time.perf_counter()
    wide = convnorm.l2(layer, rtol=WIDE)
    between = time.perf_counter()
    narrow = convnorm.l2(layer, rtol=NARROW, failure=FAILURE, start=wide.right)
    end = time.perf_counter()
    return Row(
        network, use.name, tuple(layer.weight.shape), use.in_shape, layer.groups,
        wide.lower.item(), wide.upper.item(), wide.certificate, wide.stopped, between - start,
        narrow.lower.item(), narrow.upper.item(), narrow.certificate, narrow.stopped, end - between,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    only = parser.parse_args(arguments).only
    torch.set_num_threads(1)
    rows, text = [], [LEGEND]
    for name in only:
        torch.manual_seed(0)
        size = NETWORKS[name]
        for use in observe(getattr(models, name)(), [1, 3, size, size]):
            rows.append(measure(name, use))
            print(name, *rows[-1].cells().values(), sep="  ", flush=True)
        own = [row for row in rows if row.network == name]
        text += [f"## {name}, {size}x{size}", summary(own), aligned([row.cells() for row in own])]
    text.insert(1, f"All: {summary(rows)}")
    print("\n\n".join(text))
    if only == list(NETWORKS):
        command = shlex.join(["python", "-m", "benchmarks.brackets", *arguments])
        print("Written to", save("l2 brackets", "\n\n".join(text), rows, [], command, "-brackets"))


def summary(rows: Sequence[Row]) -> str:
    closed, narrowly = sum(row.closed for row in rows), sum(row.narrowly for row in rows)
    proofs = Counter(row.certificate for row in rows)
    return (
        f"{closed} of {len(rows)} layers to {WIDE:g}, deterministically ({closed / len(rows):.1%}), in "
        f"{short(sum(row.seconds for row in rows))} s; {narrowly} to {NARROW:g} ({narrowly / len(rows):.1%}), in "
        f"{short(sum(row.narrow_seconds for row in rows))} s. Proved by "
        + ", ".join(f"{certificate}: {count}" for certificate, count in proofs.most_common())
        + "."
    )


LEGEND = f"""\
Layers as they are initialised (`torch.manual_seed(0)`), one thread. `lower`, `upper` and the first time:
`convnorm.l2(layer)`, which is deterministic, to {WIDE:g}. Then `convnorm.l2(layer, rtol={NARROW:g},
failure={FAILURE:g})`, begun where the first one ended: by the same proofs where they reach that far, else by Lanczos
from random starts. `OPEN`: wider than asked for."""

if __name__ == "__main__":
    main(sys.argv[1:])
