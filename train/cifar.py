"""CIFAR-10 and CIFAR-100, from the files of www.cs.toronto.edu/~kriz/cifar.html, or downloaded.

They come in two versions, with the same images. A file of the binary version is rows of bytes: the labels, then the
red, the green and the blue plane of an image, each row by row. One of the python version is a pickled dictionary with
``data[images, 3072]`` in that order, and lists of labels.
"""

from __future__ import annotations

import _codecs
import os
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGE = (3, 32, 32)
VALUES = 3 * 32 * 32

IMAGES_IN = {f"data_batch_{number}": 10_000 for number in range(1, 6)}  # each file, by its name without suffix
IMAGES_IN |= {"test_batch": 10_000, "train": 50_000, "test": 10_000}


@dataclass(frozen=True)
class Source:
    """One of the two data sets as it lies on disk."""

    title: str
    binary: str  # the folder that the archive of each version unpacks to
    python: str
    training: Sequence[str]  # without suffix; the binary version's is .bin
    test: Sequence[str]
    labels: Mapping[str, int]  # how many of each kind, in the order of a row's first bytes; the last kind is the class

    @property
    def classes(self) -> int:
        return [*self.labels.values()][-1]


SOURCES = {
    "cifar10": Source(
        title="CIFAR-10",
        binary="cifar-10-batches-bin",
        python="cifar-10-batches-py",
        training=[f"data_batch_{number}" for number in range(1, 6)],
        test=["test_batch"],
        labels={"labels": 10},
    ),
    "cifar100": Source(
        title="CIFAR-100",
        binary="cifar-100-binary",
        python="cifar-100-python",
        training=["train"],
        test=["test"],
        labels={"coarse_labels": 20, "fine_labels": 100},
    ),
}


def read(source: Source, directory: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images, each as ``pixels[images, 3, 32, 32]``, channels last, and ``labels[images]``.

    ``directory`` holds the files themselves, or the folder that the archive unpacks to. If it has not one of them, they
    are downloaded into it.
    """
    files = _files(source, directory) or _downloaded(source, directory)
    return _images(source, files[: len(source.training)]), _images(source, files[len(source.training) :])


def _files(source: Source, directory: Path) -> list[Path]:
    """Those for training, then those for testing; of the binary version if both are there, empty if neither is."""
    incomplete = None
    for version, suffix in ((source.binary, ".bin"), (source.python, "")):
        for folder in (directory, directory / version):
            files = [folder / f"{name}{suffix}" for name in (*source.training, *source.test)]
            missing = [file.name for file in files if not file.is_file()]
            if not missing:
                return files
            if len(missing) < len(files):
                incomplete = incomplete or (folder, missing)
    if incomplete:
        folder, missing = incomplete
        raise FileNotFoundError(
            f"data {str(folder)!r} has no {', '.join(missing)}, but other files of {source.title}: "
            "nothing is downloaded over them"
        )
    return []


def _downloaded(source: Source, directory: Path) -> list[Path]:
    """The python version through torchvision, which verifies it."""
    try:
        datasets = _torchvision_datasets()
        directory.mkdir(parents=True, exist_ok=True)
        # Moved to its place at once when complete: no interruption and no other process leaves a part there.
        with tempfile.TemporaryDirectory(prefix="download-", dir=directory) as aside:
            getattr(datasets, source.title.replace("-", ""))(aside, train=False, download=True)
            try:
                os.rename(Path(aside) / source.python, directory / source.python)
            except OSError:
                if not _files(source, directory):  # no other process was faster
                    raise
        return _files(source, directory)
    except Exception as error:  # of torchvision, the network or the disk
        hint = " (pip install torchvision)" if isinstance(error, ImportError) else ""
        raise FileNotFoundError(
            f"data {str(directory)!r} has no {', '.join((*source.training, *source.test))} of {source.title}, with "
            f".bin (binary version) or without (python version), nor in a folder {source.binary!r} or "
            f"{source.python!r}; downloading them through torchvision failed: {_one_line(error)}{hint}"
        ) from error


def _torchvision_datasets() -> ModuleType:
    try:
        from torchvision import datasets
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        # Its compiled part is for another build of PyTorch. Images need none of it, but it wants these to exist.
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        from torchvision import datasets
    return datasets


def _images(source: Source, files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    parts = [_binary(file, source) if file.suffix == ".bin" else _pickled(file, source) for file in files]
    pixels, labels = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return pixels.view(-1, *IMAGE).contiguous(memory_format=torch.channels_last), labels.long()


def _binary(file: Path, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """``pixels[images, 3072]`` and ``labels[images]``."""
    content = np.fromfile(file, np.uint8)
    rows, size = IMAGES_IN[file.stem], len(source.labels) + VALUES
    if len(content) != rows * size:
        raise ValueError(f"data {str(file)!r} has {len(content)} bytes, not the {rows * size} of {rows} images")
    content = content.reshape(rows, size)
    for column, kind in enumerate(source.labels):
        _check_labels(file, kind, content[:, column], source.labels[kind])
    return content[:, len(source.labels) :], content[:, len(source.labels) - 1]


def _pickled(file: Path, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """As ``_binary``."""
    with file.open("rb") as stream:
        try:
            content = _Unpickler(stream, encoding="latin1").load()  # in which a string of Python 2 may be any bytes
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f"data {str(file)!r} cannot be unpickled: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"data {str(file)!r} holds no dictionary, but a {type(content).__name__}")
    content = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    for key in ("data", *source.labels):
        if key not in content:
            raise ValueError(f"data {str(file)!r} has no {key!r}")
    pixels, shape = content["data"], (IMAGES_IN[file.name], VALUES)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != shape:
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"data {str(file)!r} has 'data' of {found}, not of uint8 {shape}")
    for kind in source.labels:
        labels = content[kind]
        if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
            raise ValueError(f"data {str(file)!r} has {kind!r} that are no list of whole numbers")
        if len(labels) != len(pixels):
            raise ValueError(f"data {str(file)!r} has {len(labels)} {kind!r} for {len(pixels)} images")
        _check_labels(file, kind, labels, source.labels[kind])
    return pixels, np.array(labels)  # of the last kind


def _check_labels(file: Path, kind: str, labels: Sequence[int] | np.ndarray, classes: int) -> None:
    for label in (min(labels), max(labels)):
        if not 0 <= label < classes:
            raise ValueError(f"data {str(file)!r} has {label} among its {kind!r}, which are from 0 to {classes - 1}")


ADMITTED: Mapping[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _codecs.encode,  # makes the bytes of protocols before 3
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0] for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    """Since a pickle can call any function: only what arrays are made of, as Python 2 and 3 and NumPy 1 and 2 write."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return ADMITTED[module, name]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
