"""Builds the extension: C++ for the CPU, CUDA where nvcc is found (no GPU needed), one library for PyTorch >= 2.11.

CONVNORM_NO_EXT=1 leaves it out: plain PyTorch then serves the same operators. CONVNORM_CUDA=0 leaves CUDA out,
CONVNORM_CUDA=1 demands it. CONVNORM_CXX_FLAGS adds flags for compiler and linker (sanitizers).
"""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = Path("csrc")
CUDA_TARGETS = (75, 80, 86, 89, 90, 100)  # machine code for each, and PTX of the last for what comes after


class BuildNative(build_ext):
    """Calls the compilers directly: the stable ABI needs headers of PyTorch and nothing of its builder."""

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".abi3.so"

    def build_extension(self, ext: Extension) -> None:
        import torch

        root = Path(torch.__file__).parent
        compiler, nvcc = find_compiler(), find_nvcc()
        extra = os.environ.get("CONVNORM_CXX_FLAGS", "").split()
        common = ["-isystem", str(root / "include"), f"-I{CSRC}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        common += ["-std=c++17", "-O3"]
        host = [*compiler, *common, *extra]
        host += ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
        device = [str(nvcc), *common, "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", *codes_for(nvcc)]

        sources = [(host, source) for source in map(Path, ext.sources)]
        if nvcc:
            sources += [(device, source) for source in sorted((CSRC / "cuda").glob("*.cu"))]
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        objects = [build / f"{source.parent.name}_{source.stem}.o" for _, source in sources]
        commands = [
            [*call, "-c", str(source), "-o", str(made)] for (call, source), made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failed = any(list(pool.map(subprocess.call, commands)))
        if failed:
            without = "CONVNORM_CUDA=0 installs without CUDA, " if nvcc else ""
            raise RuntimeError(f"the extension does not compile; {without}CONVNORM_NO_EXT=1 installs without it")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        linker = [str(nvcc), "-cudart=static"] if nvcc else [*compiler, *extra]  # nvcc knows where its libraries are
        libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run([*linker, "-shared", *map(str, objects), *libraries, "-o", str(target)], check=True)


class BuildPure(build_py):
    """Without the library: not even the one that an earlier editable install has left in the tree."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            Path("convnorm/_native.abi3.so").unlink(missing_ok=True)


def find_compiler() -> list[str]:
    """CXX, which may have a launcher before the compiler, or options after it."""
    found = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(found[0]) is None:
        raise RuntimeError(f"no C++ compiler {found[0]!r} is found: set CXX; CONVNORM_NO_EXT=1 installs without it")
    return found


def find_nvcc() -> Path | None:
    """The CUDA compiler, or None: then the library serves the CPU only."""
    wanted = os.environ.get("CONVNORM_CUDA")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [None, "/usr/local/cuda/bin"]  # None: the PATH
    found = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if found is None and wanted == "1":
        raise RuntimeError("CONVNORM_CUDA=1, but no nvcc is found: set CUDA_HOME")
    return Path(found).resolve() if found else None


def codes_for(nvcc: Path | None) -> list[str]:
    """Options for machine code of those targets that this compiler knows, and PTX of the last."""
    if nvcc is None:
        return []
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    targets = [target for target in CUDA_TARGETS if f"compute_{target}" in known]
    pairs = [(target, f"sm_{target}") for target in targets] + [(targets[-1], f"compute_{targets[-1]}")]
    return [f"-gencode=arch=compute_{target},code={code}" for target, code in pairs]


native = Extension("convnorm._native", sorted(map(str, (CSRC / "cpu").glob("*.cpp"))), py_limited_api=True)
no_ext = os.environ.get("CONVNORM_NO_EXT") == "1"
setup(
    ext_modules=[] if no_ext else [native],
    cmdclass={"build_py": BuildPure} if no_ext else {"build_ext": BuildNative},
    options={} if no_ext else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
