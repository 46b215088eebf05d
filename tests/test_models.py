"""The promise: the networks are the originals, layer by layer, and compute the same.

Parameters, layers and logits were taken from the originals themselves: torchvision 0.28.0, and for the names that end
in ``_cifar`` kuangliu/pytorch-cifar (its resnet.py of before and after pre-activation has the basic blocks). Only
resnet20, which neither has, was counted by hand.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convnorm.uses import observe

models = pytest.importorskip("train.models", reason="away from the source tree")


@dataclass
class Original:
    size: int  # of its images
    classes: int
    parameters: int
    layers: str  # how many of each, in the order of their use
    logits: list[float]  # the first three, for the weights and the image of ``drawn``


ORIGINALS = {
    "vgg11_cifar": Original(
        32,
        10,
        9_231_114,
        """
        1 64x3x3x3 of 32x32
        1 128x64x3x3 of 16x16
        1 256x128x3x3 of 8x8
        1 256x256x3x3 of 8x8
        1 512x256x3x3 of 4x4
        1 512x512x3x3 of 4x4
        2 512x512x3x3 of 2x2
        1 10x512
        """,
        [7.406514445408278, -1.7570712938587099, 3.7402724871558437],
    ),
    "resnet18_cifar": Original(
        32,
        10,
        11_173_962,
        """
        1 64x3x3x3 of 32x32
        4 64x64x3x3 of 32x32
        1 128x64x3x3 / 2 of 32x32
        3 128x128x3x3 of 16x16
        1 128x64x1x1 / 2 of 32x32
        1 256x128x3x3 / 2 of 16x16
        3 256x256x3x3 of 8x8
        1 256x128x1x1 / 2 of 16x16
        1 512x256x3x3 / 2 of 8x8
        3 512x512x3x3 of 4x4
        1 512x256x1x1 / 2 of 8x8
        1 10x512
        """,
        [-30.550566347599354, -23.20717717710073, 15.308559817105998],
    ),
    "senet18_cifar": Original(
        32,
        10,
        11_260_354,
        """
        1 64x3x3x3 of 32x32
        4 64x64x3x3 of 32x32
        2 4x64x1x1 of 1x1
        2 64x4x1x1 of 1x1
        1 128x64x1x1 / 2 of 32x32
        1 128x64x3x3 / 2 of 32x32
        3 128x128x3x3 of 16x16
        2 8x128x1x1 of 1x1
        2 128x8x1x1 of 1x1
        1 256x128x1x1 / 2 of 16x16
        1 256x128x3x3 / 2 of 16x16
        3 256x256x3x3 of 8x8
        2 16x256x1x1 of 1x1
        2 256x16x1x1 of 1x1
        1 512x256x1x1 / 2 of 8x8
        1 512x256x3x3 / 2 of 8x8
        3 512x512x3x3 of 4x4
        2 32x512x1x1 of 1x1
        2 512x32x1x1 of 1x1
        1 10x512
        """,
        [13.40472587726155, -0.32490293063571196, 0.6026218545962858],
    ),
    "regnetx_200mf_cifar": Original(
        32,
        10,
        2_321_946,
        """
        1 64x3x3x3 of 32x32
        2 24x64x1x1 of 32x32
        1 24x8x3x3 in 3 groups of 32x32
        1 24x24x1x1 of 32x32
        2 56x24x1x1 of 32x32
        1 56x8x3x3 in 7 groups of 32x32
        1 56x56x1x1 of 32x32
        1 152x56x1x1 of 32x32
        1 152x8x3x3 / 2 in 19 groups of 32x32
        7 152x152x1x1 of 16x16
        1 152x56x1x1 / 2 of 32x32
        3 152x8x3x3 in 19 groups of 16x16
        1 368x152x1x1 of 16x16
        1 368x8x3x3 / 2 in 46 groups of 16x16
        13 368x368x1x1 of 8x8
        1 368x152x1x1 / 2 of 16x16
        6 368x8x3x3 in 46 groups of 8x8
        1 10x368
        """,
        [-1375.1798551045224, 2012.9185250431974, 639.7452957065212],
    ),
    "resnet20": Original(
        32,
        10,
        272_474,
        """
        1 16x3x3x3 of 32x32
        6 16x16x3x3 of 32x32
        1 32x16x3x3 / 2 of 32x32
        5 32x32x3x3 of 16x16
        1 32x16x1x1 / 2 of 32x32
        1 64x32x3x3 / 2 of 16x16
        5 64x64x3x3 of 8x8
        1 64x32x1x1 / 2 of 16x16
        1 10x64
        """,
        [],
    ),
    "resnet18": Original(
        224,
        1000,
        11_689_512,
        """
        1 64x3x7x7 / 2 of 224x224
        4 64x64x3x3 of 56x56
        1 128x64x3x3 / 2 of 56x56
        3 128x128x3x3 of 28x28
        1 128x64x1x1 / 2 of 56x56
        1 256x128x3x3 / 2 of 28x28
        3 256x256x3x3 of 14x14
        1 256x128x1x1 / 2 of 28x28
        1 512x256x3x3 / 2 of 14x14
        3 512x512x3x3 of 7x7
        1 512x256x1x1 / 2 of 14x14
        1 1000x512
        """,
        [35.66651373450788, -29.636628621150823, -45.19972338432753],
    ),
    "resnet50": Original(
        224,
        1000,
        25_557_032,
        """
        1 64x3x7x7 / 2 of 224x224
        1 64x64x1x1 of 56x56
        3 64x64x3x3 of 56x56
        4 256x64x1x1 of 56x56
        2 64x256x1x1 of 56x56
        1 128x256x1x1 of 56x56
        1 128x128x3x3 / 2 of 56x56
        4 512x128x1x1 of 28x28
        1 512x256x1x1 / 2 of 56x56
        3 128x512x1x1 of 28x28
        3 128x128x3x3 of 28x28
        1 256x512x1x1 of 28x28
        1 256x256x3x3 / 2 of 28x28
        6 1024x256x1x1 of 14x14
        1 1024x512x1x1 / 2 of 28x28
        5 256x1024x1x1 of 14x14
        5 256x256x3x3 of 14x14
        1 512x1024x1x1 of 14x14
        1 512x512x3x3 / 2 of 14x14
        3 2048x512x1x1 of 7x7
        1 2048x1024x1x1 / 2 of 14x14
        2 512x2048x1x1 of 7x7
        2 512x512x3x3 of 7x7
        1 1000x2048
        """,
        [967.0650960380862, -2120.64966465957, 39.813164624624825],
    ),
    "convnext_tiny": Original(
        224,
        1000,
        28_589_128,
        """
        1 96x3x4x4 / 4 of 224x224
        3 96x1x7x7 in 96 groups of 56x56
        3 384x96
        3 96x384
        1 192x96x2x2 / 2 of 56x56
        3 192x1x7x7 in 192 groups of 28x28
        3 768x192
        3 192x768
        1 384x192x2x2 / 2 of 28x28
        9 384x1x7x7 in 384 groups of 14x14
        9 1536x384
        9 384x1536
        1 768x384x2x2 / 2 of 14x14
        3 768x1x7x7 in 768 groups of 7x7
        3 3072x768
        3 768x3072
        1 1000x768
        """,
        [1.466671381097711, 2.056773482088393, 1.4880736773235086],
    ),
}


@pytest.fixture(params=ORIGINALS)
def name(request):
    return request.param


def build(name, **options):
    torch.manual_seed(0)
    return getattr(models, name)(**options)


def images(name, count=2):
    """Large enough for the network; of less than 224x224, for speed."""
    size = min(ORIGINALS[name].size, 64)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def drawn(name):
    """The network with numbers of NumPy's, whose frozen generator draws the same everywhere; and an image."""
    model, random = build(name), np.random.RandomState(0)

    def draw(shape):
        return torch.from_numpy(random.uniform(-1, 1, tuple(shape)))

    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() > 1:
            tensor.data = draw(tensor.shape) * math.sqrt(6 / tensor[0].numel())
        elif tensor.is_floating_point():
            tensor.data = draw(tensor.shape) / 2 + (0 if key.endswith(("bias", "mean")) else 1)
    image = draw((2, *images(name).shape[1:]))[:1]
    return model.double().eval(), image


def described(use):
    stride, groups = use.layer.stride, use.layer.groups
    parts = ["x".join(map(str, use.module.weight.shape))]
    parts += [f"/ {stride[0]}"] if set(stride) - {1} else []
    parts += [f"in {groups} groups"] if groups > 1 else []
    parts += [f"of {'x'.join(map(str, use.in_shape))}"] if use.in_shape else []
    return " ".join(parts)


def test_networks_have_the_originals_parameters(name):
    assert sum(parameter.numel() for parameter in build(name).parameters()) == ORIGINALS[name].parameters


def test_networks_have_the_originals_layers(name):
    original = ORIGINALS[name]
    uses = observe(build(name), [1, 3, original.size, original.size])
    found = Counter(map(described, uses))  # keeps the order
    assert [f"{count} {layer}" for layer, count in found.items()] == [
        line.strip() for line in original.layers.strip().splitlines()
    ]


def test_observe_finds_every_layer(name):
    model, size = build(name), ORIGINALS[name].size
    uses = observe(model, [1, 3, size, size])
    has = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sorted(use.name for use in uses) == sorted(has)


@pytest.mark.parametrize("name", [name for name in ORIGINALS if ORIGINALS[name].logits])
def test_networks_compute_what_the_originals_compute(name):
    model, image = drawn(name)
    with torch.no_grad():
        assert model(image)[0, :3].tolist() == pytest.approx(ORIGINALS[name].logits, rel=1e-9)


def test_networks_evaluate_and_train(name):
    model, original = build(name, classes=7), ORIGINALS[name]
    with torch.no_grad():
        logits = model.eval()(images(name))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert build(name)(images(name)).shape == (2, original.classes)
    F.cross_entropy(model.train()(images(name)), torch.tensor([0, 6])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or parameter.dim() == 1, key  # a bias before batch norm changes nothing


def test_channels_last_stays_so_from_layer_to_layer(name):
    model, x = build(name).eval(), images(name)
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        others = []
        for key, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):

                def see(module, args, key=key):
                    if not args[0].is_contiguous(memory_format=torch.channels_last):
                        others.append(key)

                module.register_forward_pre_hook(see)
        found = model(x.to(memory_format=torch.channels_last))
    assert not others
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_networks_compile_in_one_graph(name):
    model, x = build(name).eval(), images(name)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_new_weights_are_pytorchs_default(name):
    for key, module in build(name).named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight, bias = module.weight.detach(), module.bias
        if name == "convnext_tiny":  # its original has its own
            assert weight.std() == pytest.approx(0.02, rel=0.05), key
            assert weight.abs().max() > 0.06, key  # cut at 2, far beyond what is drawn
            assert not bias.any(), key
        else:
            bound = 1 / math.sqrt(weight[0].numel())  # uniform up to it
            assert bound * 0.95 < weight.abs().max() <= bound, key
            assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.1), key
            assert bias is None or 0 < bias.abs().max() <= bound, key


def test_a_new_convnext_block_is_nearly_the_identity():
    block, x = build("convnext_tiny").stage1[0], torch.randn(1, 96, 8, 8)
    with torch.no_grad():
        change = block(x) - x
    assert 0 < change.abs().max() < 1e-5
