"""What the tests of the CUDA kernels share: the emulator, the way to a GPU and back, and what is measured there.

The emulator (``tests/emulation``) runs on the CPU the very code of the kernels and of the host around them, all but
the launch.
"""

import ctypes
import functools
import mmap
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import cases
import pytest
import torch

from convnorm.backends import why_not

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
if not CUDA.exists():
    pytest.skip("away from the source tree there is no CUDA code to compile", allow_module_level=True)
TORCH = Path(torch.__file__).parent
COMMON = ["-isystem", str(TORCH / "include"), f"-I{CUDA.parent}", "-std=c++17", "-DUSE_CUDA"]
COMMON += re.findall(r"-DTORCH_TARGET_VERSION=\w+", (ROOT / "setup.py").read_text())
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
CXX = os.environ.get("CXX", "c++")
H200 = (396, 1 << 15)  # the tiles that it holds at a time, and the terms of a part: see Cut in csrc/cuda/batch.h
CUTS = [H200, (1, 50), (20, 2000), (1 << 20, 1 << 30)]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or bool(why_not("native", "cuda")), reason="needs a GPU")


@functools.cache  # a process cannot load it twice
def emulator():
    """The operators ``measure``, ``decay`` and ``work`` of ``tests/emulation/kernels_emulated.cpp``."""
    if shutil.which(CXX) is None:
        pytest.skip(f"{CXX} is not found")
    flags = [*COMMON, *WARNINGS, "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-fvisibility=hidden", "-shared"]
    source = Path(__file__).parent / "emulation" / "kernels_emulated.cpp"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "emulated.so"
        run([CXX, *flags, source, "-o", library, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"])
        torch.ops.load_library(library)
    return torch.ops.convnorm_emulated


def run(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def to_gpu(weight):
    """The weight with all the memory around it, so that it lies there as it lies here."""
    empty, memory = torch.empty(0, dtype=weight.dtype, device="cuda"), weight.untyped_storage().cuda()
    return empty.set_(memory, weight.storage_offset(), weight.shape, weight.stride())


def network(layers):
    return "".join(case.plan for case in layers)


def guarded(weight):
    """The same weight, ending where a page begins that nobody may read; None where it does not fill its memory."""
    if weight.numel() != weight.untyped_storage().nbytes() // weight.itemsize:
        return None
    page, size = mmap.PAGESIZE, weight.numel() * weight.itemsize
    start = -size % page
    memory = mmap.mmap(-1, start + size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + start + size), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=start)
    return flat.as_strided(weight.shape, weight.stride()).copy_(weight)


def resnet18():
    shapes = [(64, 3, 7, 7)]
    for width, before in ((64, 64), (128, 64), (256, 128), (512, 256)):
        shapes += [(width, before, 3, 3), *[(width, width, 3, 3)] * 3, *[(width, before, 1, 1)] * (width != before)]
    layers = [cases.Case(s, (1 + (s[0] != s[1]),) * 2, (s[2] // 2,) * 2, (32, 32)) for s in shapes]
    return [*layers, cases.Case((1000, 512))]
