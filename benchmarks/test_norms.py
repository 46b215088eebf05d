"""Both norms of a layer, and of all layers of a network, against a bare read of the weights.

``pytest --benchmark -k "kernel and native"`` or ``-k "resnet18 and cuda"`` selects; the names are those of the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pytest
import torch

from convnorm.backends import BACKENDS, why_not

from .contenders import CONTENDERS, Contender, backward, bare_read, contender, forward, operators, serving
from .layers import NETWORKS, TABLE1, layers, size, weights_of
from .record import Row
from .timing import block, by_turns, device_copy, launches, threads

SECONDS, QUICK_SECONDS = 0.7, 0.03  # for each row
QUICK = ("3x3x32x32", "3x3x256x512", "resnet18")
CALLS_PER_GRAPH = 20
MEGABYTE = 1 << 20

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the compiler's own


@dataclass(frozen=True)
class Case:
    name: str
    direction: str
    contender: str
    device: str
    threads: int | None = None  # None on a GPU
    graph: bool = False

    def __str__(self) -> str:
        how = f"threads{self.threads}" if self.threads else "graph" if self.graph else "calls"
        return f"{self.name}-{self.direction}-{self.contender}-{self.device}-{how}"

    @property
    def budget(self) -> dict[str, float]:
        """What convnorm aims at for this case, where it has said so."""
        if self.direction == "backward" or self.contender not in ("native", "triton"):
            return {}
        if self.device == "cpu":
            return {} if self.name == "resnet50" else {"ratio": 1.15 if size(self.name) >= MEGABYTE else 2.5}
        if not self.graph or self.name == "resnet50":
            return {}
        return {"us": 5.0} if self.name in TABLE1 else {"copy_ratio": 1.3}


def cases(names: list[str], quick: bool) -> Iterator[Case]:
    where = [("cpu", count, False) for count in (1, 2)]
    where += [("cuda", None, graph) for graph in (False, True)] if torch.cuda.is_available() else []
    for name in names:
        for direction in ("forward", "backward"):
            for device, count, graph in where:
                for who in CONTENDERS:
                    case = Case(name, direction, who, device, count, graph)
                    if can_run(case) and (not quick or is_quick(case)):
                        yield case


def can_run(case: Case) -> bool:
    if case.contender == "triton":
        return case.device == "cuda"
    if case.contender == "reference":  # copies its windows to the GPU on every call, which no graph can capture
        return not case.graph
    if case.contender == "compiled":  # half a minute of compilation for the gradients of a network
        return case.name in TABLE1 or case.direction == "forward"
    return True


def is_quick(case: Case) -> bool:
    if case.contender == "compiled":
        return case.name == QUICK[0] and case.direction == "forward" and case.threads != 2
    return case.name in QUICK and not (case.name in NETWORKS and case.threads == 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        names = list(TABLE1 if metafunc.function is test_kernel else NETWORKS)
        metafunc.parametrize("case", list(cases(names, metafunc.config.option.quick)), ids=str)


@pytest.fixture
def seconds(request):
    return QUICK_SECONDS if request.config.option.quick else SECONDS


def test_kernel(case, benchmark, rows, seconds):
    rows.append(measure(case, benchmark, seconds))


def test_network(case, benchmark, rows, seconds):
    rows.append(measure(case, benchmark, seconds))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts launches on a GPU")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", [*TABLE1, *NETWORKS])
def test_launches(name, backend, rows):
    """Comes last: once used, the profiler may slow what follows."""
    if reason := why_not(backend, "cuda"):
        pytest.skip(reason)
    with serving(backend):
        count = launches(forward(operators(layers(name)), weights_of(name, "cuda", gradients=False)))
    rows.append(Row(name, "forward", backend, "cuda", None, False, launches=count, budget={"launches": 2}))


def measure(case: Case, benchmark, seconds: float) -> Row:
    if case.contender in BACKENDS and (reason := why_not(case.contender, case.device)):
        pytest.skip(reason)
    with serving(case.contender), threads(case.threads):
        norms = contender(case.contender, layers(case.name))
        check(case, norms)
        sets = [weights_of(case.name, case.device, case.direction == "backward") for _ in range(weight_sets(case))]
        calls = [(forward if case.direction == "forward" else backward)(norms, weights) for weights in sets]
        reads = [bare_read(weights) for weights in sets]
        repeats = CALLS_PER_GRAPH if case.graph and len(sets) == 1 else 1
        contending = block(calls * repeats, case.device, case.graph)
        read = block(reads * repeats, case.device, case.graph)
        copy = device_copy(size(case.name)) if case.device == "cuda" else None
        by_turns(benchmark, contending, [read, copy] if copy else [read], seconds)
    row = Row(
        name=case.name,
        direction=case.direction,
        backend=case.contender,
        device=case.device,
        threads=case.threads,
        graph=case.graph,
        us=contending.us,
        ratio=contending.ratio_to(read),
        copy_ratio=contending.ratio_to(copy) if copy else None,
        budget=case.budget,
    )
    benchmark.extra_info.update(asdict(row), calls_per_round=contending.runs * contending.calls_per_run)
    return row


def weight_sets(case: Case) -> int:
    """Sets of a network's weights to go through on a GPU, so that none is still in its cache when its turn comes."""
    if case.device == "cpu" or case.name in TABLE1:
        return 1
    return 1 + math.ceil(3 * torch.cuda.get_device_properties(0).L2_cache_size / size(case.name))


def check(case: Case, norms: Contender) -> None:
    """Its values and gradients are right: nobody gains time with wrong ones."""
    weights = weights_of(case.name, case.device, case.direction == "backward")
    values = tuple(v.detach() for v in norms(weights))
    with serving("reference"), torch.no_grad():
        expected = operators(layers(case.name))(weights)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)
    if case.direction == "backward":  # a norm is the inner product of its subgradient with the weight
        gradients = backward(norms, weights)()
        product = sum((g * w.detach()).sum() for g, w in zip(gradients, weights, strict=True))
        torch.testing.assert_close(product, sum(v.sum() for v in expected), rtol=1e-4, atol=0)
