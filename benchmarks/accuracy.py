"""How near each method comes to the l2 norm, and at what cost: ``python -m benchmarks.accuracy --data DIR``.

On every layer of a ResNet-20 that is trained for that on CIFAR-10, which lies in DIR; ``--checkpoint FILE`` keeps its
weights for the next time. Writes a table, a plot and all values to benchmarks/results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from convnorm.geometry import GeometryError
from convnorm.layers import Layer
from convnorm.spectral.bounds import frobenius, sqrt_l1_linf
from convnorm.spectral.bracket import Bracket, l2
from convnorm.spectral.fft import circle_norm, fft_singular_values
from convnorm.spectral.gram import gram_iteration
from convnorm.spectral.lanczos import lanczos
from convnorm.spectral.power_iteration import power_iteration
from convnorm.spectral.rayleigh import Singular
from convnorm.spectral.reshaped import four_reshapings, reshaped_estimate
from convnorm.spectral.tensor_norm import tensor_norm_estimate
from convnorm.uses import Use, observe

from . import scatter
from .plot import require
from .record import Quantiles, aligned, machine, save, short
from .timing import Block
from .trained import trained

UPPER, LOWER, NEITHER = "upper bound", "lower bound", "no bound"
TRUE_TO, FAILURE = 1e-6, 1e-12
ROUNDS = 7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

METHODS: dict[str, Callable[[Layer], Bracket | Singular | Tensor]] = {
    "l2(rtol=1e-2)": partial(l2, rtol=1e-2),
    "l2(rtol=1e-3)": partial(l2, rtol=1e-3),
    "lanczos(rtol=1e-2)": partial(lanczos, rtol=1e-2),
    "lanczos(rtol=1e-3)": partial(lanczos, rtol=1e-3),
    "power_iteration(iterations=10)": partial(power_iteration, iterations=10),
    "power_iteration(iterations=100)": partial(power_iteration, iterations=100),
    "circle_norm": circle_norm,
    "gram_iteration": gram_iteration,
    "four_reshapings": four_reshapings,
    "frobenius": frobenius,
    "sqrt_l1_linf": sqrt_l1_linf,
    "tensor_norm_estimate": tensor_norm_estimate,
    "fft_singular_values": lambda layer: fft_singular_values(layer).max(),
    "reshaped_estimate": reshaped_estimate,
}
ESTIMATES = ("tensor_norm_estimate", "fft_singular_values", "reshaped_estimate")


@dataclass(frozen=True)
class Row:
    """One value of one method on one layer, or why it has none."""

    method: str
    gives: str
    layer: str
    true_lower: float
    true_upper: float
    value: float | None = None
    seconds: float | None = None
    certificate: str = ""  # what proves a bracket
    refused: str = ""

    @property
    def ratio(self) -> float:
        return 2 * self.value / (self.true_lower + self.true_upper)

    @property
    def is_below(self) -> bool:
        return self.value < self.true_lower

    @property
    def violated(self) -> bool:
        return self.is_below if self.gives == UPPER else self.gives == LOWER and self.value > self.true_upper


@dataclass(frozen=True)
class Summary:
    """One kind of value of one method over the layers that it admits."""

    method: str
    gives: str
    rows: Sequence[Row]
    refused: Sequence[Row]

    @property
    def name(self) -> str:
        """As one would write it; of a bracket, which end."""
        return self.method + ("." + self.gives.split()[0] if self.rows[0].certificate else "")

    @property
    def ratios(self) -> list[float]:
        return [row.ratio for row in self.rows]

    @property
    def milliseconds(self) -> Quantiles:
        """Over the layers."""
        return Quantiles.of([1e3 * row.seconds for row in self.rows])

    @property
    def off(self) -> list[float]:
        return [abs(ratio - 1) for ratio in self.ratios]

    @property
    def side(self) -> str:
        """What it gives, and on how many layers that is not what people take it for."""
        bad = sum(row.is_below if self.gives == NEITHER else row.violated for row in self.rows)
        if self.gives == NEITHER:
            return f"**no bound: below the norm on {bad} of {len(self.rows)}**" if bad else "no bound: never below here"
        return f"**{self.gives}, VIOLATED on {bad} of {len(self.rows)}**" if bad else self.gives

    def cells(self) -> dict[str, str]:
        return {
            "method": f"`{self.name}`",
            "gives": self.side,
            "least": f"{min(self.ratios):.4f}",
            "median": f"{statistics.median(self.ratios):.4f}",
            "largest": f"{max(self.ratios):.4f}",
            "off, at worst": size(max(self.off)),
            "ms a layer": str(self.milliseconds),
            "layers": f"{len(self.rows)} of {len(self.rows) + len(self.refused)}",
        }


def measure(use: Use) -> tuple[dict[str, str], list[Row]]:
    """The layer as a line of a table, and every method on it: by turns, so that other work slows all alike."""
    layer = replace(use.layer, weight=use.layer.weight.detach())
    begin = time.perf_counter()
    truth = l2(layer, rtol=TRUE_TO, failure=FAILURE)
    if truth.stopped:
        raise RuntimeError(f"layer {use.name!r}: no true norm, the bracket is open: {truth}")
    line = {
        "layer": use.name,
        "weight": "x".join(map(str, layer.weight.shape)),
        "stride": "x".join(map(str, layer.stride)),
        "input": "x".join(map(str, layer.in_shape)),
        "l2 norm": f"{truth.lower.item():.6f}",
        "proved by": truth.certificate,
        "s": short(time.perf_counter() - begin),
    }
    common = {"layer": use.name, "true_lower": truth.lower.item(), "true_upper": truth.upper.item()}
    rows, results, blocks = [], {}, {}
    for method, call in METHODS.items():
        try:
            results[method] = call(layer)
        except GeometryError as error:
            rows.append(Row(method, NEITHER, **common, refused=str(error)))
            continue
        blocks[method] = Block(partial(call, layer), DEVICE)
    for _ in range(ROUNDS):
        for block in blocks.values():
            block()
    for method, result in results.items():
        seconds, certificate = statistics.median(blocks[method].seconds), getattr(result, "certificate", "")
        for gives, value in values(method, result).items():
            rows.append(Row(method, gives, **common, value=value, seconds=seconds, certificate=certificate))
    return line, rows


def values(method: str, result: Bracket | Singular | Tensor) -> dict[str, float]:
    """What it gives, by what that is."""
    if isinstance(result, Bracket):
        return {UPPER: float(result.upper), LOWER: float(result.lower)}
    if isinstance(result, Singular):
        return {LOWER: float(result.value)}
    return {NEITHER if method in ESTIMATES else UPPER: float(result)}


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Upper bounds, lower bounds, what is neither; each from the fastest on."""
    found = []
    for method, gives in dict.fromkeys((row.method, row.gives) for row in rows):
        own = [row for row in rows if (row.method, row.gives) == (method, gives)]
        done, refused = ([row for row in own if bool(row.refused) == bad] for bad in (False, True))
        if done:
            found.append(Summary(method, gives, done, refused))
    return sorted(found, key=lambda one: ((UPPER, LOWER, NEITHER).index(one.gives), one.milliseconds.median))


def size(off: float) -> str:
    return f"< {TRUE_TO:g}" if off < TRUE_TO else f"{off:.1e}" if off < 0.01 else short(off)


def advice(found: Sequence[Summary]) -> str:
    """Which to choose: the methods than which no other is both faster and nearer, at worst."""
    purpose = {UPPER: "for what must be proved", LOWER: "for an estimate of the norm, which all of these approach"}
    lines = []
    for gives, why in purpose.items():
        front, beaten = [], []
        for one in found:  # from the fastest on
            if one.gives == gives and not one.refused:
                is_nearer = not front or max(one.off) < max(front[-1].off)
                (front if is_nearer else beaten).append(one)
        lines.append(f"**{gives.capitalize()}**, {why}; from the fastest to the nearest, at worst:")
        lines.append("\n".join(f"- {cost(one)}: {at_worst(one)}" for one in front))
        if beaten:
            names = ", ".join(f"`{one.name}`" for one in beaten)
            lines.append(f"One of these is both faster and, at worst, no further off than {names}.")
    lines.append("**Both bounds**, to know how near they are:")
    upper, lower = ({one.method: one for one in found if one.gives == gives} for gives in purpose)
    lines.append("\n".join(f"- {bracket(upper[m], lower[m])}" for m in upper if m in lower))
    lines.append("**No bound**, whatever they are taken for:")
    estimates = [one for one in found if one.gives == NEITHER]
    lines.append("\n".join(f"- {cost(one)}: {span(one)}" for one in estimates))
    return "\n\n".join(lines)


def cost(one: Summary) -> str:
    return f"`{one.name}`, {one.milliseconds} ms"


def at_worst(one: Summary) -> str:
    ratio = max(one.ratios, key=lambda ratio: abs(ratio - 1))
    return f"{ratio:.4g} x the norm" if abs(ratio - 1) > 1e-3 else f"{size(abs(ratio - 1))} off"


def bracket(upper: Summary, lower: Summary) -> str:
    width = max(high.value / low.value - 1 for high, low in zip(upper.rows, lower.rows, strict=True))
    proofs = Counter(row.certificate for row in upper.rows).most_common()
    proved = ", ".join(f"{certificate}: {count}" for certificate, count in proofs)
    return f"`{upper.method}`, {upper.milliseconds} ms: at most {width:.1e} apart. Proved by {proved}"


def span(one: Summary) -> str:
    below = sum(row.is_below for row in one.rows)
    return f"{min(one.ratios):.4g} to {max(one.ratios):.4g} x the norm, below it on {below} of {len(one.rows)} layers"


def refusals(found: Sequence[Summary]) -> str:
    reasons = Counter((one.name, row.refused) for one in found for row in one.refused)
    return "\n".join(f"- `{name}` refuses {count} layers: {reason}" for (name, reason), count in reasons.items())


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="holds CIFAR-10, or is to hold it")
    parser.add_argument("--steps", type=int, default=400, help="of training, each of 128 images")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="of the trained weights, to read or to write")
    options = parser.parse_args(arguments)
    require()
    network, accuracy = trained(options.data, options.steps, DEVICE, options.checkpoint)
    print(f"ResNet-20 after {options.steps} steps: {accuracy:.2%} of the test images named right", flush=True)
    torch.manual_seed(0)
    lines, rows = [], []
    for use in observe(network, [1, 3, 32, 32]):
        line, own = measure(use)
        lines.append(line)
        rows += own
        print(*line.values(), sep="  ", flush=True)
    found = summaries(rows)
    setting = (
        f"ResNet-20, {accuracy:.1%} right on CIFAR-10's test images after {options.steps} steps of training; "
        f"its {len(lines)} layers one by one; {machine()}."
    )
    parts = [setting, LEGEND, aligned([one.cells() for one in found]), refusals(found)]
    parts += ["## Which to choose", advice(found), "## The layers", aligned(lines)]
    text = "\n\n".join(part for part in parts if part)
    print(text)
    violated = [f"{row.method}, {row.gives} {row.value!r} on {row.layer}" for row in rows if row.violated]
    command = f"python -m benchmarks.accuracy --data DIR --steps {options.steps}"
    markdown = save("l2 norms: accuracy against cost", text, rows, violated, command, "-accuracy", accuracy=accuracy)
    plot = markdown.with_suffix(".svg")
    scatter.draw(found, f"l2 norms of the layers of a trained ResNet-20, {machine()}", plot)
    with markdown.open("a") as file:
        file.write(f"\n![How far off each method is, and its time]({plot.name})\n")
    print("Written to", markdown)
    if violated:
        sys.exit("A certified bound is violated: " + "; ".join(violated))


LEGEND = f"""\
`least`, `median`, `largest`: value / true norm over the layers; `off, at worst`: the largest |value / true norm - 1|.
`ms a layer`: the median over the layers, in brackets the 10th and 90th percentile; each layer's is the median of
{ROUNDS} calls, by turns with all other methods. True norms are brackets to {TRUE_TO:g} that fail with probability
{FAILURE:g} at most; values on the wrong side of them are told in bold.

All of `convnorm.spectral`, values without gradients, in float64 but for the searches of `l2`, `lanczos`,
`power_iteration` and `tensor_norm_estimate`. `l2` is deterministic: no probability of failure is admitted.
`fft_singular_values`, the largest, takes padding for circular (Sedghi et al.); `reshaped_estimate` is what PyTorch's
`spectral_norm` converges to (Miyato et al.); `tensor_norm_estimate` (Grishina et al.) is above the norm if its
iteration has come far enough. People take these three for upper bounds, or for the norm."""

if __name__ == "__main__":
    main(sys.argv[1:])
