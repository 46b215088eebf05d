"""The paper's Table 1: its two rivals, what else gives an l2 norm, and the l1 and linf norms, on its six kernels; then
on layers that it leaves out.

``pytest --benchmark -k table1`` measures, prints and writes all of it, in some five minutes on two cores; ``--quick``
prints what takes a minute. On a GPU where there is one, else on the CPU with all its threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from convnorm.geometry import GeometryError
from convnorm.layers import Layer
from convnorm.spectral.bracket import Bracket, l2
from convnorm.spectral.gram import gram_iteration
from convnorm.spectral.lanczos import lanczos
from convnorm.spectral.rayleigh import Singular

from . import plot
from .contenders import contender, operators, serving
from .layers import BEYOND, DEPTHWISE, TABLE1, layers
from .record import Quantiles
from .rivals import one_row_of_frequencies, sedghi_gupta_long, virmaux_scaman, virmaux_scaman_as_released
from .table1 import BRACKET, COMPILED, EAGER, GRAM, LARGEST, OURS, PUBLISHED, RELEASED, SGL, TRUE_TO, Cell
from .timing import BLOCK, Block

CALLS, ROUNDS = 100, 5
SECONDS, QUICK_SECONDS = 2.0, 0.2  # for a cell, or one call
HUGE = ("resnet50",)  # on which what is slow takes minutes
UNHURRIED = ("resnet50", DEPTHWISE)  # left out of --quick
LARGE = ("3x3x256x512", "5x5x256x128", "5x5x512x256", "stride2", "dilation2")  # on which it leaves that out
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the compiler's own

Call = Callable[[], Sequence[object]]
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Method:
    """``start(layers)`` gives one call for all of them. Where layers are too large for a ``slow`` method, only its
    ``part`` is measured, a share of a call and how to start that; or nothing.
    """

    start: Callable[[Sequence[Layer]], Call]
    quantity: str = "l2"
    slow: bool = False
    part: tuple[float, Callable[[Sequence[Layer]], Call]] | None = None


def one_by_one(value: Callable[[Layer], object]) -> Callable[[Sequence[Layer]], Call]:
    return lambda todo: lambda: [value(layer) for layer in todo]


def together(who: str, todo: Sequence[Layer]) -> Call:
    """l1 and linf of all layers. The formula, as the paper has it, knows neither groups nor dilation."""
    if who != "convnorm" and any(layer.groups > 1 or {*layer.dilation} - {1} for layer in todo):
        raise GeometryError("convnorm: layer has groups or dilation, which the formula does not")
    norms = operators(todo) if who == "convnorm" else contender(who, todo)
    weights = [layer.weight for layer in todo]
    if who == "compiled":
        norms(weights)
    return lambda: norms(weights)


METHODS = {
    PUBLISHED: Method(one_by_one(virmaux_scaman)),
    RELEASED: Method(
        one_by_one(virmaux_scaman_as_released),
        slow=True,
        part=(1 / 20, one_by_one(partial(virmaux_scaman_as_released, iterations=23))),
    ),
    SGL: Method(one_by_one(sedghi_gupta_long), slow=True, part=(1 / 32, one_by_one(one_row_of_frequencies))),
    GRAM: Method(one_by_one(gram_iteration), slow=True),
    BRACKET: Method(one_by_one(partial(l2, rtol=1e-2))),
    LARGEST: Method(one_by_one(partial(lanczos, rtol=1e-3))),
    EAGER: Method(partial(together, "eager"), quantity="l1 and linf"),
    COMPILED: Method(partial(together, "compiled"), quantity="l1 and linf"),
    OURS: Method(partial(together, "convnorm"), quantity="l1 and linf"),
}


@pytest.fixture(scope="module")
def can_draw(request):
    if not request.config.option.quick:
        plot.require()


@pytest.mark.parametrize("name", TABLE1)
def test_kernel(name, cells, progress, can_draw, request):
    cells.extend(measure(name, METHODS, progress, request.config.option.quick))


@pytest.mark.parametrize("name", BEYOND)
def test_beyond_the_paper(name, cells, progress, can_draw, request):
    quick = request.config.option.quick
    if quick and name in UNHURRIED:
        pytest.skip("takes too long for --quick")
    methods = {method: how for method, how in METHODS.items() if method != RELEASED}  # it is broken here, too
    cells.extend(measure(name, methods, progress, quick))


def measure(name: str, methods: dict[str, Method], progress: Progress, quick: bool) -> Iterator[Cell]:
    todo = [replace(layer, weight=layer.weight.detach().to(DEVICE)) for layer in layers(name)]
    progress(0, f"{name}: true norms")
    truth = {"l2": [true_l2(layer) for layer in todo], "l1 and linf": true_l1_and_linf(todo)}
    torch.manual_seed(0)
    blocks, results, shares = {}, {}, {}
    for step, (method, how) in enumerate(methods.items(), 1):
        progress(step / (2 * len(methods)), f"{name}: {method}")
        in_parts = how.slow and (name in HUGE or (quick and name in LARGE))
        if in_parts and not how.part:
            continue
        share, start = how.part if in_parts else (1, how.start)
        try:
            blocks[method], result = first(start(todo))
        except GeometryError:
            yield Cell(name, method)
            continue
        shares[method] = share
        if share == 1:
            results[method] = result
    for step, method in turns(blocks, QUICK_SECONDS if quick else SECONDS):
        progress(0.5 + step / 2, f"{name}: {method}")
    for method, block in blocks.items():
        seconds = Quantiles.of([CALLS * s / shares[method] for s in block.seconds])
        calls = min(CALLS, len(block.seconds) * block.runs) * shares[method]
        yield Cell(name, method, seconds, calls, *spread(method, results, truth))


def first(call: Call) -> tuple[Block, Sequence[object]]:
    """A block of calls and the result of the first: of no account for times, unless one is as good as another."""
    start = time.perf_counter()
    result = call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    block = Block(call, DEVICE)
    if taken > 1:
        block.seconds.append(taken)
    elif taken < 10 * BLOCK:
        block.fill(BLOCK)
    return block, result


def turns(blocks: dict[str, Block], seconds: float) -> Iterator[tuple[float, str]]:
    """Block by block, by turns, until each was called often enough, or for so long; tells which is next."""
    total = len(blocks)
    while blocks := {name: block for name, block in blocks.items() if not is_done(block, seconds)}:
        for name, block in blocks.items():
            yield 1 - len(blocks) / total, name
            block()


def is_done(block: Block, seconds: float) -> bool:
    calls = block.runs * len(block.seconds)
    return sum(block.seconds) * block.runs >= seconds or (calls >= CALLS and len(block.seconds) >= ROUNDS)


def true_l2(layer: Layer) -> float:
    """By ARPACK, from products with the layer and its adjoint."""
    shape = (1, layer.in_channels, *layer.in_shape)
    size = int(np.prod(shape))

    def gram(x: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(x).view(shape).to(layer.weight)
        return layer.adjoint(layer(x)).flatten().cpu().numpy()

    operator = LinearOperator((size, size), matvec=gram, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        (square,) = eigsh(operator, 1, which="LA", tol=1e-3, v0=start, return_eigenvectors=False)
    return float(square) ** 0.5


def true_l1_and_linf(todo: Sequence[Layer]) -> list[float]:
    with serving("reference"):
        l1, linf = operators(todo)([layer.weight.double() for layer in todo])
    return [*l1.flatten().tolist(), *linf.flatten().tolist()]


def spread(method: str, results: dict[str, Sequence[object]], truth: dict[str, list[float]]) -> tuple[float, ...]:
    """The least and the largest value / true norm of all layers; they are on the side that the method says."""
    if method not in results:
        return ()
    quantity, result = METHODS[method].quantity, results[method]
    values = result if quantity == "l2" else torch.cat([norms.flatten() for norms in result])
    bounds = zip(map(ends, values), truth[quantity], strict=True)
    lower, upper = zip(*((low / true, high / true) for (low, high), true in bounds), strict=True)
    if method in (PUBLISHED, RELEASED, LARGEST, BRACKET) or quantity != "l2":
        assert max(lower) < 1 + TRUE_TO, f"{method} is more than the true norm"
    if method in (GRAM, BRACKET) or quantity != "l2":
        assert min(upper) > 1 - TRUE_TO, f"{method} is less than the true norm"
    return min(lower), max(upper)


def ends(value: Bracket | Singular | Tensor) -> tuple[float, float]:
    if isinstance(value, Bracket):
        return float(value.lower), float(value.upper)
    value = float(value.value if isinstance(value, Singular) else value)
    return value, value
