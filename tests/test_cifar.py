"""The promise: CIFAR is read as its files say, in both versions, or one line names the file and what is wrong."""

import os
import pickle
import struct
import subprocess
import sys
from http.client import IncompleteRead
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

cifar = pytest.importorskip("train.cifar", reason="away from the source tree")

ROWS = 7  # of each file
NAMES = tuple(cifar.SOURCES)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cifar, "IMAGES_IN", dict.fromkeys(cifar.IMAGES_IN, ROWS))


@pytest.fixture(autouse=True)
def no_torchvision(monkeypatch):
    """Nothing is downloaded unless a test says how."""
    monkeypatch.setitem(sys.modules, "torchvision", None)


class Python2(pickle._Pickler):
    """Writes what Python 2 wrote: strings of bytes, where Python 3 has other opcodes or a detour."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        value = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = dispatch[str] = save_bytes


def pickled(content, version):
    """As Python 2 or, by the number of its protocol, Python 3 pickles it."""
    if version != "python2":
        return pickle.dumps({key.encode(): value for key, value in content.items()}, version)
    with open(os.devnull, "wb") as nowhere:
        pickler = Python2(nowhere, 2)
        chunks = []
        pickler.write = pickler.framer.write = chunks.append
        pickler.dump(content)
    return b"".join(chunks).replace(b"numpy._core", b"numpy.core")


class OnDisk:
    """A small data set in the format of the original, written byte by byte."""

    def __init__(self, name, parent):
        random = np.random.default_rng(0)
        self.source, self.parent = cifar.SOURCES[name], parent
        self.names = [*self.source.training, *self.source.test]
        self.pixels = random.integers(256, size=(len(self.names), ROWS, 3, 32, 32), dtype=np.uint8)
        self.labels = {
            kind: random.integers(classes, size=(len(self.names), ROWS)) for kind, classes in self.source.labels.items()
        }
        for kind, classes in self.source.labels.items():
            self.labels[kind][0, :2] = 0, classes - 1  # the extremes are admitted

    def write(self, version):
        folder = self.parent / (self.source.binary if version == "binary" else self.source.python)
        folder.mkdir(parents=True)
        for number, name in enumerate(self.names):
            if version == "binary":
                (folder / f"{name}.bin").write_bytes(self.rows(number))
            else:
                (folder / name).write_bytes(pickled(self.content(number), version))
        return folder

    def rows(self, file):
        content = bytearray()
        for row in range(ROWS):
            content.extend(labels[file, row] for labels in self.labels.values())
            for channel in self.pixels[file, row]:
                for line in channel:
                    content.extend(int(value) for value in line)
        return bytes(content)

    def content(self, file):
        labels = {kind: values[file].tolist() for kind, values in self.labels.items()}
        return {
            "batch_label": "one of some",
            **labels,
            "data": self.pixels[file].reshape(ROWS, -1),
            "filenames": ["a.png"],
        }

    def is_what_was_read(self, training, test):
        labels = [*self.labels.values()][-1]
        for (pixels, found), files in ((training, slice(0, -1)), (test, slice(-1, None))):
            assert (pixels.dtype, found.dtype) == (torch.uint8, torch.int64)
            assert pixels.is_contiguous(memory_format=torch.channels_last)
            assert np.array_equal(pixels, self.pixels[files].reshape(-1, 3, 32, 32))
            assert np.array_equal(found, labels[files].flatten())
        return True


@pytest.fixture(params=NAMES)
def on_disk(request, tmp_path):
    return OnDisk(request.param, tmp_path)


@pytest.fixture
def ten(tmp_path):
    return OnDisk("cifar10", tmp_path)


@pytest.fixture
def hundred(tmp_path):
    return OnDisk("cifar100", tmp_path)


def refused(on_disk, error=ValueError):
    with pytest.raises(error) as caught:
        cifar.read(on_disk.source, on_disk.parent)
    text = str(caught.value)
    assert "\n" not in text
    return text


# What is read


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("version", ["binary", "python2", 2, 3, 4, 5])
def test_all_images_are_read_in_order(on_disk, version, inside):
    folder = on_disk.write(version)
    assert on_disk.is_what_was_read(*cifar.read(on_disk.source, folder if inside else folder.parent))


def test_the_pickles_of_these_tests_are_those_of_python_2(ten):
    """Its opcodes, and the names of its time: GLOBAL and BINSTRING, and no detour over _codecs."""
    content = pickled(ten.content(0), "python2")
    assert content.startswith(b"\x80\x02}")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content
    assert b"T\x04\x00\x00\x00data" in content
    assert b"_codecs" not in content


def test_a_complete_version_is_read_beside_an_incomplete_one(on_disk):
    on_disk.write("python2")
    binary = on_disk.write("binary")
    next(binary.iterdir()).unlink()
    assert on_disk.is_what_was_read(*cifar.read(on_disk.source, on_disk.parent))


def test_files_have_the_originals_sizes(monkeypatch, tmp_path):
    """10,000 rows of 3,073 bytes; 50,000 and 10,000 of 3,074: what the archives hold."""
    monkeypatch.undo()
    for name, file, size in (
        ("cifar10", "data_batch_5", 30_730_000),
        ("cifar10", "test_batch", 30_730_000),
        ("cifar100", "train", 153_700_000),
        ("cifar100", "test", 30_740_000),
    ):
        path = tmp_path / f"{file}.bin"
        path.write_bytes(b"\0" * 3074)
        with pytest.raises(ValueError, match=rf"has 3074 bytes, not the {size} of"):
            cifar._binary(path, cifar.SOURCES[name])


# What is wrong with files


def test_missing_files_are_named_and_nothing_is_downloaded_over_the_others(ten, monkeypatch):
    folder = ten.write("binary")
    (folder / "data_batch_3.bin").unlink()
    (folder / "test_batch.bin").unlink()
    monkeypatch.setattr(cifar, "_downloaded", lambda *_: pytest.fail("downloaded"))
    text = refused(ten, FileNotFoundError)
    assert text.startswith(f"data {str(folder)!r} has no data_batch_3.bin, test_batch.bin, but other files of CIFAR-10")


@pytest.mark.parametrize("version", ["binary", "python2"])
@pytest.mark.parametrize("keep", [0, 1, 3072, 3073, 3074, -3073, -1])
def test_a_file_that_was_cut_is_named(on_disk, version, keep):
    folder = on_disk.write(version)
    file = folder / (on_disk.names[-1] + (".bin" if version == "binary" else ""))
    file.write_bytes(file.read_bytes()[:keep])
    what = "bytes, not the" if version == "binary" else "cannot be unpickled"
    assert f"data {str(file)!r} " in (text := refused(on_disk))
    assert what in text


@pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1])
def test_a_file_of_whole_rows_but_too_few_or_many_is_named(on_disk, rows):
    file = on_disk.write("binary") / f"{on_disk.names[0]}.bin"
    size = 3072 + len(on_disk.labels)
    file.write_bytes((2 * file.read_bytes())[: rows * size])
    assert refused(on_disk) == f"data {str(file)!r} has {rows * size} bytes, not the {ROWS * size} of {ROWS} images"


@pytest.mark.parametrize("version", ["binary", "python2"])
@pytest.mark.parametrize("kind", [0, -1])
def test_a_label_out_of_range_is_named(on_disk, version, kind):
    kind, classes = [*on_disk.source.labels.items()][kind]
    on_disk.labels[kind][-1, 3] = classes
    on_disk.write(version)
    assert f"{on_disk.names[-1]}" in (text := refused(on_disk))
    assert f"has {classes} among its {kind!r}, which are from 0 to {classes - 1}" in text


def test_a_negative_label_is_named(hundred):
    hundred.labels["coarse_labels"][0, 0] = -1
    hundred.write("python2")
    assert "train' has -1 among its 'coarse_labels'" in refused(hundred)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([1, 2], "holds no dictionary, but a list"),
        ({"data": None}, "has 'data' of NoneType, not of uint8 (7, 3072)"),
        ({"data": np.zeros((7, 3072), np.int64)}, "has 'data' of int64 (7, 3072), not of uint8 (7, 3072)"),
        ({"data": np.zeros((6, 3072), np.uint8)}, "has 'data' of uint8 (6, 3072), not of"),
        ({"data": np.zeros((7, 1024), np.uint8)}, "has 'data' of uint8 (7, 1024), not of"),
        ({"labels": [0] * 6}, "has 6 'labels' for 7 images"),
        ({"labels": "0123456"}, "has 'labels' that are no list of whole numbers"),
        ({"labels": [0.0] * 7}, "has 'labels' that are no list of whole numbers"),
        ({"labels": [[0]] * 7}, "has 'labels' that are no list of whole numbers"),
    ],
)
def test_a_pickle_that_holds_something_else_is_named(ten, wrong, message):
    file = ten.write("python2") / "data_batch_4"
    content = {**ten.content(3), **wrong} if isinstance(wrong, dict) else wrong
    file.write_bytes(pickle.dumps(content, 4))
    text = refused(ten)
    assert f"data {str(file)!r} {message}" in text


@pytest.mark.parametrize("key", ["data", "coarse_labels", "fine_labels"])
def test_a_pickle_without_a_part_is_named(hundred, key):
    file = hundred.write("python2") / "test"
    content = hundred.content(1)
    del content[key]
    file.write_bytes(pickled(content, "python2"))
    assert refused(hundred) == f"data {str(file)!r} has no {key!r}"


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval, Path, np.load, getattr])
def test_a_pickle_that_would_call_something_is_refused(ten, function, tmp_path):
    arguments = {os.mkdir: (str(tmp_path / "made"),), eval: (f"__import__('os').mkdir({str(tmp_path / 'made')!r})",),
                 getattr: ("", "join")}.get(function, (str(tmp_path),))  # fmt: skip
    file = ten.write("python2") / "test_batch"
    file.write_bytes(pickle.dumps({**ten.content(5), "more": Malicious(function, *arguments)}, 4))
    assert f"data {str(file)!r} cannot be unpickled: " in (text := refused(ten))
    assert text.endswith("is not admitted")
    assert not (tmp_path / "made").exists()


def test_the_malicious_pickle_does_what_it_says_when_loaded_as_usual(tmp_path):
    pickle.loads(pickle.dumps(Malicious(os.mkdir, str(tmp_path / "made")), 4))
    assert (tmp_path / "made").exists()


# Downloads


@pytest.fixture
def torchvision(on_disk, monkeypatch, tmp_path):
    """A module that "downloads" the small data set, as the real one does: in the python version, below ``root``."""
    calls = []

    def download(root, train, download):
        calls.append((root, train, download))
        OnDisk(on_disk.source.title.replace("-", "").lower(), Path(root)).write("python2")
        (Path(root) / "archive.tar.gz").write_bytes(b"of no use any more")

    fake = ModuleType("torchvision")
    fake.datasets = SimpleNamespace(calls=calls, **{on_disk.source.title.replace("-", ""): download})
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    return fake.datasets


def test_absent_files_are_downloaded_once(on_disk, torchvision, tmp_path):
    directory = tmp_path / "not" / "yet"
    for _ in range(2):
        assert on_disk.is_what_was_read(*cifar.read(on_disk.source, directory))
    ((root, _, asked),) = torchvision.calls
    assert asked
    assert Path(root).parent == directory  # on the same disk, where moving is renaming
    assert [path.name for path in directory.iterdir()] == [on_disk.source.python]  # and nothing beside it


def test_of_two_downloads_at_a_time_one_is_kept(on_disk, torchvision, tmp_path):
    method = on_disk.source.title.replace("-", "")
    download = getattr(torchvision, method)

    def slow(root, **options):
        download(root, **options)
        on_disk.write("python2")  # the other process, meanwhile

    setattr(torchvision, method, slow)
    assert on_disk.is_what_was_read(*cifar.read(on_disk.source, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [on_disk.source.python]


@pytest.mark.parametrize(
    "error",
    [OSError("<urlopen error no\nnetwork>"), RuntimeError("File not found or corrupted."), IncompleteRead(b"", 7)],
    ids=type,
)
def test_a_failed_download_is_told_with_the_files_that_are_missing(on_disk, torchvision, tmp_path, error):
    def fails(root, train, download):
        (Path(root) / "half").write_text("")
        raise error

    setattr(torchvision, on_disk.source.title.replace("-", ""), fails)
    text = refused(on_disk, FileNotFoundError)
    assert text.startswith(f"data {str(tmp_path)!r} has no {', '.join(on_disk.names)} of {on_disk.source.title}")
    assert text.endswith("through torchvision failed: " + str(error).replace("\n", " "))
    assert not [*tmp_path.iterdir()]


def test_without_torchvision_the_error_says_what_to_install(on_disk):
    text = refused(on_disk, FileNotFoundError)
    assert f"nor in a folder {on_disk.source.binary!r} or {on_disk.source.python!r}" in text
    assert text.endswith("(pip install torchvision)")


def test_a_directory_that_cannot_be_made_is_told(ten, torchvision, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"failed: .*File exists|Not a directory"):
        cifar.read(ten.source, tmp_path / "file")


def test_torchvision_for_another_build_of_pytorch_is_imported(tmp_path):
    """In a process of its own: what is declared to PyTorch stays. The module does what torchvision 0.28 and 0.29 do."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "for operator in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{operator}')(lambda dets, scores, iou_threshold: dets)\n"
        "from torchvision import datasets\n"
    )
    (package / "datasets.py").write_text("CIFAR10 = 'found'\n")
    code = (
        "from train.cifar import _torchvision_datasets\n"
        "try:\n    import torchvision\n"
        "except RuntimeError as error:\n    print(error)\n"
        "print(_torchvision_datasets().CIFAR10)\n"
    )
    root = Path(cifar.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, root)))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["operator torchvision::nms does not exist", "found"]


def test_another_failure_of_torchvision_is_told(ten, monkeypatch, tmp_path):
    package = tmp_path / "modules" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('broken otherwise')")
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.syspath_prepend(package.parent)
    assert refused(ten, FileNotFoundError).endswith("broken otherwise")
