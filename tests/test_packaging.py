"""The promise: what is installed is what was asked for, from a checkout or an sdist, and its command line works."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, ignore_patterns
from zipfile import ZipFile

import pytest

import convnorm

ROOT = Path(__file__).parent.parent
IN_A_CHECKOUT = (ROOT / "setup.py").exists() and find_spec("setuptools") is not None


@pytest.fixture
def checkout(tmp_path):
    """A copy of the source tree, where an extension has been built in place."""
    if not IN_A_CHECKOUT:
        pytest.skip("needs the source tree and setuptools")
    unwanted = ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "results", "runs")
    tree = copytree(ROOT, tmp_path / "tree", ignore=unwanted)
    (tree / "convnorm" / "_native.abi3.so").write_bytes(b"of yesterday")
    return tree


def setup(tree, *arguments, fails=False, **environment):
    line = [sys.executable, "setup.py", "-q", *arguments]
    run = subprocess.run(line, cwd=tree, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert (run.returncode != 0) == fails, run.stderr
    return run.stderr


def test_without_the_extension_none_is_packed_nor_left(checkout):
    setup(checkout, "build", "--build-lib", "built", CONVNORM_NO_EXT="1")
    assert not list(checkout.glob("built/**/*.so"))
    assert (checkout / "built" / "convnorm" / "py.typed").exists()
    library = checkout / "convnorm" / "_native.abi3.so"
    assert library.exists()
    setup(checkout, "editable_wheel", "--dist-dir", "made", CONVNORM_NO_EXT="1")
    assert not library.exists()


def test_a_compiler_that_is_not_there_is_named(checkout):
    error = setup(checkout, "build", fails=True, CXX="nonesuch -pipe", CONVNORM_CUDA="0")
    assert "no C++ compiler 'nonesuch' is found" in error
    assert "CONVNORM_NO_EXT=1" in error


@pytest.mark.skipif(shutil.which("env") is None, reason="needs env")
def test_a_compiler_may_have_a_launcher(checkout):
    """As in CXX="ccache g++"; env calls what does not compile."""
    error = setup(checkout, "build", fails=True, CXX="env false", CONVNORM_CUDA="0")
    assert "the extension does not compile" in error


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs sh")
def test_cuda_is_compiled_for_the_targets_that_nvcc_knows(checkout):
    """One before 12.8 has no sm_100."""
    nvcc = checkout / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    lists = 'echo "$@" >> "$0.log"; [ "$1" = --list-gpu-arch ] && echo compute_80 compute_90'
    nvcc.write_text(f"#!/bin/sh\n{lists}\n")
    nvcc.chmod(0o755)
    error = setup(checkout, "build", fails=True, CXX="env false", CUDA_HOME=str(nvcc.parents[1]), CONVNORM_CUDA="1")
    assert "CONVNORM_CUDA=0 installs without CUDA" in error
    called = nvcc.with_suffix(".log").read_text()
    assert "compute_80,code=sm_80" in called
    assert "compute_90,code=compute_90" in called
    assert "compute_100" not in called


@pytest.mark.parametrize("no_ext", ["0", "1"])
def test_an_sdist_has_all_sources(checkout, no_ext):
    setup(checkout, "egg_info", CONVNORM_NO_EXT=no_ext)
    packed = set((checkout / "convnorm.egg-info" / "SOURCES.txt").read_text().splitlines())
    for folder in ("csrc", "tests"):
        assert {str(path.relative_to(checkout)) for path in checkout.glob(f"{folder}/**/*.*")} <= packed


def test_type_checkers_find_an_editable_install(checkout):
    """They read paths, and run no code that an import might."""
    setup(checkout, "editable_wheel", "--dist-dir", "made", CONVNORM_NO_EXT="1")
    with ZipFile(next(checkout.glob("made/*.whl"))) as wheel:
        paths = [wheel.read(name).decode().strip() for name in wheel.namelist() if name.endswith(".pth")]
    assert [Path(path).resolve() for path in paths] == [checkout.resolve()]


def test_a_source_tree_that_hides_the_installed_package_says_so(checkout):
    (checkout / "convnorm" / "_native.abi3.so").unlink()
    line = [sys.executable, "-c", "import convnorm; print(convnorm.backends()['cpu']['native'])"]
    run = subprocess.run(line, cwd=checkout, capture_output=True, text=True, check=True)
    assert "source tree" in run.stdout
    assert "pip install --no-build-isolation -e ." in run.stdout


def shell(*arguments, options=(), **environment):
    environment = os.environ | {"PYTHONPATH": str(Path(convnorm.__file__).parents[1])} | environment
    line = [sys.executable, *options, "-m", "convnorm", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


def test_importing_does_not_import_compilers():
    """Which takes as long as importing PyTorch does."""
    late = "{'torch._dynamo', 'torch._inductor', 'triton', 'sympy'}"
    line = [sys.executable, "-c", f"import sys, torch, convnorm; print({late} & set(sys.modules))"]
    assert subprocess.run(line, check=True, capture_output=True, text=True).stdout == "set()\n"


def test_the_command_line_works_without_docstrings():
    assert shell("--help", options=["-OO"]).returncode == 0


@pytest.mark.parametrize("command", [["report"], ["compare", "named:network"]], ids=["report", "compare"])
def test_files_are_written_where_the_table_cannot_be_printed(tmp_path, command):
    pytest.importorskip("rich")
    (tmp_path / "named.py").write_text(
        "from torch import nn\n\n\nclass Named(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.add_module('größe', nn.Conv2d(3, 4, 3))\n\n    def forward(self, x):\n"
        "        return self.get_submodule('größe')(x)\n\n\nnetwork = Named\n",
        encoding="utf-8",
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(convnorm.__file__).parents[1])])
    found, page = tmp_path / "found.csv", tmp_path / "found.html"
    arguments = [
        *command,
        "named:network",
        "--input",
        "3",
        "8",
        "8",
        "--no-l2",
        "--csv",
        str(found),
        "--html",
        str(page),
    ]
    if command[0] == "compare":
        arguments += ["--layers", "l1"]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    run = shell(*arguments, PYTHONPATH=paths, **ascii_only)
    for file in (found, page):
        assert "größe" in file.read_text(encoding="utf-8"), run.stderr
