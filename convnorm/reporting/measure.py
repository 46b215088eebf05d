"""The norms of layers: l1 and linf of all in one pass, l2 of several layers at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace

import torch

from .. import library
from ..geometry import GeometryError
from ..layers import Layer
from ..norms import norms, scaled
from ..spectral.bounds import frobenius
from ..spectral.bracket import l2 as bracket
from ..spectral.outward import EPS
from ..spectral.reshaped import reshaped_estimate
from ..uses import naming
from .calls import Found
from .row import Measured, Row, row_of

Progress = Callable[[int, int, str], None]


@torch.no_grad()
def measure(
    found: Sequence[Found], *, l2: bool, rtol: float, batch_norm: bool, progress: Progress | None = None
) -> list[Row]:
    """A row for each layer. ``progress(done, total, name)`` is called after each of the l2 norms."""
    for one in found:
        if one.layer.weight.is_meta:
            raise GeometryError(f"convnorm: weight of layer {one.name!r} on device meta has no values to measure")
    plain = [Measured(*pair) for pair in all_norms([one.layer for one in found])]
    folded = [folded_norms(one) if batch_norm and one.batch_norm else None for one in found]
    reshaped: list[float | None] = [None] * len(found)
    if l2:
        alike = [i for i, one in enumerate(folded) if one and scales_alike(found[i])]
        tasks = [(i, False) for i in range(len(found))]
        tasks += [(i, True) for i, one in enumerate(folded) if one and i not in alike]

        def work(task: tuple[int, bool]) -> Measured:
            i, with_batch_norm = task
            with torch.no_grad(), naming(found[i].name):
                if with_batch_norm:
                    return with_folded_l2(folded[i], found[i], rtol)
                reshaped[i] = reshaped_norm(found[i].layer)
                return with_l2(plain[i], found[i].layer, rtol)

        for done, (task, measured) in enumerate(in_parallel(work, tasks, found), 1):
            i, with_batch_norm = task
            (folded if with_batch_norm else plain)[i] = measured
            if progress:
                progress(done, len(tasks), found[i].name)
        for i in alike:
            folded[i] = multiplied(folded[i], plain[i], found[i])
    return [row_of(*of_one) for of_one in zip(found, plain, reshaped, folded, strict=True)]


def all_norms(layers: Sequence[Layer]) -> list[tuple[float, float]]:
    """(l1, linf) of each, those of one device and precision in one pass."""
    batches: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, layer in enumerate(layers):
        batches.setdefault((layer.weight.device, layer.weight.dtype), []).append(i)
    found = {}
    for members in batches.values():
        own = [layers[i] for i in members]
        l1s, linfs, _ = library.read([layer.weight for layer in own], "".join(layer.plan.text for layer in own))
        found |= zip(members, zip(l1s.tolist(), linfs.tolist(), strict=True), strict=True)
    return [found[i] for i in range(len(layers))]


def folded_norms(found: Found) -> Measured:
    both = norms(found.layer, scale=scale_of(found))
    return Measured(both.l1.item(), both.linf.item())


def scale_of(found: Found) -> torch.Tensor:
    return found.batch_norm.scale.to(found.layer.weight.device)


def reshaped_norm(layer: Layer) -> float | None:
    return reshaped_estimate(layer).item() if layer.weight.isfinite().all() else None


def with_l2(measured: Measured, layer: Layer, rtol: float) -> Measured:
    if not layer.weight.isfinite().all():
        return replace(measured, l2_stopped="the weight holds NaN or inf")
    found = bracket(layer, rtol=rtol)
    lower, upper = found.lower.item(), found.upper.item()
    return replace(measured, l2_lower=lower, l2_upper=upper, l2_certificate=found.certificate, l2_stopped=found.stopped)


def with_folded_l2(measured: Measured, found: Found, rtol: float) -> Measured:
    """Of the rounded product of weight and scale, then of what it stands for: each entry is off by four roundings."""
    if not found.batch_norm.scale.isfinite().all():
        return replace(measured, l2_stopped="the batch norm holds NaN or inf")
    product = scaled(found.layer, scale_of(found))
    measured = with_l2(measured, product, rtol)
    if measured.l2_upper is None:
        return measured
    # padding may add entries that cancel, their errors do not; the last term is for what is too small for float64
    error = 4 * EPS * frobenius(replace(product, weight=product.weight.abs())).item()
    error += 1e-300 if measured.l2_upper else 0.0
    lower = math.nextafter(max(measured.l2_lower - error, 0.0), 0.0)
    return replace(measured, l2_lower=lower, l2_upper=math.nextafter(measured.l2_upper + error, math.inf))


def scales_alike(found: Found) -> bool:
    """Whether the batch norm multiplies all channels by one number, as before training: so it does the norm."""
    scale = found.batch_norm.scale.abs()
    return bool(scale.isfinite().all() and (scale == scale[0]).all())


def multiplied(folded: Measured, plain: Measured, found: Found) -> Measured:
    if plain.l2_upper is None:
        return replace(folded, l2_stopped=plain.l2_stopped)
    factor = found.batch_norm.scale[0].abs().item()
    least = 1e-300 if plain.l2_upper and factor else 0.0
    lower = max(plain.l2_lower * factor * (1 - 8 * EPS) - least, 0.0)
    upper = plain.l2_upper * factor * (1 + 8 * EPS) + least
    return replace(
        folded, l2_lower=lower, l2_upper=upper, l2_certificate=plain.l2_certificate, l2_stopped=plain.l2_stopped
    )


def in_parallel(
    work: Callable[[tuple[int, bool]], Measured], tasks: Sequence[tuple[int, bool]], found: Sequence[Found]
) -> Iterator[tuple[tuple[int, bool], Measured]]:
    """The results as they come. Layers beside each other make better use of a CPU's cores than any one of them."""
    threads = torch.get_num_threads() if all(one.layer.weight.is_cpu for one in found) else 1
    if threads == 1:
        yield from ((task, work(task)) for task in tasks)
        return
    largest_first = sorted(tasks, key=lambda task: -found[task[0]].layer.weight.numel())
    with single_threaded(), ThreadPoolExecutor(threads) as pool:
        running = {pool.submit(work, task): task for task in largest_first}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            for future in running:
                future.cancel()


@contextmanager
def single_threaded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
