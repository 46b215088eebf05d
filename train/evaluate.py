"""``python -m train evaluate CHECKPOINT``: all that is measured of one trained network, as numbers and as a page."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnorm.uses import observe

from . import rows
from .attacks import RELEASED, STANDARD, autoattack
from .data import Data, directory_of, inputs, load
from .evaluation_page import render
from .made import made_by
from .measures import STEPS, Spectrum, ascend, confidences, local_lipschitz, margins, robust_and_stable, spectrum
from .ranks import check_usable
from .run import AT_ONCE, folded_norms_of, is_right, norms_of
from .training import network, read

ATTACKS = {"standard": STANDARD, "released": RELEASED, "pgd": ("pgd",)}
RANKS = 201  # of a layer's singular values, evenly from the largest to the smallest, that are kept

Tell = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="of python -m train run, table2 or figure2")
    parser.add_argument("--data", type=Path, metavar="DIR", help="of the data set that it was trained on")
    parser.add_argument("--eps", type=radius, help="such as 8/255 or 0.031 (default: the checkpoint's)")
    parser.add_argument("--images", type=int, help="the first so many test images (default: the checkpoint's)")
    parser.add_argument("--attacks", choices=tuple(ATTACKS), help="(default: the checkpoint's)")
    parser.add_argument("--iterations", type=int, help="of AutoAttack (default: 100, or the checkpoint's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: beside the checkpoint)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def radius(text: str) -> float:
    """
    >>> radius("8/255"), radius("0.031")
    (0.03137254901960784, 0.031)
    """
    try:
        eps = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        eps = 0.0
    if not 0 < eps <= 1:
        raise argparse.ArgumentTypeError(f"eps {text!r} must be a number such as 8/255, above 0 and at most 1")
    return eps


def main(options: argparse.Namespace) -> int:
    check_usable(options.device)
    protocol = rows.from_json(read(options.checkpoint)["protocol"])
    out = options.out or options.checkpoint.with_suffix(".evaluation")
    named = options.attacks is not None
    if options.attacks == "pgd" and options.iterations is not None:
        raise ValueError(f"--iterations is of AutoAttack, and --attacks pgd always takes {STEPS}")
    iterations = given(options.iterations, 100 if named else protocol.attack_iterations)
    evaluate(
        options.checkpoint,
        load(protocol.dataset, directory_of(options.data)),
        eps=given(options.eps, protocol.eps),
        images=given(options.images, protocol.attacked_images),
        attacks=ATTACKS[options.attacks] if named else protocol.attacks,
        iterations=iterations,
        out=out,
        device=torch.device(options.device),
        tell=lambda stage: print(stage, file=sys.stderr, flush=True),
    )
    print(out / "evaluation.md")
    return 0


def given(option: Any, otherwise: Any) -> Any:
    return otherwise if option is None else option


def evaluate(
    checkpoint: Path,
    data: Data,
    *,
    eps: float,
    images: int,
    attacks: Sequence[str],
    iterations: int = 100,
    out: Path,
    device: torch.device,
    tell: Tell = lambda stage: None,
) -> dict[str, Any]:
    """Writes ``out/evaluation.md`` with its figures, and then ``out/evaluation.json``, which holds all that they show.

    Accuracy is that of all test images, everything else of the first ``images``. ``attacks`` are AutoAttack's, or
    ``("pgd",)``. A killed evaluation goes on within the attacks.
    """
    begin = time.perf_counter()
    saved = read(checkpoint)  # once: a training that still runs soon puts another one in its place
    model, cell, protocol = network(saved, device)
    test = data.test.to(device)
    first = test.first(images)
    x, y = inputs(first.pixels), first.labels
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)
    states = {True: out / "robust.attack", False: out / "stable.attack"}

    def withstands(x: Tensor, labels: Tensor) -> Tensor:
        if tuple(attacks) == ATTACKS["pgd"]:
            attacked = near(x, labels)
            return (logits_of(model, x).argmax(1) == labels) & (logits_of(model, attacked).argmax(1) == labels)
        sizes = {"eps": eps, "iterations": iterations, "batch": AT_ONCE, "seed": 0}
        return autoattack(model, x, labels, attacks=attacks, state=states[labels is y], **sizes)

    def near(x: Tensor, labels: Tensor) -> Tensor:
        """Images of a large loss."""
        return torch.cat(
            [
                ascend(model, part, partial(F.cross_entropy, target=target), eps=eps, generator=generator)
                for part, target in zip(x.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
            ]
        )

    tell(f"accuracy on {len(test):,} images")
    clean, _ = is_right(model, test)
    logits = logits_of(model, x)
    if not logits.isfinite().all():
        raise ValueError(f"checkpoint {str(checkpoint)!r} gives logits that are not finite")
    tell(f"{', '.join(attacks)} on {images:,} images, eps {255 * eps:.3g}/255")
    robust, stable = robust_and_stable(withstands, x, y, logits.argmax(1))
    tell("margins, confidences, local Lipschitz constant")
    attacked = logits_of(model, near(x, y))
    lipschitz = torch.cat([local_lipschitz(model, part, eps=eps, generator=generator) for part in x.split(AT_ONCE)])
    uses = observe(model, x[:1].shape)
    tell(f"norms and singular values of {len(uses)} layers")
    found: dict[str, Any] = {
        "cell": asdict(cell),
        "protocol": rows.as_json(protocol),
        "epochs": len(saved["history"]),  # fewer than the protocol's of one that runs, was killed or diverged
        "eps": eps,
        "attacks": list(attacks),
        "iterations": STEPS if tuple(attacks) == ATTACKS["pgd"] else iterations,
        "all": counted(clean),
        "right": counted(clean[:images]),
        "stable": counted(stable),
        "robust": counted(robust),
        "local_lipschitz": rounded(lipschitz),
        "margin": {"clean": rounded(margins(logits, y)), "attacked": rounded(margins(attacked, y))},
        "confidence": {"clean": rounded(confidences(logits)), "attacked": rounded(confidences(attacked))},
        "layers": [use.name for use in uses],
        "norms": norms_of(uses, protocol.l2_rtol),
        "folded": folded_norms_of(model, data, protocol.l2_rtol),
        "spectra": [summary(spectrum(use)) for use in uses],
        "seconds": round(time.perf_counter() - begin, 1),
        "made": made_by(device),
    }
    render(found, out)
    with rows.replacing(out / "evaluation.json") as new:  # last: who finds it takes the page for done
        new.write_text(json.dumps(found) + "\n")
    for state in states.values():
        state.unlink(missing_ok=True)
    return found


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(AT_ONCE)])


def summary(spectrum: Spectrum) -> dict[str, Any]:
    """Its mean and deviation, and as many values as draw it: there can be tens of thousands."""
    values = spectrum.values.double().cpu()
    if not len(values):
        return {"values": 0}
    ranks = torch.linspace(0, len(values) - 1, RANKS).round().long()
    return {
        "values": len(values),
        "circular": spectrum.circular,
        "mean": values.mean().item(),
        "deviation": values.std(correction=0).item(),
        "ranks": rounded(values[ranks]),
    }


def counted(flags: Tensor) -> dict[str, Any]:
    return rows.counted(flags.cpu().numpy())


def rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
