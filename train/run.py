"""One cell from its first weights to its row: train, checkpoint after every epoch, attack, write.

A killed run goes on from its last checkpoint, and within the attacks. One that diverges has a row that says when, and
no accuracies. Under ``torchrun`` every process takes its share of each batch, and of the images that are attacked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import convnorm
from convnorm.uses import Use

from . import ranks, rows
from .attacks import autoattack
from .cell import Cell, Protocol
from .data import Data, Images, inputs
from .made import made_by
from .training import Diverged, Tell, Training

AT_ONCE = 500  # images in evaluation


def run(
    cell: Cell,
    protocol: Protocol,
    data: Data,
    out: Path,
    device: torch.device,
    tell: Tell = lambda news: None,
    watch: Path | None = None,
) -> rows.Row:
    """Trains what is left to train, evaluates, and writes the row to ``out``.

    ``watch`` receives l1 and linf of every layer after each step, as ``convnorm.Recorder`` writes them.
    """
    if protocol.batch % ranks.world():
        raise ValueError(f"batch {protocol.batch} is not a multiple of the {ranks.world()} processes")
    training_images, test_images = data.training.first(protocol.training_images), data.test.first(protocol.test_images)
    data = replace(data, training=training_images, test=test_images).to(device)
    checkpoint = out / "checkpoints" / f"{cell.name}.pt"
    training = Training(cell, protocol, data, device)
    if ranks.rank() == 0:
        rows.forget_partial(checkpoint)
        rows.forget_partial(rows.path(out, cell))
    if checkpoint.exists():
        training.load(checkpoint)
    row = {"cell": asdict(cell), "protocol": rows.as_json(protocol)}
    try:
        with recording(training, watch) as recorder:
            finish(training, checkpoint, tell, recorder)
    except Diverged as diverged:
        row |= {"diverged": diverged.when}
        seconds = {"training": diverged.seconds}
    else:
        tell({"stage": "attack", "part": 1.0})
        begin = time.perf_counter()
        row |= evaluated(training, checkpoint.with_suffix(f".attack{ranks.rank()}"))
        seconds = {"training": 0.0, "evaluation": round(time.perf_counter() - begin, 2)}
    seconds["training"] = round(sum((news["seconds"] for news in training.history), seconds["training"]), 2)
    row |= {
        "layers": [use.name for use in training.uses],
        "history": training.history,
        "seconds": seconds,
        "made": made_by(device, ranks.world()),
    }
    if ranks.rank() == 0:
        rows.write(out, cell, row)
        for left in checkpoint.parent.glob(f"{cell.name}.attack*"):  # also by ranks of another run, and by kills
            left.unlink()
    return row


def recording(training: Training, watch: Path | None) -> AbstractContextManager[convnorm.Recorder | None]:
    """A recorder that goes on where the training does; ranks have the same weights."""
    if watch is None or ranks.rank() > 0:
        return nullcontext()
    watch.parent.mkdir(parents=True, exist_ok=True)
    shape = [1, *training.data.test.pixels.shape[1:]]
    return convnorm.Recorder(training.network, shape, watch, start=training.done * training.steps)


def finish(training: Training, checkpoint: Path, tell: Tell, recorder: convnorm.Recorder | None) -> None:
    """The epochs that are left, a checkpoint after each."""
    while training.done < training.protocol.epochs:
        news = training.one_epoch(tell, recorder)
        clean, finite = is_right(training.network, training.data.test)
        if not finite:
            raise Diverged(training.done + 1, training.steps, news["seconds"])
        news["test_accuracy"] = round(clean.float().mean().item(), 5)
        training.history.append(news | norms_of(training.uses, training.protocol.l2_rtol))
        if recorder:
            recorder.flush()  # what comes before a checkpoint is not done again
        if ranks.rank() == 0:
            training.save(checkpoint)


def evaluated(training: Training, state: Path) -> rows.Row:
    """What a row says of a trained network; ``state`` is what the attacks go on from after a kill."""
    clean, _ = is_right(training.network, training.data.test)
    robust = is_robust(training.network, training.data.test, training.protocol, state)
    return {
        "clean": rows.counted(clean.cpu().numpy()),
        "robust": rows.counted(robust.cpu().numpy()),
        "norms": {name: training.history[-1][name] for name in ("l1", "linf", "l2")},
        "folded": folded_norms_of(training.network, training.data, training.protocol.l2_rtol),
    }


@torch.no_grad()
def is_right(network: nn.Module, images: Images) -> tuple[Tensor, bool]:
    """Image by image, on all ranks the same; and whether all logits are finite."""
    network.eval()
    mine = images.pixels[ranks.share(len(images))].split(AT_ONCE)
    logits = torch.cat([network(inputs(pixels)) for pixels in mine])
    right = logits.argmax(1) == images.labels[ranks.share(len(images))]
    return ranks.together(right, len(images)), bool(ranks.least(logits.isfinite().all().float()))


def is_robust(network: nn.Module, images: Images, protocol: Protocol, state: Path) -> Tensor:
    """Image by image of the first ones, on all ranks the same: right, and still right under each attack."""
    network.eval()
    count = min(protocol.attacked_images, len(images))
    mine = ranks.share(count)
    robust = autoattack(
        network,
        inputs(images.pixels[mine]),
        images.labels[mine],
        eps=protocol.eps,
        attacks=protocol.attacks,
        iterations=protocol.attack_iterations,
        batch=AT_ONCE,
        seed=0,
        state=state,
    )
    return ranks.together(robust, count)


def norms_of(uses: Sequence[Use], rtol: float) -> dict[str, list]:
    """Of each layer: l1, linf and the bracket of l2."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # where Lanczos begins
        both = [convnorm.norms(use.layer) for use in uses]
        brackets = [convnorm.l2(use.layer, rtol=rtol) for use in uses]
        columns = [[norms.l1 for norms in both], [norms.linf for norms in both]]
        columns += [[bracket.lower for bracket in brackets], [bracket.upper for bracket in brackets]]
        l1, linf, lower, upper = torch.stack([torch.stack(column).double() for column in columns]).tolist()
    exact = [[float(f"{norm:.9g}") for norm in norms] for norms in (l1, linf)]  # what float32 holds
    return {"l1": exact[0], "linf": exact[1], "l2": [list(ends) for ends in zip(lower, upper, strict=True)]}


def folded_norms_of(network: nn.Module, data: Data, rtol: float) -> dict[str, list]:
    """Of each layer and the batch norm that directly follows it, as the network applies both in evaluation."""
    found = [row.whole for row in convnorm.report(network, [1, *data.test.pixels.shape[1:]], rtol=rtol).rows]
    exact = {name: [float(f"{getattr(norms, name):.9g}") for norms in found] for name in ("l1", "linf")}
    return exact | {"l2": [[norms.l2_lower, norms.l2_upper] for norms in found]}
