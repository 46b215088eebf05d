"""What runs, on a terminal: a bar for each cell in work, with its loss, accuracy, norms and time left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .cell import Cell
from .engines import news_file
from .rows import Row


class Board:
    def __init__(self, cells: int, quiet: bool = False) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        except ImportError:
            raise ImportError('progress bars need rich: pip install "convnorm[train]"') from None
        self.console = Console(stderr=True, quiet=quiet)
        columns = ["{task.description}", BarColumn(None), "{task.percentage:>3.0f} %"]
        columns += [TimeElapsedColumn(), "left", TimeRemainingColumn(), TextColumn("{task.fields[news]}")]
        self.bars = Progress(*columns, console=self.console, expand=True, disable=not self.console.is_terminal)
        self.all = self.bars.add_task(f"{cells} cells", total=cells, news="") if cells > 1 else None
        self.tasks: dict[str, Any] = {}

    @contextmanager
    def shown(self) -> Iterator[Board]:
        with self.bars:
            yield self

    def tell(self, cell: Cell, news: dict[str, Any]) -> None:
        if cell.name not in self.tasks:
            self.tasks[cell.name] = self.bars.add_task(cell.name, total=1.0, news="")
        stage = {name: value for name, value in news.items() if name not in ("stage", "part")}
        words = [f"{name} {value:.3g}" for name, value in stage.items()] or [news["stage"]]
        self.bars.update(self.tasks[cell.name], completed=news["part"], news=", ".join(words))

    def look(self, out: Path, cells: list[Cell]) -> None:
        """At what the workers wrote."""
        for cell in cells:
            try:
                self.tell(cell, json.loads(news_file(out, cell).read_text()))
            except FileNotFoundError:
                continue

    def ended(self, cell: Cell, result: Row | str) -> None:
        if cell.name in self.tasks:
            self.bars.remove_task(self.tasks.pop(cell.name))
        if self.all is not None:
            self.bars.advance(self.all)
        self.console.print(
            f"{cell.name}: {result if isinstance(result, str) else summary(result)}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def summary(row: Row) -> str:
    seconds = sum(row["seconds"].values())
    if "diverged" in row:
        return f"diverged in epoch {row['diverged']['epoch']}, step {row['diverged']['step']}; {seconds:.0f} s"
    clean, robust, norms = row["clean"], row["robust"], row["norms"]
    (low, high), eps = robust["interval"], row["protocol"]["eps"] * 255
    return (
        f"clean {clean['accuracy']:.1%}, robust {robust['accuracy']:.1%} ({low:.1%} to {high:.1%}) at {eps:.3g}/255, "
        f"largest layer norms l1 {max(norms['l1']):.3g}, linf {max(norms['linf']):.3g}, "
        f"l2 {max(upper for _, upper in norms['l2']):.3g}; {seconds:.0f} s"
    )
