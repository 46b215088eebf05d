"""Attacks on images from 0 to 1, within a ball of radius ``eps`` in the largest-difference norm: PGD and AutoAttack."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")  # AutoAttack as published
RELEASED = ("apgd-ce", "apgd-t")  # what the paper's authors ran of it

ROUNDING = 2**-22  # x + eps and its difference to x, in float32, are each off by up to 2**-25 for x up to 1


def pgd(
    model: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    eps: float,
    step: float,
    steps: int,
    noise: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Images near ``x`` whose ``loss(logits)``, a scalar, is large: projected gradient ascent (Madry et al., 2018).

    It starts from ``x + noise N(0, 1)``, as TRADES' code does without projecting it, and takes ``steps`` of ``step``
    along the sign of the gradient, after each back to the ball and to [0, 1]. ``generator`` is on the device of ``x``.
    The model stays in its mode, and its parameters' gradients as they are.
    """
    x = x.detach()
    lower, upper = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    point = x + noise * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    with _frozen(model), torch.enable_grad():
        for _ in range(steps):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(model(point)), point)
            point = (point.detach() + step * gradient.sign()).clamp(lower, upper)
    return point.clamp(lower, upper)  # which only 0 steps need


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    attacks: Sequence[str],
    iterations: int = 100,
    batch: int,
    seed: int,
    state: Path | None = None,
) -> Tensor:
    """``[n]`` booleans: the model, in eval mode, is right about the image and no attack makes it wrong within ``eps``.

    ``attacks``, of ``STANDARD``, come one after another, each to what the others left (Croce & Hein, 2020), from
    pyautoattack. ``iterations`` is 100 as published; with fewer, APGD and FAB take fewer steps, and Square 50 queries
    for each. The images that an attack returns are checked and evaluated anew; those that lie nowhere (NaN, where
    a gradient is) count as none.

    The result depends on the arguments only, and on how the device rounds; the global random state stays as it is.
    ``state`` names a file that keeps what is done after every batch: a killed evaluation goes on from there, with the
    same result. A file that is damaged, or of another evaluation, is replaced.
    """
    if not len(x):  # the share of one of more processes than there are images
        return torch.empty(0, dtype=torch.bool, device=x.device)
    if unknown := [name for name in attacks if name not in STANDARD]:
        raise ValueError(f"attacks {', '.join(unknown)!r} must be of {', '.join(STANDARD)}")
    if not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"x has values from {x.min():g} to {x.max():g}, and must be from 0 to 1")
    if iterations < 1:
        raise ValueError(f"iterations {iterations} must be at least 1")
    x = x.contiguous()  # pyautoattack views the gradient, which has the layout of x, as rows
    key = _key(model, x, y, eps, list(attacks), iterations, batch, seed) if state else ""
    with torch.no_grad(), _frozen(model):
        clean, classes = _right(model, x, y, batch)
        finished, entered, done, robust = _read(state, key, clean) or (0, clean, 0, clean.clone())
        for number in range(finished, len(attacks)):
            attack = _attack(attacks[number], model, eps, iterations, classes, seed)
            candidates = entered.nonzero().squeeze(1)
            for start in range(done, len(candidates), batch):
                images = candidates[start : start + batch]
                with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):  # the attacks seed it
                    found = attack.perturb(x[images], y[images])
                _check(found, x[images], eps, attacks[number])
                nowhere = found.isnan().flatten(1).any(1)
                robust[images] = _right(model, found, y[images], batch)[0] | nowhere
                if state:
                    _write(state, key, number, entered, start + batch, robust)
            entered, done = robust.clone(), 0
    return robust


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within, gradients are those of the input only: FAB's ``backward()`` would add to the parameters' ``.grad``, and a
    compiled model would compute what ``torch.autograd.grad`` leaves out.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _right(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> tuple[Tensor, int]:
    """Of which images the model says the label, and the number of its classes. A logit that is NaN says nothing."""
    logits = torch.cat([model(part) for part in x.split(batch)])
    return (logits.argmax(1) == y) & logits.isfinite().all(1), logits.shape[1]


def _attack(name: str, model: nn.Module, eps: float, iterations: int, classes: int, seed: int) -> Any:
    """As pyautoattack's ``version="standard"`` sets it up; its AutoAttack class has no say on the iterations."""
    try:
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.fab_pt import FABAttack_PT
        from pyautoattack.square import SquareAttack
    except ImportError as error:
        raise ImportError('AutoAttack needs pyautoattack: pip install "convnorm[train]"') from error
    silent = logging.Logger("attacks", logging.CRITICAL)  # of points without a gradient, batch by batch
    targets = min(9, classes - 1)
    if name == "apgd-ce":
        return APGDAttack(model, n_iter=iterations, eps=eps, seed=seed, logger=silent)
    if name == "apgd-t":
        if classes < 4:  # the loss divides by the difference of the first logit and the third and fourth
            raise ValueError(f"attack 'apgd-t' needs at least 4 classes, and the model has {classes}")
        return APGDAttack_targeted(
            model, n_iter=iterations, eps=eps, seed=seed, n_target_classes=targets, logger=silent
        )
    if name == "fab-t":
        return FABAttack_PT(model, n_iter=iterations, eps=eps, seed=seed, targeted=True, n_target_classes=targets)
    return SquareAttack(model, n_queries=50 * iterations, eps=eps, seed=seed, resc_schedule=False)


def _check(found: Tensor, x: Tensor, eps: float, name: str) -> None:
    """pyautoattack keeps to its bounds, or this says where it did not."""
    far = (found - x).abs().nan_to_num().max().item()
    low, high = found.nan_to_num(0.5).min().item(), found.nan_to_num(0.5).max().item()
    if far > eps + ROUNDING or low < 0 or high > 1:
        raise RuntimeError(f"{name} went {far:g} far, where eps is {eps:g}, with values from {low:g} to {high:g}")


def _key(model: nn.Module, x: Tensor, y: Tensor, *settings: Any) -> str:
    """What an evaluation is of, so that no other goes on from its file."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for tensor in (x, y, *model.state_dict().values()):
        plain = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # also of one element, of any stride
        digest.update(plain.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(state: Path, key: str, finished: int, entered: Tensor, done: int, robust: Tensor) -> None:
    """Under another name first, so that a kill leaves the old file or the new one."""
    flags = ["".join(str(int(flag)) for flag in flags.tolist()) for flags in (entered, robust)]
    partial = state.with_name(f"{state.name}.{os.getpid()}.partial")
    partial.write_text(
        json.dumps({"of": key, "finished": finished, "entered": flags[0], "done": done, "robust": flags[1]})
    )
    partial.replace(state)


def _read(state: Path | None, key: str, clean: Tensor) -> tuple[int, Tensor, int, Tensor] | None:
    """Attacks that are finished, what was robust after them, images that the next has done, what is robust now."""
    if state is None or not state.exists():
        return None
    try:
        saved = json.loads(state.read_text())
        entered, robust = (clean.new_tensor([flag == "1" for flag in saved[name]]) for name in ("entered", "robust"))
        if saved["of"] != key or not len(entered) == len(robust) == len(clean):
            return None
        return int(saved["finished"]), entered, int(saved["done"]), robust
    except (ValueError, KeyError, TypeError):
        return None
