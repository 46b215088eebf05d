"""The norms of a model's layers while it trains, to a CSV file or to TensorBoard.

A step measures all layers in one read of the weights and waits for nothing: on a GPU its results stay there, and are
brought over together, every ``flush_every`` steps and at the end.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from . import library
from .batch import plan_of
from .layers import current_weight
from .reporting.optional import optional
from .sharded import refuse_sharded
from .uses import Held, inputs_of, labels_of, observe, unwrapped

WHOLE = "a recorder takes whole weights; norm decay, also with beta=0, has the norms of sharded ones"
Values = list[list[float]]  # l1, linf of each layer


class Recorder:
    """Writes l1 and linf of every layer and step.

    >>> import tempfile, pathlib
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name, "norms.csv")
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10))
    >>> with Recorder(model, [1, 3, 8, 8], path) as recorder:
    ...     for _ in range(2):  # ... forward, backward, optimizer.step()
    ...         recorder.step()
    >>> print(path.read_text().splitlines()[0])
    step,l1/0,linf/0,l1/2,linf/2
    >>> folder.cleanup()

    ``example`` is an input or its shape, or a tuple of them. A ``path`` that ends in ``.csv`` is a table with a line
    for each step, any other a folder for TensorBoard. ``every`` measures in every so many steps.

    ``start`` is the number of the first step, for a training that resumes from a checkpoint: what the file has of that
    and later steps is dropped. Without it a table is continued after its last step. Close the recorder, or use it as a
    context manager: what was measured is written then, also if training ends in an exception.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor | Sequence[Any],
        path: str | Path,
        *,
        every: int = 1,
        flush_every: int = 100,
        start: int | None = None,
    ) -> None:
        for name, value in (("every", every), ("flush_every", flush_every)):
            if value < 1:
                raise ValueError(f"convnorm: {name} {value} must be at least 1")
        refuse_sharded(model, WHOLE)
        model = unwrapped(model)
        self._uses = observe(model, *inputs_of(example))
        self._model, self._held = model, Held(model, self._uses)
        if not self._uses:
            raise ValueError(f"convnorm: model {type(model).__name__} uses no convolutional or fully connected layer")
        labels = labels_of(
            self._uses,
            lambda use: f"@{'x'.join(map(str, use.in_shape))}",
            lambda use: f"-{'x'.join(map(str, use.out_shape))}",
        )
        self._bind()
        self._every, self._flush_every = every, flush_every
        self._pending: list[tuple[int, list[Tensor]]] = []
        self._batches: dict[tuple, list[int]] = {}
        self._file = (Table if Path(path).suffix == ".csv" else Events)(Path(path), labels, start)
        self._next = self._file.first

    def _weights(self) -> list[Tensor | None]:
        return [use.module._parameters.get("weight") for use in self._uses]

    @torch.no_grad()
    def _bind(self) -> None:
        self._known = self._weights()
        self._plans = [plan_of(use).text for use in self._uses]

    def step(self) -> None:
        """Measure the weights as they are now. After ``optimizer.step()``."""
        number, self._next = self._next, self._next + 1
        if number % self._every:
            return
        if any(now is not then for now, then in zip(self._weights(), self._known, strict=True)):  # replaced, or sharded
            refuse_sharded(self._model, WHOLE)
            self._bind()
        self._held.warn_of_gone("Recorder")
        values = self._measure()  # may flush what is pending
        self._pending.append((number, values))
        if len(self._pending) == self._flush_every:
            self.flush()

    @torch.no_grad()
    def _measure(self) -> list[Tensor]:
        """[2, layers] on each device, by the order of ``_members``."""
        weights = [current_weight(use.module) for use in self._uses]
        batches: dict[tuple, list[int]] = {}
        for i, weight in enumerate(weights):
            batches.setdefault((weight.device, weight.dtype), []).append(i)
        if batches != self._batches:  # the model was moved or cast: what is pending lies elsewhere
            self.flush()
        self._batches = batches
        self._members = [i for own in batches.values() for i in own]
        found = []
        for own in batches.values():
            l1s, linfs, _ = library.read([weights[i] for i in own], "".join(self._plans[i] for i in own))
            found.append(torch.stack([l1s, linfs]))
        return found

    def flush(self) -> None:
        """Bring over what was measured, which waits for it, and write it."""
        pending, self._pending = self._pending, []
        if pending:
            steps = [number for number, _ in pending]
            batches = zip(*(tensors for _, tensors in pending), strict=True)
            together = torch.cat([torch.stack(own).double().cpu() for own in batches], 2)  # [steps, 2, layers]
            order = torch.tensor(self._members, device="cpu").argsort()  # also where the default device is another
            self._file.write(steps, together[:, :, order].mT.tolist())

    def close(self) -> None:
        """Write what is left, and close the file."""
        self.flush()
        self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Table:
    """A CSV file: a line for each step, two columns for each layer."""

    def __init__(self, path: Path, labels: Sequence[str], start: int | None) -> None:
        heads = ["step", *(f"{norm}/{label}" for label in labels for norm in ("l1", "linf"))]
        self.first = start or 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and next(csv.reader([lines[0].decode()])) != heads:
            raise ValueError(f"convnorm: path {str(path)!r} has other columns than those of the model's layers")
        kept = lines[:1]
        for line in lines[1:]:
            if not line.endswith(b"\n"):  # cut off
                break
            step = int(line.partition(b",")[0])
            if start is not None and step >= start:  # to be done again
                break
            kept.append(line)
            self.first = step + 1 if start is None else start
        self._stream = path.open("r+" if lines else "w", newline="", encoding="utf-8")
        self._stream.truncate(sum(map(len, kept)))
        self._stream.seek(0, 2)
        self._writer = csv.writer(self._stream, lineterminator="\n")
        if not lines:
            self._writer.writerow(heads)
            self._stream.flush()

    def write(self, steps: Sequence[int], values: Sequence[Values]) -> None:
        for step, layers in zip(steps, values, strict=True):
            self._writer.writerow([step, *(norm for layer in layers for norm in layer)])
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class Events:
    """TensorBoard's files: the scalars l1/layer and linf/layer."""

    def __init__(self, path: Path, labels: Sequence[str], start: int | None) -> None:
        self.first = start or 0
        self._labels = labels
        self._writer = optional("tensorboard", "torch.utils.tensorboard").SummaryWriter(str(path), purge_step=start)

    def write(self, steps: Sequence[int], values: Sequence[Values]) -> None:
        for step, layers in zip(steps, values, strict=True):
            for label, (l1, linf) in zip(self._labels, layers, strict=True):
                self._writer.add_scalar(f"l1/{label}", l1, step)
                self._writer.add_scalar(f"linf/{label}", linf, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
