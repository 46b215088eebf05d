"""The promise: every data set comes as the same thing, and an epoch is exactly what its generator says."""

import hashlib
import pickle

import pytest
import torch

data = pytest.importorskip("train.data", reason="away from the source tree")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    """Labelled by their numbers. No pixel is 0, as the margins are."""
    pixels = torch.randint(1, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=generator())
    return data.Images(pixels.contiguous(memory_format=torch.channels_last), torch.arange(60))


@pytest.fixture(scope="module")
def synthetic():
    return data.load("synthetic", None)


def cropped_one_by_one(pixels, top, left, mirrored):
    """Pixel by pixel, as its definition says."""
    result = torch.zeros(pixels.shape, dtype=torch.float32)
    for image in range(len(pixels)):
        for row in range(32):
            for column in range(32):
                from_row = row + int(top[image]) - 4
                from_column = (31 - column if mirrored[image] else column) + int(left[image]) - 4
                if 0 <= from_row < 32 and 0 <= from_column < 32:
                    result[image, :, row, column] = pixels[image, :, from_row, from_column].float() / 255
    return result


# Data sets by name


def test_cifar_comes_from_its_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(data.cifar, "IMAGES_IN", dict.fromkeys(data.cifar.IMAGES_IN, 2))
    for label, name in enumerate(["train.bin", "test.bin"]):
        (tmp_path / name).write_bytes(2 * bytes([19, 99 - label, *[label] * 3072]))
    found = data.load("cifar100", str(tmp_path))
    assert (found.name, found.classes, len(found.training), len(found.test)) == ("cifar100", 100, 2, 2)
    assert found.training.labels.tolist() == [99, 99]
    assert found.test.labels.tolist() == [98, 98]
    assert found.test.pixels.unique().tolist() == [1]


def test_an_unknown_data_set_is_named():
    with pytest.raises(ValueError, match=r"data set 'mnist' must be one of 'cifar10', 'cifar100', 'synthetic'"):
        data.load("mnist", None)


def test_a_data_set_without_directory_says_where_to_name_one():
    with pytest.raises(ValueError, match=r"'cifar10' needs a directory: --data DIR, or CONVNORM_DATA=DIR"):
        data.load("cifar10", None)


def test_the_option_goes_before_the_environment(monkeypatch):
    monkeypatch.delenv("CONVNORM_DATA", raising=False)
    assert data.directory_of(None) is None
    monkeypatch.setenv("CONVNORM_DATA", "from/environment")
    assert data.directory_of(None).as_posix() == "from/environment"
    assert data.directory_of("from/option").as_posix() == "from/option"
    monkeypatch.setenv("CONVNORM_DATA", "")
    assert data.directory_of(None) is None


def test_the_first_images_are_a_copy_without_the_others(images):
    first = images.first(3)
    assert (len(first), first.labels.tolist()) == (3, [0, 1, 2])
    assert torch.equal(first.pixels, images.pixels[:3])
    assert first.pixels.untyped_storage().nbytes() == 3 * 3072
    assert len(pickle.dumps(first)) < 20_000
    for count in (0, 61):
        with pytest.raises(ValueError, match=rf"count {count} must be from 1 to the 60 images"):
            images.first(count)


def test_data_moves_to_a_device(synthetic):
    moved = synthetic.to("meta")
    assert {part.device.type for part in (moved.training.pixels, moved.training.labels, moved.test.pixels)} == {"meta"}
    assert (moved.name, moved.classes, len(moved.test)) == ("synthetic", 10, 1000)


# The synthetic set


def test_the_synthetic_set_is_the_same_everywhere(synthetic):
    """SHA-256 of its bytes in the order of its indices, as first made."""
    digest = hashlib.sha256()
    for images in (synthetic.training, synthetic.test):
        digest.update(images.pixels.contiguous(memory_format=torch.contiguous_format).numpy().tobytes())
        digest.update(images.labels.to(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == "3ae4a7f669018ef7cd27890ea8080c6a09f0948ff2f890e9f47f74f31a903587"


def test_the_synthetic_set_looks_like_the_others(synthetic):
    assert (len(synthetic.training), len(synthetic.test), synthetic.classes) == (5000, 1000, 10)
    for images in (synthetic.training, synthetic.test):
        assert images.pixels.shape[1:] == (3, 32, 32)
        assert (images.pixels.dtype, images.labels.dtype) == (torch.uint8, torch.int64)
        assert images.pixels.is_contiguous(memory_format=torch.channels_last)
        assert images.labels.bincount().min() > len(images) / 20
        assert len(images.labels.bincount()) == 10
    rows = torch.cat([synthetic.training.pixels, synthetic.test.pixels]).flatten(1)
    assert len({bytes(row) for row in rows.numpy()}) == 6000


def test_a_small_network_learns_the_synthetic_set_but_not_perfectly(synthetic):
    torch.manual_seed(0)
    layers = []
    for inner, outer in ((3, 16), (16, 32), (32, 64)):
        layers += [torch.nn.Conv2d(inner, outer, 3, 2, 1), torch.nn.BatchNorm2d(outer), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10))
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 3 * 39)
    draws = generator()
    for _ in range(3):
        for x, labels in data.epoch(synthetic.training, 128, draws):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x), labels).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        right = network(data.inputs(synthetic.test.pixels)).argmax(1) == synthetic.test.labels
    assert 0.8 < right.float().mean() < 0.97  # one image in 17 blends two classes equally


# Batches


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_images_are_cropped_and_mirrored_as_one_by_one(images, memory_format):
    draws = generator(1)
    count = 12
    top, left = torch.randint(9, (2, count), generator=draws)
    top[:4], left[:4] = torch.tensor([0, 0, 8, 4]), torch.tensor([0, 8, 8, 4])  # the corners, and nothing
    mirrored = torch.arange(count) % 2 == 1
    pixels = images.pixels[:count].contiguous(memory_format=memory_format)
    found = data.augmented(pixels, top, left, mirrored)
    assert torch.equal(found, cropped_one_by_one(pixels, top, left, mirrored))
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)


def variants(image):
    """All 9 x 9 x 2 of them."""
    top, left, mirrored = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2)).unbind(1)
    return data.augmented(image.expand(162, -1, -1, -1), top, left, mirrored.bool())


def test_an_epoch_shows_each_image_once_cropped_and_mirrored_on_its_own(images):
    batches = list(data.epoch(images, 20, generator()))
    assert [x.shape for x, _ in batches] == [(20, 3, 32, 32)] * 3
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in batches)
    order = torch.cat([labels for _, labels in batches])
    assert order.sort().values.tolist() == [*range(60)]
    assert order.tolist() != [*range(60)]
    chosen = []
    for x, labels in batches:
        for image, label in zip(x, labels, strict=True):
            same = (variants(images.pixels[label]) == image).flatten(1).all(1).nonzero().flatten()
            assert len(same) == 1  # no two variants are alike
            chosen.append(int(same))
        assert len(set(chosen[-20:])) > 10  # not one for a batch
    assert {choice % 2 for choice in chosen} == {0, 1}
    assert {choice // 2 % 9 for choice in chosen} == {choice // 18 for choice in chosen} == {*range(9)}


def test_images_that_fill_no_batch_are_left_out(images):
    assert [len(labels) for _, labels in data.epoch(images, 25, generator())] == [25, 25]


def same(one, other):
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(x, y) and torch.equal(a, b) for (x, a), (y, b) in pairs)


def test_the_generator_decides_the_epoch(images):
    assert same(data.epoch(images, 20, generator(3)), data.epoch(images, 20, generator(3)))
    assert not same(data.epoch(images, 20, generator(3)), data.epoch(images, 20, generator(4)))
    draws = generator(3)
    assert not same(data.epoch(images, 20, draws), data.epoch(images, 20, draws))  # it has gone on


def test_what_is_drawn_between_batches_changes_nothing(images):
    draws = generator(3)
    batches = data.epoch(images, 20, draws)
    torch.manual_seed(7)
    drawn_between = []
    for batch in batches:
        drawn_between.append(batch)
        torch.rand(5, generator=draws)
    assert same(drawn_between, data.epoch(images, 20, generator(3)))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_make_up_the_batches_of_one_process(images, world):
    ranks = [list(data.epoch(images, 20, generator(3), share=(rank, world))) for rank in range(world)]
    for step, (x, labels) in enumerate(data.epoch(images, 20, generator(3))):
        for rank in range(world):
            own, own_labels = ranks[rank][step]
            assert torch.equal(own, x[rank::world])
            assert torch.equal(own_labels, labels[rank::world])
            assert own.is_contiguous(memory_format=torch.channels_last)


def test_ranks_leave_their_generators_alike(images):
    states = []
    for rank in range(2):
        draws = generator(3)
        list(data.epoch(images, 20, draws, share=(rank, 2)))
        states.append(draws.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("batch", [0, 61])
def test_a_batch_of_no_or_too_many_images_is_named(images, batch):
    with pytest.raises(ValueError, match=rf"batch {batch} must be from 1 to the 60 images"):
        data.epoch(images, batch, generator())


@pytest.mark.parametrize("share", [(-1, 2), (2, 2), (0, 0), (0, 3)])
def test_a_share_that_is_none_is_named(images, share):
    with pytest.raises(ValueError, match=rf"share \({share[0]}, {share[1]}\) must be \(rank, world\)"):
        data.epoch(images, 20, generator(), share=share)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_epoch_is_the_same(images):
    on_gpu = data.epoch(images.to("cuda"), 20, generator(3))
    for (x, labels), (own, own_labels) in zip(data.epoch(images, 20, generator(3)), on_gpu, strict=True):
        assert own.is_cuda
        assert own.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(own_labels.cpu(), labels)
        torch.testing.assert_close(own.cpu(), x, rtol=1e-6, atol=0)  # which divides by 255 otherwise


def test_inputs_are_from_0_to_1():
    every = data.inputs(torch.arange(256, dtype=torch.uint8))
    assert every.dtype == torch.float32
    assert every.tolist() == [float(torch.tensor(value / 255)) for value in range(256)]  # each rounded once


def test_normalised_pixels_have_the_deviations_that_they_are_given():
    spread = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 5)
    black, white = data.normalised(spread)
    for channel, (mean, deviation) in enumerate(zip(data.MEAN, data.DEVIATION, strict=True)):
        torch.testing.assert_close(black[channel], torch.full((4, 5), -mean / deviation))
        torch.testing.assert_close(white[channel], torch.full((4, 5), (1 - mean) / deviation))
