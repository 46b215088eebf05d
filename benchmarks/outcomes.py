"""What ``report`` says of every model of torchvision and of families of timm: ``python -m benchmarks.outcomes``.

Writes benchmarks/results/outcomes.md. ``--only 'torchvision:resnet*' timm:vgg16`` selects models; nothing is then
written.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from convnorm import GeometryError, report
from convnorm.loading import import_torchvision_models, load_model
from convnorm.report import Report
from convnorm.reporting.optional import optional

from .record import aligned, short, version, where_and_when

PAGE = Path(__file__).parent / "results" / "outcomes.md"
FAMILIES = {  # of timm
    "ResNet": ("resnet*", "resnext*", "wide_resnet*", "seresnet*", "seresnext*", "ecaresnet*", "nf_resnet*"),
    "ConvNeXt": ("convnext*",),
    "EfficientNet": ("efficientnet*", "tf_efficientnet*"),
    "RegNet": ("regnet*", "nf_regnet*"),
    "MobileNet": ("mobilenet*", "tf_mobilenet*"),
    "VGG": ("vgg*", "repvgg*"),
    "DenseNet": ("densenet*",),
}
SIZES = {"torchvision:inception_v3": 299}  # of torchvision, where it is not
SIZE = 224


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PATTERN")
    only = parser.parse_args(arguments).only
    torch.set_num_threads(1)
    sections = {}
    for title, names in models().items():
        chosen = [name for name in names if not only or any(fnmatch.fnmatch(name, pattern) for pattern in only)]
        sections[title] = []
        for name in chosen:
            sections[title].append(outcome(name).cells())
            gc.collect()  # exported graphs, which refer to themselves, hold weights
            print(*sections[title][-1].values(), sep="  ", flush=True)
    if not only:
        PAGE.write_text(page(sections, shlex.join(["python", "-m", "benchmarks.outcomes"])))
        print("Written to", PAGE)


def models() -> dict[str, list[str]]:
    """The names for ``load_model``, by section: all of torchvision's for classification, of timm those of FAMILIES."""
    torchvision = import_torchvision_models()
    timm = optional("timm")  # which imports torchvision itself, but not on a PyTorch that it was not built for
    found = {"torchvision": [f"torchvision:{name}" for name in torchvision.list_models(module=torchvision)]}
    for family, patterns in FAMILIES.items():
        names = [name for pattern in patterns for name in timm.list_models(pattern)]
        found[f"timm, {family}"] = [f"timm:{name}" for name in names]
    return found


@dataclass(frozen=True)
class Outcome:
    """Of one model; ``why`` it has no rows, if it has none."""

    model: str
    size: int
    parameters: int
    seconds: float = 0.0
    found: Report | None = None
    why: str = ""

    def cells(self) -> dict[str, str]:
        named = {"model": self.model.partition(":")[2], "input": str(self.size), "parameters": f"{self.parameters:,}"}
        cells = named | dict.fromkeys(("layers", "complete", "l1", "linf", "no bound", "s"), "")
        if self.found is None:
            return cells | {"complete": one_line(self.why)}
        unmeasured, bounds = self.found.unmeasured, self.found.lipschitz
        return cells | {
            "layers": str(len(self.found.rows)),
            "complete": f"no: {len(unmeasured)}, the first {unmeasured[0]}" if unmeasured else "yes",
            "l1": power(bounds["l1"].log10_upper),
            "linf": power(bounds["linf"].log10_upper),
            "no bound": one_line(bounds["l1"].refused.partition("; assume=")[0]),
            "s": short(self.seconds),
        }


def outcome(name: str) -> Outcome:
    """Of a model with new weights, always the same ones."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initialisations that are to change
        try:
            model = load_model(name)
        except (ValueError, ImportError) as error:
            return Outcome(name, SIZE, 0, why=str(error).removeprefix("convnorm: "))
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, SIZES.get(name, SIZE)))[-1]
    parameters = parameters_of(model)
    start = time.perf_counter()
    try:
        found = report(model, [1, 3, size, size], l2=False, bounds=True)
    except GeometryError as error:
        return Outcome(name, size, parameters, why=str(error).removeprefix("convnorm: "))
    except Exception as error:  # a bug, which must not end the run
        return Outcome(name, size, parameters, why=f"error: {type(error).__name__}: {error}")
    return Outcome(name, size, parameters, time.perf_counter() - start, found)


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def power(log10: float | None) -> str:
    """The exponent of ten."""
    return "" if log10 is None else f"{log10:.2f}"


def one_line(text: str) -> str:
    """As a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def page(sections: dict[str, list[dict[str, str]]], command: str) -> str:
    setting = where_and_when(command) | {"torchvision": version("torchvision"), "timm": version("timm")}
    facts = [f"- {key}: {value}" for key, value in setting.items() if value]
    everything = [cells for rows in sections.values() for cells in rows]
    parts = ["# Outcomes", "\n".join(facts), LEGEND, f"All: {summary(everything)}"]
    for title, rows in sections.items():
        parts += [f"## {title}", summary(rows), aligned(rows)]
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[dict[str, str]]) -> str:
    complete = sum(cells["complete"] == "yes" for cells in rows)
    return f"{len(rows)} models, {complete} with complete rows, {sum(cells['l1'] != '' for cells in rows)} with bounds."


LEGEND = """\
`convnorm.report(model, [1, 3, input, input], l2=False, bounds=True)` of models with new weights
(`torch.manual_seed(0)`), one thread. `complete`: whether every parameter of two or more axes belongs to a row, else how
many do not, and the first of them. `l1`, `linf`: log10 of the certified Lipschitz bound of the whole network; else,
under `no bound`, the node that has no known constant. `s`: seconds of the report, without making the model. New weights
hold zeros in places, as at the end of residual branches in timm: such a branch adds nothing to a bound."""

if __name__ == "__main__":
    main(sys.argv[1:])
