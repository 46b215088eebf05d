"""Collects what the benchmarks measure, prints it, and writes that of a whole run to results/."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from . import table1
from .layers import BEYOND, TABLE1
from .record import Row, machine, table, write

ROWS = pytest.StashKey[list[Row]]()
CELLS = pytest.StashKey[list[table1.Cell]]()
BAR = 30


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """The rows of this run, to append to."""
    return request.config.stash.setdefault(ROWS, [])


@pytest.fixture
def cells(request: pytest.FixtureRequest) -> list[table1.Cell]:
    """The cells of Table 1 of this run, to append to."""
    return request.config.stash.setdefault(CELLS, [])


@pytest.fixture
def progress(request: pytest.FixtureRequest) -> Iterator[Callable[[float, str], None]]:
    """``progress(part of this test, what it does)`` draws a bar, on a terminal."""
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    items = request.session.items

    def draw(part: float, what: str) -> None:
        full = round(BAR * (items.index(request.node) + part) / len(items))
        write(f"[{'#' * full}{'.' * (BAR - full)}] {what}")

    def write(line: str) -> None:
        if reporter.isatty:
            with capture.global_and_fixture_disabled():
                reporter.rewrite(line, erase=True)
                reporter.flush()

    yield draw
    write("")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    failed = [report.nodeid for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, [])]
    command = shlex.join(["pytest", *map(str, config.invocation_params.args)])
    ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not config.option.quick
    writes: list[Callable[[], Path]] = []  # called when all is printed: they may fail
    if rows := config.stash.get(ROWS, []):
        terminalreporter.section("norms, norm decay and projections against a bare read of the weights")
        terminalreporter.write_line(table(rows))
        selected = terminalreporter.stats.get("deselected") or config.getoption("lf", False)
        stopped = 0 < (config.option.maxfail or 0) <= len(failed)  # -x
        if ended and not (selected or stopped) and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
            writes.append(partial(write, rows, failed, command))
    if cells := config.stash.get(CELLS, []):
        paper, beyond = (table1.Table.of_layers(names, cells) for names in (TABLE1, BEYOND))
        terminalreporter.section("Table 1")
        terminalreporter.write_line(table1.text(paper, beyond, machine()))
        if ended and paper.complete and beyond.complete:
            writes.append(partial(table1.write, paper, beyond, machine(), failed, command))
    for written in writes:
        terminalreporter.write_line(f"Written to {written().relative_to(config.rootpath)} and beside it")
