"""``pytest --benchmark`` runs ``benchmarks/`` in place of the tests; a plain ``pytest`` never does."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).with_name("benchmarks")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("convnorm")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks and write benchmarks/results/")
    group.addoption("--quick", action="store_true", help="with --benchmark: a few short ones, and nothing is written")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    if config.option.benchmark:
        config.option.benchmark_quiet = True  # benchmarks/conftest.py prints a table of ratios in place of its own
        if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
            config.args[:] = [str(BENCHMARKS)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    unasked = collection_path == BENCHMARKS and not config.option.benchmark
    myself = collection_path == Path(__file__)  # no doctests, and tests/ has a module of the same name
    return True if unasked or myself else None
