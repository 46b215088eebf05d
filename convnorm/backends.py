"""Which kernels serve which device, and why the others do not."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import TracebackType

import torch

from .uncompiled import constant_when_compiled

BACKENDS = ("native", "triton", "reference")  # the fastest first
OLDEST_GPU = {"native": (7, 5), "triton": (7, 0)}  # compute capabilities: setup.py's first target, Triton's own

_chosen: str | None = None
_serving: dict[str, str] = {}  # by device type, found at the first call after a choice
_native_failure: str | None = None


def load_native() -> None:
    """Load the compiled extension, which registers ``measure_native``; without it the other backends serve."""
    global _native_failure
    library = Path(__file__).with_name("_native.abi3.so")
    if not library.exists():
        _native_failure = "the extension was not built (CONVNORM_NO_EXT=1 at install time)"
        if library.parents[1].joinpath("setup.py").exists():
            _native_failure = (
                f"the extension was not built in the source tree {str(library.parents[1])!r}, where convnorm is "
                "imported from: pip install --no-build-isolation -e . builds it there"
            )
        return
    try:
        torch.ops.load_library(library)
    except OSError as error:
        _native_failure = f"the extension does not load: {error}"


@constant_when_compiled  # it asks the dispatcher, which compilers do not follow
def why_not(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot serve a device, or None where it can."""
    if backend == "native":
        if _native_failure:
            return _native_failure
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
        if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key("convnorm::measure_native", key):
            return f"the extension was built without {device_type}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "triton runs on a GPU only (or with TRITON_INTERPRET=1)"
    if device_type == "cuda" and backend in OLDEST_GPU and torch.version.hip is None and torch.cuda.is_available():
        found = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if found < OLDEST_GPU[backend]:
            needed, had = (".".join(map(str, one)) for one in (OLDEST_GPU[backend], found))
            return f"{backend} needs GPUs of compute capability {needed}, here is one of {had}"
    return None


def chosen() -> str | None:
    """The backend asked for with ``use_backend``."""
    return _chosen


def backend_for(device: torch.device) -> str:
    """The backend that serves a device: the one asked for with ``use_backend``, or the first that can."""
    backend = _serving.get(device.type)
    if backend is None:
        backend = _serving[device.type] = _resolve(device.type)
    return backend


def _resolve(device_type: str) -> str:
    if _chosen is None or device_type == "meta":  # without values any backend gives the same
        return _default(device_type)
    if reason := why_not(_chosen, device_type):
        raise RuntimeError(f"convnorm: backend {_chosen!r} cannot serve {device_type}: {reason}")
    return _chosen


def _default(device_type: str) -> str:
    if device_type == "cpu":  # the interpreter of Triton is for tests: only when asked for
        return "reference" if why_not("native", "cpu") else "native"
    return next(backend for backend in BACKENDS if why_not(backend, device_type) is None)


class use_backend:
    """From now on, or within a ``with`` block, measure with one backend; None lets each device choose again. Code that
    ``torch.compile`` or ``make_fx`` has captured keeps the one that it was captured with.

    >>> import torch, convnorm
    >>> with convnorm.use_backend("reference"):
    ...     torch.ops.convnorm.l1(torch.ones(1, 1, 3, 3), 1, 1, [8, 8])
    tensor(9.)
    """

    def __init__(self, backend: str | None) -> None:
        global _chosen
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"convnorm: backend {backend!r} must be one of {', '.join(BACKENDS)}")
        self._before, _chosen = _chosen, backend
        _serving.clear()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _chosen
        _chosen = self._before
        _serving.clear()


def backends() -> dict[str, dict[str, str]]:
    """For each device here, what every backend does there: ``"serves"``, ``"available"``, or why it cannot.

    >>> import convnorm
    >>> convnorm.backends()["cpu"]["reference"] in ("serves", "available")
    True
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    table: dict[str, dict[str, str]] = {}
    for device in devices:
        table[device] = {backend: why_not(backend, device) or "available" for backend in BACKENDS}
        serves = _chosen or _default(device)
        if table[device][serves] == "available":
            table[device][serves] = "serves"
    return table
