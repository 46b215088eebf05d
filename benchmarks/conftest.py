"""Collects the rows that the benchmarks measure, prints them, and writes those of a whole run to results/."""

from __future__ import annotations

import shlex

import pytest

from .record import Row, table, write

ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """The rows of this run, to append to."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("norms, norm decay and projections against a bare read of the weights")
    terminalreporter.write_line(table(rows))
    ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    selected = terminalreporter.stats.get("deselected") or config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    if ended and not selected and not config.option.quick:
        failed = [report.nodeid for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, [])]
        command = shlex.join(["pytest", *map(str, config.invocation_params.args)])
        path = write(rows, failed, command)
        terminalreporter.write_line(f"Written to {path.relative_to(config.rootpath)} and {path.stem}.json")
