"""A network on its way: epoch by epoch, from checkpoint to checkpoint.

All random numbers of an epoch are drawn from (seed, epoch), so that a training which was killed goes on from its last
checkpoint bit for bit as if it had not been. Under ``torchrun`` every process takes its share of each batch.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import convnorm
from convnorm.uses import observe

from . import ranks, rows
from .cell import Cell, Protocol
from .data import Data, epoch
from .methods import Objective, Regulariser, attacked
from .models import PAPER

FALLS = (74, 89, 99)  # of 120 epochs: from epochs 75, 90 and 100 on the learning rate is a tenth of what it was
TELL_EVERY = 0.5  # seconds

Tell = Callable[[dict[str, Any]], None]


class Diverged(ArithmeticError):
    """The loss of this step of this epoch was not finite, or after the epoch's last step the network was not."""

    def __init__(self, epoch: int, step: int, seconds: float) -> None:
        super().__init__(f"diverged in epoch {epoch}, step {step}")
        self.when, self.seconds = {"epoch": epoch, "step": step}, round(seconds, 2)


class Training:
    """A network on its way, and what it takes to go on from where it is."""

    def __init__(self, cell: Cell, protocol: Protocol, data: Data, device: torch.device) -> None:
        self.cell, self.protocol, self.data, self.device = cell, protocol, data, device
        without_tf32()
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
            torch.compiler.reset()  # PyTorch stops compiling after a few kinds of cell in one process
            mode = "reduce-overhead" if device.type == "cuda" else "default"  # CUDA graphs
            self.objective, self.under_attack = (
                torch.compile(module, mode=mode) for module in (self.objective, self.under_attack)
            )

    @property
    def done(self) -> int:
        """Epochs."""
        return len(self.history)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.protocol.training_images // self.protocol.batch

    def one_epoch(self, tell: Tell, recorder: convnorm.Recorder | None = None) -> dict[str, float]:
        protocol, steps, begin, told = self.protocol, self.steps, time.perf_counter(), 0.0
        seed = 1_000_003 * self.cell.seed + self.done
        generator = torch.Generator(self.device).manual_seed(seed)
        loss_sum, right, count, finite = (torch.zeros((), device=self.device) for _ in range(4))
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
            if recorder:
                recorder.step()

            loss_sum += loss.detach() * len(labels)
            right += (logits.detach().argmax(1) == labels).sum()
            count += len(labels)
            finite += loss_sum.isfinite()  # steps: once it is not, it stays so
            if time.perf_counter() - told > TELL_EVERY:
                told = time.perf_counter()
                tell(self._news(step / steps, loss_sum / count, right / count))
        loss_sum, right, count = ranks.summed(torch.stack([loss_sum, right, count])).tolist()
        finite = int(ranks.least(finite))
        seconds = time.perf_counter() - begin
        if finite < steps or not self.is_finite():
            raise Diverged(self.done + 1, min(finite + 1, steps), seconds)
        return {
            "epoch": self.done + 1,
            "learning_rate": rate,
            "loss": round(loss_sum / count, 5),
            "training_accuracy": round(right / count, 5),
            "seconds": round(seconds, 2),
        }

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Weights, running statistics, and norms, which float32 may not hold."""
        both = [convnorm.norms(use.layer) for use in self.uses]
        state = [tensor for tensor in self.network.state_dict().values() if tensor.is_floating_point()]
        checked = (*state, *(norms.l1 for norms in both), *(norms.linf for norms in both))
        return bool(torch.stack([tensor.isfinite().all() for tensor in checked]).all())

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
        whole = io.BytesIO()
        torch.save(state, whole)
        with rows.replacing(file) as new:
            new.write_bytes(whole.getbuffer())  # where the disk is full this says so, and torch.save does not

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


def without_tf32() -> None:
    """Float32 is the reference, in training, attacks and evaluation; cuDNN's convolutions would not keep to it."""
    torch.backends.cudnn.allow_tf32 = False


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


def network(state: dict[str, Any], device: torch.device | str = "cpu") -> tuple[nn.Module, Cell, Protocol]:
    """Of what ``read`` found: in evaluation mode, and what it is."""
    without_tf32()
    protocol = rows.from_json(state["protocol"])
    cell = Cell(**state["cell"])
    model = PAPER[cell.model](state["classes"], protocol.width)
    model.load_state_dict(state["model"])
    return model.to(device, memory_format=torch.channels_last).eval(), cell, protocol
