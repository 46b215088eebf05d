"""The promise: ``backends()`` says what serves, a backend asked for by name serves or raises, and one always serves."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import torch
from cases import TABLE
from torch.utils._python_dispatch import TorchDispatchMode

import convnorm
from convnorm import backends, use_backend
from convnorm.backends import BACKENDS, why_not

ops = torch.ops.convnorm
backends_module = sys.modules["convnorm.backends"]  # convnorm.backends is the function
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
AVAILABLE = [(backend, device) for device in DEVICES for backend in BACKENDS if not why_not(backend, device)]


class Calls(TorchDispatchMode):
    """The backends that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        _, _, backend = function.name().partition("convnorm::measure_")
        self.names += [backend] if backend else []
        return function(*args, **kwargs or {})


def server(device="cpu"):
    """The backend that measures a weight on the device."""
    weight = torch.ones(2, 3, 3, device=device)
    with Calls() as calls:
        assert [norm.item() for norm in ops.norms(weight, 1, 1, [8])] == [6, 9]
    (name,) = calls.names
    return name


def test_backends_says_what_serves_and_why_the_others_do_not():
    table = backends()
    assert list(table) == list(DEVICES)
    for device, row in table.items():
        assert list(row) == list(BACKENDS)
        assert [backend for backend, what in row.items() if what == "serves"] == [server(device)]
        for backend, what in row.items():
            assert what == why_not(backend, device) or what in ("serves", "available")


def test_the_fastest_backend_serves_where_none_was_asked_for():
    """Triton's interpreter may be there, but is no backend for a CPU."""
    for device in DEVICES:
        fit = [
            backend for backend in BACKENDS if (backend, device) in AVAILABLE and (backend, device) != ("triton", "cpu")
        ]
        assert server(device) == fit[0]


@pytest.mark.parametrize(("backend", "device"), AVAILABLE)
def test_the_backend_asked_for_serves(backend, device):
    with use_backend(backend):
        assert server(device) == backend
        if why_not(backend, "cpu") is None:
            assert backends()[device][backend] == "serves"


def test_use_backend_ends_with_its_block():
    default = server()
    with use_backend("reference"):
        with use_backend(None):
            assert server() == default
        assert server() == "reference"
    assert server() == default
    with pytest.raises(ArithmeticError), use_backend("reference"):
        raise ArithmeticError
    assert server() == default


def test_use_backend_without_a_block_lasts():
    default = server()
    try:
        use_backend("reference")
        assert server() == server() == "reference"
        with use_backend("reference"):
            pass
        assert server() == "reference"
    finally:
        use_backend(None)
    assert server() == default


@pytest.mark.parametrize("name", ["cuda", "", "Reference", "torch"])
def test_an_unknown_backend_is_refused(name):
    default = server()
    with pytest.raises(ValueError, match=f"convnorm: backend '{name}' must be one of native, triton, reference"):
        use_backend(name)
    assert server() == default


@pytest.fixture
def no_interpreter(monkeypatch):
    """Triton as it is without TRITON_INTERPRET=1: it cannot serve the CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return why_not("triton", "cpu")


def test_a_backend_that_cannot_serve_raises_with_the_reason(no_interpreter):
    assert "triton" in no_interpreter
    assert backends()["cpu"]["triton"] == no_interpreter
    with use_backend("triton"), pytest.raises(RuntimeError) as error:
        ops.norms(torch.ones(2, 3, 3), 1, 1, [8])
    assert str(error.value) == f"convnorm: backend 'triton' cannot serve cpu: {no_interpreter}"


def test_backends_answers_while_a_backend_is_asked_for_that_cannot_serve(no_interpreter):
    """The moment when one wants to know why. On a GPU, Triton serves that device and not the other."""
    with use_backend("triton"):
        table = backends()
    assert table["cpu"]["triton"] == no_interpreter
    assert "serves" not in table["cpu"].values()
    assert all(row["triton"] == "serves" for device, row in table.items() if device == "cuda")


@pytest.mark.parametrize("asked_for", [None, *BACKENDS])
@pytest.mark.usefixtures("no_interpreter")
def test_a_weight_without_values_needs_no_backend(asked_for):
    with use_backend(asked_for):
        norms = ops.norms(torch.ones(2, 3, 3, device="meta"), 1, 1, [8])
    assert [norm.device.type for norm in norms] == ["meta", "meta"]


IN_ANOTHER_PROCESS = """
import json, sys, torch, convnorm
weights, layers = torch.load(sys.argv[1])
norms = [torch.stack(torch.ops.convnorm.norms(w, *args, **options)) for w, (args, options) in zip(weights, layers)]
with torch.no_grad(), convnorm.use_backend("native"):
    try:
        refused = torch.ops.convnorm.norms(weights[0], *layers[0][0]) and None
    except RuntimeError as error:
        refused = str(error)
torch.save(norms, sys.argv[2])
print(json.dumps({"file": convnorm.__file__, "backends": convnorm.backends(), "refused": refused}))
"""


@pytest.mark.parametrize("broken", [False, True], ids=["absent", "broken"])
def test_without_the_extension_everything_else_serves(tmp_path, broken):
    """A copy of the package without the library, or with one that does not load."""
    package = tmp_path / "convnorm"
    copytree(Path(convnorm.__file__).parent, package, ignore=ignore_patterns("*.so", "__pycache__"))
    if broken:
        (package / "_native.abi3.so").write_bytes(b"no library")
    torch.manual_seed(0)
    weights = [torch.randn(case.weight_shape) for case in TABLE.values()]
    torch.save((weights, [(case.args, case.options) for case in TABLE.values()]), tmp_path / "layers")
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, tmp_path / "layers", tmp_path / "norms"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}  # which is no reason to choose it
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert Path(answer["file"]).parent == package
    reason = answer["backends"]["cpu"]["native"]
    assert ("does not load" if broken else "was not built") in reason
    assert answer["backends"]["cpu"]["reference"] == "serves"
    assert answer["refused"] == f"convnorm: backend 'native' cannot serve cpu: {reason}"
    for case, weight, norms in zip(TABLE.values(), weights, torch.load(tmp_path / "norms"), strict=True):
        torch.testing.assert_close(norms, torch.stack(ops.norms(weight, *case.args, **case.options)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("capabilities", "server"),
    [([(9, 0)], "native"), ([(7, 5)], "native"), ([(9, 0), (7, 0)], "triton"), ([(6, 1)], "reference")],
    ids=str,
)
def test_a_gpu_that_kernels_are_not_compiled_for_is_served_by_others(monkeypatch, capabilities, server):
    monkeypatch.setattr(backends_module, "_native_failure", None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(backends_module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    row = backends()["cuda"]
    assert [backend for backend, what in row.items() if what == "serves"] == [server]
    for backend in BACKENDS[: BACKENDS.index(server)]:
        assert "compute capability" in row[backend]


def test_the_oldest_gpu_is_the_first_that_the_extension_is_compiled_for():
    setup = Path(__file__).parents[1] / "setup.py"
    if not setup.exists():
        pytest.skip("away from the source tree")
    first = re.search(r"CUDA_TARGETS = \((\d+)", setup.read_text())[1]
    assert divmod(int(first), 10) == backends_module.OLDEST_GPU["native"]
