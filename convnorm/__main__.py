"""``python -m convnorm report | compare | check MODEL --input 3 32 32``: the norms of a model's layers.

``check`` prints each beside what its witness attains; ``command.py`` has the others.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from torch import nn

from . import loading, norms, witness
from .command import add_commands
from .layers import as_stored
from .uses import Use, observe

TOLERANCE = 1e-5  # relative, of a sum in float32


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convnorm", description=__doc__)
    commands = parser.add_subparsers(required=True)
    add_commands(commands)
    check = commands.add_parser("check", help="print the norms of all layers beside what their witnesses attain")
    check.add_argument("model", metavar="MODEL", help="package.module:factory, or another as for report")
    check.add_argument("--input", type=int, nargs="+", required=True, metavar="SIZE", help="channels and spatial sizes")
    check.set_defaults(run=lambda options: check_model(load_model(options.model), options.input))
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, ImportError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2


def load_model(name: str) -> nn.Module:
    model = loading.load_model(name)
    if not isinstance(model, nn.Module):
        raise ValueError(f"convnorm: MODEL {name!r} is an exported program, whose layers are no modules to check")
    return model


def check_model(model: nn.Module, in_shape: list[int]) -> int:
    """Print every layer's norms, and what their witnesses attain when the layer itself maps them. 1 if one is off."""
    print(
        f"{'layer':24} {'kind':10} {'weight':20} {'input':8} {'l1':>10} {'attained':>10} {'linf':>10} {'attained':>10}"
    )
    differences = [0.0]
    training = [module for module in model.modules() if module.training]
    model.eval()  # parametrized weights may change in training whenever they are read
    uses = observe(model, [1, *in_shape])
    if not uses:
        raise ValueError(f"convnorm: model {type(model).__name__} uses no convolutional or fully connected layer")
    for use in uses:
        found = norms(use.layer)
        row = [attained(use, ord) for ord in (1, math.inf)]
        l1, linf = found.l1.item(), found.linf.item()
        differences += [abs(got - said) / (said or 1) for got, said in zip(row, (l1, linf), strict=True)]
        size = "x".join(map(str, use.in_shape))
        shape = "x".join(map(str, use.module.weight.shape))
        kind = type(use.module).__name__
        print(f"{use.name:24} {kind:10} {shape:20} {size:8} {l1:10.6g} {row[0]:10.6g} {linf:10.6g} {row[1]:10.6g}")
    for module in training:
        module.training = True
    worst = math.nan if any(map(math.isnan, differences)) else max(differences)
    print(f"Largest difference between a norm and what its witness attains: {worst:.1e}, relative.")
    return int(not worst <= TOLERANCE)


def attained(use: Use, ord: float) -> float:
    """||layer(x)|| / ||x|| for the witness x, by the module itself in double precision, without its bias."""
    module = as_stored(use.module).double()
    module.bias = None
    if use.layer.transposed:
        module.output_padding = use.layer.output_padding
    x = witness(use.layer, ord=ord).double()
    with torch.no_grad():
        y = module(x)
    return (torch.linalg.vector_norm(y, ord) / torch.linalg.vector_norm(x, ord)).item()


if __name__ == "__main__":
    sys.exit(main())
