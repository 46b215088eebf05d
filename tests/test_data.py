"""The promise: CIFAR-10 is read as its files say, or the error names what is wrong with them."""

import numpy as np
import pytest
import torch

data = pytest.importorskip("train.data", reason="away from the source tree")

ROWS = 7  # of each file
FILES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


@pytest.fixture
def images():
    """labels[file, row] and pixels[file, row, channel, height, width]."""
    random = np.random.default_rng(0)
    return random.integers(10, size=(6, ROWS)), random.integers(256, size=(6, ROWS, 3, 32, 32))


@pytest.fixture
def folder(tmp_path, images):
    """A data set in the format of the original, written byte by byte."""
    path = tmp_path / "cifar-10-batches-bin"
    path.mkdir()
    for name, labels, pixels in zip(FILES, *images, strict=True):
        content = bytearray()
        for label, image in zip(labels, pixels, strict=True):
            content.append(label)
            for channel in image:
                for line in channel:
                    content.extend(int(value) for value in line)
        (path / f"{name}.bin").write_bytes(content)
    return path


@pytest.mark.parametrize("inside", [True, False])
def test_all_images_are_read_in_order(folder, images, inside):
    training, test = data.cifar10(folder if inside else str(folder.parent))
    labels, pixels = images
    assert (len(training), len(test)) == (5 * ROWS, ROWS)
    assert training.pixels.dtype == test.pixels.dtype == torch.uint8
    assert training.labels.dtype == test.labels.dtype == torch.int64
    assert np.array_equal(training.pixels, pixels[:5].reshape(-1, 3, 32, 32))
    assert np.array_equal(training.labels, labels[:5].flatten())
    assert np.array_equal(test.pixels, pixels[5])
    assert np.array_equal(test.labels, labels[5])


def test_missing_files_are_named(folder):
    (folder / "data_batch_3.bin").unlink()
    (folder / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no data_batch_3.bin, test_batch.bin: .* binary version"):
        data.cifar10(folder)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.cifar10(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"\0" * 3072, b"\0" * 3074], ids=len)
def test_a_file_that_was_cut_is_named(folder, content):
    (folder / "data_batch_2.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_2.bin' of {len(content)} bytes"):
        data.cifar10(folder)


def test_a_label_that_is_none_is_named(folder):
    (folder / "test_batch.bin").write_bytes(b"\x0a" + b"\0" * 3072)
    with pytest.raises(ValueError, match=r"test_batch.bin' has label 10"):
        data.cifar10(folder)


def test_normalised_pixels_have_the_deviations_that_they_are_given():
    spread = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 5)
    black, white = data.normalised(spread)
    for channel, (mean, deviation) in enumerate(zip(data.MEAN, data.DEVIATION, strict=True)):
        torch.testing.assert_close(black[channel], torch.full((4, 5), -mean / deviation))
        torch.testing.assert_close(white[channel], torch.full((4, 5), (1 - mean) / deviation))
