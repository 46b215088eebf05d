"""A step of norm decay on a ResNet-18 against a bare read of its weights; the optimizer that reads them once against
PyTorch's; and a training step with norm decay against one without.

``pytest --benchmark benchmarks/test_decay.py``. Contenders: convnorm's backends, and ``dense``, Algorithm 1 with whole
tensors in eager PyTorch. ``scattered``: the worst case, in which all terms of the average are of different channels;
where a layer's winner seldom changes, as in training, they are of one or a few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convnorm
from convnorm.backends import BACKENDS, backend_for, why_not
from train.models import resnet18, resnet18_cifar

from .contenders import bare_read, serving, theorem1
from .record import Row
from .timing import Between, block, by_turns, launches, threads

SECONDS, QUICK_SECONDS = 1.0, 0.05
IMAGES = [32, 3, 32, 32]  # a training step's, of CIFAR-10: a quarter of the paper's
ORDS = {"l1": 1, "linf": math.inf}


@dataclass(frozen=True)
class Case:
    contender: str
    ord: str
    device: str
    threads: int | None = None  # None on a GPU
    graph: bool = False
    scattered: bool = False

    def __str__(self) -> str:
        how = f"threads{self.threads}" if self.threads else "graph" if self.graph else "calls"
        return f"{self.ord}{'-scattered' * self.scattered}-{self.contender}-{self.device}-{how}"

    @property
    def budget(self) -> dict[str, float]:
        if self.contender not in ("native", "triton") or self.scattered:
            return {}
        return {"ratio": 1.3} if self.device == "cpu" else {"us": 25.0} if self.graph else {}


def cases() -> Iterator[Case]:
    where = [("cpu", count, False) for count in (1, 2)]
    where += [("cuda", None, graph) for graph in (False, True)] if torch.cuda.is_available() else []
    for device, count, graph in where:
        for ord in ORDS:
            for who in ("native", "triton", "reference", "dense"):
                if (who == "triton" and device == "cpu") or (graph and who not in ("native", "triton")):
                    continue
                yield Case(who, ord, device, count, graph)
                if who in ("native", "triton"):
                    yield Case(who, ord, device, count, graph, scattered=True)


@pytest.fixture
def seconds(request):
    return QUICK_SECONDS if request.config.option.quick else SECONDS


def aimed(ratio: float, backend: str) -> dict[str, float]:
    """The budget of what the best backend that there is serves."""
    return {} if backend == "reference" else {"ratio": ratio}


def network(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    model = resnet18().to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-6
    return model


def norm_decay(model: nn.Module, ord: str) -> convnorm.NormDecay:
    return convnorm.NormDecay(model, [1, 3, 224, 224], ord=ORDS[ord], beta=1e-6)


class DenseDecay:
    """Algorithm 1 as one would write it: the formula's gradient, an average as large as the weights."""

    def __init__(self, decay: convnorm.NormDecay, beta: float = 1e-6, momentum: float = 0.5) -> None:
        self.layers = [use.layer for use in decay.uses]
        self.averages = [torch.zeros_like(layer.weight) for layer in self.layers]
        self.which, self.rate, self.momentum = int(decay.ord == math.inf), beta / len(self.layers), momentum

    def step(self) -> None:
        for layer, average in zip(self.layers, self.averages, strict=True):
            norm = theorem1(layer.weight, layer.stride)[self.which]
            (subgradient,) = torch.autograd.grad(norm, layer.weight)
            average.mul_(self.momentum).add_(subgradient, alpha=1 - self.momentum)
            layer.weight.grad.add_(average, alpha=self.rate)


def scatter(decay: convnorm.NormDecay) -> None:
    """As if another channel had won at every step."""
    for batch in decay.batches():
        channels = batch.state.channels
        for i, layer in enumerate(use.layer for use in batch.uses):
            count = layer.in_channels if decay.ord == 1 else layer.out_channels
            channels[:, i] = torch.randperm(max(count, len(channels)), device=channels.device)[: len(channels)] % count


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_decay_step(case, benchmark, rows, seconds):
    if case.contender in BACKENDS and (reason := why_not(case.contender, case.device)):
        pytest.skip(reason)
    with serving(case.contender), threads(case.threads):
        decay = norm_decay(network(case.device), case.ord)
        weights = [use.module.weight for use in decay.uses]
        step = DenseDecay(decay).step if case.contender == "dense" else decay.step
        contending, read = (block([call], case.device, case.graph) for call in (step, bare_read(weights)))
        between = [Between(lambda: scatter(decay))] * case.scattered
        by_turns(benchmark, contending, [read, *between], seconds)
    rows.append(
        Row(
            name="resnet18",
            direction=f"decay step, {case.ord}{', scattered' * case.scattered}",
            backend=case.contender,
            device=case.device,
            threads=case.threads,
            graph=case.graph,
            us=contending.us,
            ratio=contending.ratio_to(read),
            budget=case.budget,
        )
    )


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("count", [1, 2], ids=lambda count: f"threads{count}")
def test_sgd(count, ord, benchmark, rows, seconds):
    """With momentum and weight decay: convnorm.optim.SGD, and torch.optim.SGD with norm decay attached."""
    options = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}
    model, attached, plain = network(), network(), network()
    own = convnorm.optim.SGD(model.parameters(), **options, norm_decay=norm_decay(model, ord))
    torchs = torch.optim.SGD(attached.parameters(), **options, fused=True)
    norm_decay(attached, ord).attach(torchs)
    without = torch.optim.SGD(plain.parameters(), **options, fused=True)
    with threads(count):
        blocks = [block([optimizer.step], "cpu") for optimizer in (own, torchs, without)]
        by_turns(benchmark, blocks[0], blocks[1:], seconds)
    what, aim = f"SGD step with decay, {ord}", aimed(1.1, backend_for(torch.device("cpu")))
    for name, one, budget in (("convnorm", blocks[0], aim), ("torch, attached", blocks[1], {})):
        times, against = one.us, one.ratio_to(blocks[2])
        rows.append(Row("resnet18", what, name, "cpu", count, False, times, against, budget=budget, against="SGD"))


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("count", [1, 2], ids=lambda count: f"threads{count}")
def test_projection(count, ord, benchmark, rows, seconds):
    """Of weights that are within their bounds: what a step costs when it has nothing to do."""
    model = network()
    projection = convnorm.Projection(model, [1, 3, 224, 224], ord=ORDS[ord], bound=1e6)
    weights = [use.module.weight for use in norm_decay(model, ord).uses]
    with threads(count):
        contending, read = block([projection.step], "cpu"), block([bare_read(weights)], "cpu")
        by_turns(benchmark, contending, [read], seconds)
    what = f"projection, {ord}"
    backend = backend_for(torch.device("cpu"))
    rows.append(Row("resnet18", what, backend, "cpu", count, False, contending.us, contending.ratio_to(read)))


@pytest.mark.parametrize("ord", ORDS)
def test_training_step(ord, benchmark, rows, seconds):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = torch.randn(IMAGES, device=device), torch.randint(10, IMAGES[:1], device=device)

    torch.manual_seed(0)
    model = resnet18_cifar().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True)
    decay = convnorm.NormDecay(model, IMAGES, ord=ORDS[ord], beta=1e-6)

    def step(decays: bool) -> None:  # of one model: two would lie in memory in different ways
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        if decays:
            decay.step()
        optimizer.step()

    blocks = [block([partial(step, decays)], device) for decays in (True, False)]
    by_turns(benchmark, blocks[0], blocks[1:], 10 * seconds)
    times, against = blocks[0].us, blocks[0].ratio_to(blocks[1])
    count = torch.get_num_threads() if device == "cpu" else None
    what, backend = f"training step with decay, {ord}", backend_for(torch.device(device))
    budget = aimed(1.01, backend)
    rows.append(
        Row("resnet18 on CIFAR", what, backend, device, count, False, times, against, budget=budget, against="without")
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts launches on a GPU")
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_launches(backend, rows):
    if reason := why_not(backend, "cuda"):
        pytest.skip(reason)
    with serving(backend):
        step = norm_decay(network("cuda"), "l1").step
        count = launches(step)
    rows.append(Row("resnet18", "decay step, l1", backend, "cuda", None, False, launches=count, budget={"launches": 3}))
