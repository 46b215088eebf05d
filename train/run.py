"""One cell from its first weights to its row: train, checkpoint after every epoch, attack, write.

All random numbers of an epoch are drawn from (seed, epoch), so that a run which was killed goes on from its last
checkpoint bit for bit as if it had not been. Under ``torchrun`` every process takes its share of each batch, and of the
images that are attacked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import convnorm
from convnorm.layers import Use, observe

from . import ranks, rows
from .attacks import autoattack
from .cell import Cell, Protocol
from .data import Data, Images, epoch, inputs
from .made import made_by
from .methods import Objective, Regulariser, attacked
from .models import PAPER

FALLS = (74, 89, 99)  # of 120 epochs: from epochs 75, 90 and 100 on the learning rate is a tenth of what it was
AT_ONCE = 500  # images in evaluation
TELL_EVERY = 0.5  # seconds

Tell = Callable[[dict[str, Any]], None]


class Training:
    """A network on its way, and what it takes to go on from where it is."""

    def __init__(self, cell: Cell, protocol: Protocol, data: Data, device: torch.device) -> None:
        self.cell, self.protocol, self.data, self.device = cell, protocol, data, device
        torch.manual_seed(cell.seed)
        network = PAPER[cell.model](data.classes, protocol.width)
        if ranks.world() > 1 and device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network = network.to(device, memory_format=torch.channels_last)
        # running statistics that ranks have each of their own: only GPUs have a batch norm over all ranks
        own = ranks.world() > 1 and device.type != "cuda"
        self.averaged = [buffer for buffer in network.buffers() if own and buffer.is_floating_point()]
        self.uses = observe(self.network, [1, *data.test.pixels.shape[1:]])
        self.regulariser = Regulariser(self.network, self.uses, cell, protocol)
        self.history: list[dict[str, Any]] = []

        self.objective: nn.Module = Objective(self.network, cell)
        self.under_attack: nn.Module = self.network
        if ranks.world() > 1:
            self.objective = DistributedDataParallel(self.objective, broadcast_buffers=False)
        if protocol.compiled:
            mode = "reduce-overhead" if device.type == "cuda" else "default"  # CUDA graphs
            self.objective, self.under_attack = (
                torch.compile(module, mode=mode) for module in (self.objective, self.under_attack)
            )

    @property
    def done(self) -> int:
        """Epochs."""
        return len(self.history)

    def one_epoch(self, tell: Tell) -> dict[str, float]:
        protocol, begin, told = self.protocol, time.perf_counter(), 0.0
        seed = 1_000_003 * self.cell.seed + self.done
        generator = torch.Generator(self.device).manual_seed(seed)
        steps = protocol.training_images // protocol.batch
        loss_sum, right, count = (torch.zeros((), device=self.device) for _ in range(3))
        self.network.train()
        share = (ranks.rank(), ranks.world())
        batches = epoch(self.data.training, protocol.batch, generator, share=share)  # drawn, on all ranks alike
        generator.manual_seed(seed + 10_007 * (1 + ranks.rank()))  # for where attacks start, on each rank elsewhere
        for step, (x, labels) in enumerate(batches, 1):
            rate = learning_rate(protocol.learning_rate, self.done * steps + step - 1, protocol.epochs * steps)
            for group in self.regulariser.optimizer.param_groups:
                group["lr"] = rate
            with self._precision():
                x_attacked = attacked(self.under_attack, x, labels, self.cell, protocol, generator)
            with self._precision():  # another one: the first has kept weights that were cast without a gradient
                loss, logits = self.objective(x, x_attacked, labels)
            self.regulariser.optimizer.zero_grad()
            loss.backward()
            self.regulariser.step()
            if self.averaged:
                ranks.average(self.averaged)

            loss_sum += loss.detach() * len(labels)
            right += (logits.detach().argmax(1) == labels).sum()
            count += len(labels)
            if time.perf_counter() - told > TELL_EVERY:
                told = time.perf_counter()
                tell(self._news(step / steps, loss_sum / count, right / count))
        loss_sum, right, count = ranks.summed(torch.stack([loss_sum, right, count])).tolist()
        if not loss_sum < float("inf"):
            raise FloatingPointError(
                f"{self.cell.name} diverged in epoch {self.done + 1}: its loss is {loss_sum / count}"
            )
        return {
            "epoch": self.done + 1,
            "learning_rate": rate,
            "loss": round(loss_sum / count, 5),
            "training_accuracy": round(right / count, 5),
            "seconds": round(time.perf_counter() - begin, 2),
        }

    def _precision(self) -> Any:
        narrow = self.protocol.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if narrow else nullcontext()

    def _news(self, part: float, loss: Tensor, accuracy: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            l1 = torch.stack([convnorm.norms(use.layer).l1 for use in self.uses]).median()
        loss, accuracy, l1 = torch.stack([loss, accuracy, l1]).tolist()
        whole = (self.done + part) / self.protocol.epochs
        return {"stage": "training", "part": whole, "loss": loss, "accuracy": accuracy, "median l1": l1}

    def save(self, file: Path) -> None:
        state = {
            "cell": asdict(self.cell),
            "protocol": rows.as_json(self.protocol),
            "classes": self.data.classes,
            "model": self.network.state_dict(),
            "regulariser": self.regulariser.state_dict(),
            "history": self.history,
        }
        with rows.replacing(file) as new:
            torch.save(state, new)

    def load(self, file: Path) -> None:
        state = read(file, self.device)
        rows.check_same(state["protocol"], self.protocol, f"checkpoint {str(file)!r} is")
        if state["cell"] != asdict(self.cell):
            raise ValueError(f"checkpoint {str(file)!r} is of another cell, {state['cell']}")
        self.network.load_state_dict(state["model"])
        self.regulariser.load_state_dict(state["regulariser"])
        self.history = state["history"]


def learning_rate(first: float, done: int, steps: int) -> float:
    """
    >>> [learning_rate(0.1, done, 120) for done in (0, 73, 74, 89, 99)]
    [0.1, 0.1, 0.01, 0.001, 0.0001]
    """
    return first / 10 ** sum(120 * done >= fall * steps for fall in FALLS)


def run(
    cell: Cell, protocol: Protocol, data: Data, out: Path, device: torch.device, tell: Tell = lambda news: None
) -> rows.Row:
    """Trains what is left to train, evaluates, and writes the row to ``out``."""
    torch.backends.cudnn.allow_tf32 = False  # float32 is the reference
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
    while training.done < protocol.epochs:
        news = training.one_epoch(tell)
        clean = is_right(training.network, data.test)
        news["test_accuracy"] = round(clean.float().mean().item(), 5)
        training.history.append(news | norms_of(training.uses, protocol.l2_rtol))
        if ranks.rank() == 0:
            training.save(checkpoint)

    tell({"stage": "attack", "part": 1.0})
    begin = time.perf_counter()
    clean = is_right(training.network, data.test)
    state = checkpoint.with_suffix(f".attack{ranks.rank()}")
    robust = is_robust(training.network, data.test, protocol, state)
    last = training.history[-1]
    row = {
        "cell": asdict(cell),
        "protocol": rows.as_json(protocol),
        "clean": rows.counted(clean.cpu().numpy()),
        "robust": rows.counted(robust.cpu().numpy()),
        "layers": [use.name for use in training.uses],
        "norms": {name: last[name] for name in ("l1", "linf", "l2")},
        "history": training.history,
        "seconds": {
            "training": round(sum(news["seconds"] for news in training.history), 2),
            "evaluation": round(time.perf_counter() - begin, 2),
        },
        "made": made_by(device, ranks.world()),
    }
    if ranks.rank() == 0:
        rows.write(out, cell, row)
        for left in checkpoint.parent.glob(f"{cell.name}.attack*"):  # also by ranks of another run, and by kills
            left.unlink()
    return row


@torch.no_grad()
def is_right(network: nn.Module, images: Images) -> Tensor:
    """Image by image, on all ranks the same."""
    network.eval()
    mine = images.pixels[ranks.share(len(images))].split(AT_ONCE)
    guesses = torch.cat([network(inputs(pixels)).argmax(1) for pixels in mine])
    return ranks.together(guesses == images.labels[ranks.share(len(images))], len(images))


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


def read(checkpoint: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    try:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        whole = state.keys() >= {"cell", "protocol", "classes", "model"}
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint {str(checkpoint)!r} is not there") from None
    except Exception:  # of many types, and pages long
        whole = False
    if not whole:
        raise ValueError(f"checkpoint {str(checkpoint)!r} is damaged, or not one of python -m train run")
    return state


def network(checkpoint: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, Cell, Protocol]:
    """In evaluation mode, and what it is."""
    state = read(checkpoint, device)
    protocol = Protocol(**state["protocol"] | {"attacks": tuple(state["protocol"]["attacks"])})
    cell = Cell(**state["cell"])
    model = PAPER[cell.model](state["classes"], protocol.width)
    model.load_state_dict(state["model"])
    return model.to(device, memory_format=torch.channels_last).eval(), cell, protocol
