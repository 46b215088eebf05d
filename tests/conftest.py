"""What every test shares: the backends that can serve here, the seed of the random cases and how many there are."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run on the CPU, slowly
    os.environ.setdefault("TRITON_INTERPRET", "1")

import convnorm
from convnorm.backends import why_not

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
SERVERS = [(backend, device) for device in DEVICES for backend in ("reference", "native", "triton")]
CASES = 5000


def pytest_addoption(parser):
    group = parser.getgroup("convnorm")
    group.addoption("--long", type=int, metavar="N", help=f"random cases for each backend, instead of {CASES}")
    group.addoption("--seed", type=int, help="seed of the random cases: 0, or a new one for each --long run")


def pytest_configure(config):
    if config.option.seed is None:
        config.option.seed = 0 if config.option.long is None else int(np.random.SeedSequence().entropy % 2**32)


def pytest_report_header(config):
    served = {device: [name for name in ("reference", "native", "triton") if not why_not(name, device)]
              for device in DEVICES}  # fmt: skip
    return f"convnorm: --seed {config.option.seed}, {config.option.long or CASES} random cases, backends {served}"


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line(f"convnorm: the random cases were those of --seed {config.option.seed}")  # also with -q


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The matrices are small: threads would only wait for each other. ``test_threads`` takes as many as it needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SERVERS, ids=lambda server: "-".join(server))
def server(request):
    """A backend and a device that it serves, in use for the duration of the test."""
    backend, device = request.param
    if reason := why_not(backend, device):
        if (backend, device) == ("native", "cpu") and os.environ.get("CONVNORM_REQUIRE_NATIVE") == "1":
            pytest.fail(f"CONVNORM_REQUIRE_NATIVE=1, but {reason}")
        pytest.skip(reason)
    with convnorm.use_backend(backend):
        yield backend, device


@pytest.fixture
def backend(server):
    return server[0]


@pytest.fixture
def device(server):
    return server[1]


@pytest.fixture
def at_full_speed(server):
    """For tests of so much arithmetic that nobody waits for Triton to interpret it."""
    if server == ("triton", "cpu"):
        pytest.skip("Triton's interpreter takes too long")


@pytest.fixture
def seed(request):
    return request.config.option.seed


@pytest.fixture
def numbers(request, server):
    """The numbers of the random cases that this backend is put through: fewer where Triton only interprets."""
    count = request.config.option.long or CASES
    return range(count // 100 if server == ("triton", "cpu") else count)
