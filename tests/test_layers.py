"""The promise: a module becomes the linear map that it is; ``observe`` sees where a model uses it, changing nothing."""

import copy
from dataclasses import replace
from functools import partial

import cases
import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import convnorm
from convnorm.geometry import GeometryError
from convnorm.layers import as_layer
from convnorm.uses import observe

# What makes a module, and an input size.
MODULES = {
    "linear": (partial(nn.Linear, 5, 3), ()),
    "conv1d": (partial(nn.Conv1d, 2, 3, 3, 2, 1), (9,)),
    "conv1d_same": (partial(nn.Conv1d, 2, 3, 4, padding="same"), (5,)),
    "conv1d_same_dilated": (partial(nn.Conv1d, 2, 2, 4, padding="same", dilation=3, groups=2), (7,)),
    "conv1d_same_reflect": (partial(nn.Conv1d, 2, 3, 4, padding="same", padding_mode="reflect"), (6,)),
    "conv2d": (partial(nn.Conv2d, 3, 4, (3, 2), (2, 1), (1, 0), (1, 2)), (5, 6)),
    "conv2d_valid": (partial(nn.Conv2d, 3, 2, 3, padding="valid"), (5, 4)),
    "conv2d_same": (partial(nn.Conv2d, 2, 3, (3, 4), padding="same", dilation=(2, 1)), (2, 6)),
    "conv2d_circular": (partial(nn.Conv2d, 2, 3, 3, 2, (2, 1), padding_mode="circular"), (3, 4)),
    "conv2d_replicate": (partial(nn.Conv2d, 2, 3, 3, padding=(3, 1), padding_mode="replicate"), (2, 4)),
    "conv2d_reflect": (partial(nn.Conv2d, 2, 3, 3, padding=2, padding_mode="reflect"), (3, 5)),
    "conv2d_same_circular": (partial(nn.Conv2d, 2, 2, 4, padding="same", padding_mode="circular"), (3, 4)),
    "conv2d_depthwise": (partial(nn.Conv2d, 4, 8, 3, padding=1, groups=4), (4, 4)),
    "conv3d": (partial(nn.Conv3d, 2, 3, 2, padding=(1, 0, 1)), (2, 3, 3)),
    "conv3d_same_replicate": (partial(nn.Conv3d, 2, 1, (2, 3, 1), padding="same", padding_mode="replicate"), (3, 2, 2)),
    "transposed1d": (partial(nn.ConvTranspose1d, 3, 2, 3, 3, 1, 2), (4,)),
    "transposed1d_dilated": (partial(nn.ConvTranspose1d, 2, 2, 3, padding=3, output_padding=2, dilation=3), (4,)),
    "transposed2d": (partial(nn.ConvTranspose2d, 2, 3, 3, 2, 1, (1, 0)), (3, 4)),
    "transposed2d_grouped": (partial(nn.ConvTranspose2d, 4, 6, 3, (2, 3), 1, (1, 2), groups=2), (3, 2)),
    "transposed3d": (partial(nn.ConvTranspose3d, 2, 2, (2, 3, 2), 2, (0, 1, 0), (1, 0, 1)), (2, 2, 3)),
}


def build(name, device="cpu"):
    """A module of the table with weights of its own, in float64, and its input size."""
    make, in_shape = MODULES[name]
    torch.manual_seed(0)
    return make().to(device, torch.float64), in_shape


def linear_part(module, x):
    """What the module does to ``x``, less its bias."""
    return module(x) - module(torch.zeros_like(x[:1]))


@pytest.mark.parametrize("name", MODULES)
def test_a_layer_maps_as_its_module_does(name):
    module, in_shape = build(name)
    layer = as_layer(module, in_shape)
    x = torch.randn(3, layer.in_channels, *in_shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear_part(module, x), rtol=1e-9, atol=1e-12)
    assert layer(x).shape == (3, layer.out_channels, *layer.geometry.out_shape)
    assert layer.weight is module.weight


def test_a_raw_weight_maps_as_pytorch_does(seed):
    for number in range(1000):
        rng = np.random.default_rng((seed, number, 6))
        case = cases.random_case(rng)
        weight = cases.random_weight(rng, case.weight_shape, values="normal")
        layer = as_layer(weight, case.in_shape, **case.keywords)
        x = torch.from_numpy(rng.standard_normal((2, layer.in_channels, *case.in_shape)))
        expected = oracle.forward(x, weight, case.stride, case.padding, **case.options)
        again = cases.replay(seed, number, case)
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-12, msg=again)
        assert layer(x).shape[1:] == (layer.out_channels, *layer.geometry.out_shape), again


def test_a_raw_transposed_matrix_maps_as_its_transpose():
    weight, x = torch.randn(3, 5), torch.randn(2, 3)
    layer = as_layer(weight, transposed=True)
    assert (layer.in_channels, layer.out_channels) == (3, 5)
    torch.testing.assert_close(layer(x), x @ weight)
    torch.testing.assert_close(layer.adjoint(x @ weight), x @ weight @ weight.T)


def test_a_layer_is_its_own_layer():
    layer = as_layer(torch.ones(2, 3, 3), [8])
    assert as_layer(layer) is layer


def seen(model, *inputs):
    return [(use.name, use.in_shape) for use in observe(model, *inputs)]


class Branches(nn.Module):
    """Defined in another order than used: ``last`` is used first, ``head`` at two sizes, ``unused`` never."""

    def __init__(self):
        super().__init__()
        self.head, self.unused, self.down, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x, y):
        x = self.last(x)
        return self.head(x), self.head(nn.functional.avg_pool2d(self.down(x), 2)), self.head(x), y


def test_observe_lists_layers_in_the_order_of_their_use():
    uses = [("last", (8, 6)), ("head", (8, 6)), ("down", (8, 6)), ("head", (4, 3))]
    assert seen(Branches(), [1, 3, 8, 6], [1]) == uses


def test_observe_lists_a_shared_module_once():
    conv = nn.Conv1d(2, 2, 3, padding=1)
    uses = observe(nn.Sequential(conv, nn.ReLU(), conv), [1, 2, 8])
    assert [(use.name, use.module) for use in uses] == [("0", conv)]


def test_observe_takes_shapes_and_tensors():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv, self.linear = nn.Embedding(10, 4), nn.Conv1d(4, 2, 3), nn.Linear(7, 1)

        def forward(self, words, y):
            return self.conv(self.words(words).mT), self.linear(y)

    for y in ([5, 7], (5, 7), torch.Size([5, 7]), torch.ones(5, 7)):
        assert seen(Model(), torch.arange(6)[None], y) == [("conv", (6,)), ("linear", ())]


@pytest.mark.parametrize("name", MODULES)
def test_a_use_is_the_layer_at_its_size(name):
    module, in_shape = build(name)
    layer = as_layer(module, in_shape)
    (use,) = observe(module, torch.zeros(2, layer.in_channels, *in_shape, dtype=torch.float64))
    assert (use.name, use.module, use.in_shape) == ("", module, in_shape)
    assert use.layer.geometry == layer.geometry


def test_observe_takes_inputs_without_batch_or_with_many_axes():
    assert seen(nn.Conv2d(3, 4, 3), [3, 8, 7]) == [("", (8, 7))]
    assert seen(nn.ConvTranspose1d(3, 4, 3), [3, 8]) == [("", (8,))]
    assert seen(nn.Linear(5, 2), [5]) == seen(nn.Linear(5, 2), [2, 3, 4, 5]) == [("", ())]


def test_observe_sees_inputs_given_by_keyword():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3)

        def forward(self, x):
            return self.conv(input=x)

    assert seen(Model(), [1, 2, 8]) == [("conv", (8,))]


def test_observe_sees_the_output_size_that_was_asked_for():
    """``output_size`` chooses the output padding of one call: 18 outputs here, where the module alone has 17."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.ConvTranspose1d(2, 2, 3, stride=2)

        def forward(self, x):
            return self.conv(x, output_size=[18])

    (use,) = observe(Model(), [1, 2, 8])
    assert use.layer.geometry.out_shape == (18,)


def small_network():
    convs = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)]
    return nn.Sequential(nn.Sequential(*convs), nn.Dropout(), nn.Flatten(), nn.Linear(32, 2))


def hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


def test_observe_changes_nothing():
    model = small_network()
    model[0][1].eval()  # frozen, in a model that trains
    model[3].requires_grad_(False)
    state, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    observe(model, x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == [True] * 8 + [False] * 2
    assert all(p.grad is None for p in [x, *model.parameters()])
    assert not hooks(model)
    assert torch.is_grad_enabled()
    assert model(x).isfinite().all()


@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_observe_leaves_no_fake_weights(normed):
    """These find the weight anew in each forward pass and keep it in the module."""
    model = nn.Sequential(normed(nn.Conv2d(3, 4, 3)))
    observe(model, [1, 3, 8, 8])
    assert not isinstance(model[0].weight, FakeTensor)


class Remembering(nn.Module):
    """Keeps what it computes, in every place there is."""

    def __init__(self):
        super().__init__()
        self.conv, self.later, self.cache, self.seen = nn.Conv1d(2, 2, 3), None, {}, [[]]
        self.count, self.counts = torch.zeros(()), [torch.zeros(())]
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", None)

    def forward(self, x):
        self.count += 1
        self.counts[0] += 1
        y = self.conv(x)
        self.mean = 0.9 * self.mean + y.mean()
        self.seen[0].append(y)
        self.cache["positions"] = torch.arange(y.shape[-1])
        self.scale, self.later = torch.ones(2, 1), nn.Linear(y.shape[-1], 2)
        return self.later(y * self.scale)


def test_observe_leaves_nothing_fake_in_a_model():
    model = Remembering()
    assert seen(model, [1, 2, 8]) == [("conv", (8,))]
    assert (model.later, model.scale, model.cache, model.seen) == (None, None, {}, [[]])
    assert (model.mean, model.count, model.counts) == (0, 0, [0])
    assert list(model.state_dict()) == ["mean", "conv.weight", "conv.bias"]
    assert model(torch.ones(1, 2, 8)).isfinite().all()


def test_observe_does_not_write_what_evaluation_mode_writes():
    """LoRA adds its product to the weight there, and subtracts it in training mode."""

    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.merged = False

        def train(self, mode=True):
            super().train(mode)
            if mode == self.merged:
                self.weight.data += -1.0 if mode else 1.0
                self.merged = not mode
            return self

    model = Adapted()
    before = model.weight.detach().clone()
    assert seen(model, [1, 4]) == [("", ())]
    assert (model.training, model.merged) == (True, False)
    assert torch.equal(model.weight, before)


def test_observe_leaves_no_trace_of_a_model_that_fails():
    class Fails(nn.Module):
        def forward(self, x):
            raise ArithmeticError("too late")

    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.BatchNorm1d(2).eval(), Fails())
    with pytest.raises(GeometryError, match=r"of \[1, 2, 8\], in or after layer '0': ArithmeticError: too late"):
        observe(model, [1, 2, 8])
    assert not hooks(model)
    assert [module.training for module in model] == [True, False, True]
    assert model[0](torch.ones(1, 2, 8)).isfinite().all()


def test_observe_computes_nothing():
    """No machine has room for these."""
    assert seen(nn.Conv2d(4096, 4096, 3, device="meta"), [1, 4096, 8, 8]) == [("", (8, 8))]
    size = 10**6
    model = nn.Sequential(nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(64, 1, 3))
    assert seen(model, [1, 3, size, size]) == [("0", (size, size)), ("2", (size // 2, size // 2))]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("device", [*convnorm.backends(), "meta"])
def test_observe_gives_the_model_inputs_of_its_own_kind(device, dtype):
    model = small_network().to(device, dtype)
    assert seen(model, [1, 3, 8, 8]) == [("0.0", (8, 8)), ("0.3", (6, 6)), ("3", ())]


@pytest.mark.parametrize("lazy", [lambda: nn.LazyConv1d(4, 3), lambda: nn.LazyBatchNorm1d(affine=False)])
def test_observe_refuses_weights_that_are_not_initialised_yet(lazy):
    model = nn.Sequential(lazy())
    with pytest.raises(GeometryError, match="weight of layer '0' is not initialised"):
        observe(model, [1, 2, 8])
    assert model(torch.ones(1, 2, 8)).isfinite().all()


def test_one_channel_that_lies_channels_last_is_read_as_it_is():
    """Else PyTorch's convolution in float32 takes what lies beyond the input for a part of it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 1, 5, 4, generator=generator).clone(memory_format=torch.channels_last)
    plain = as_layer(weight, (13, 7), stride=(1, 4))
    transposed = as_layer(weight, (9, 1), stride=(1, 4), transposed=True)
    x = torch.randn(1, 1, 13, 7, generator=generator).clone(memory_format=torch.channels_last)
    for layer, run, given in ((plain, plain, x), (transposed, transposed.adjoint, x[..., :4])):
        exact = replace(layer, weight=weight.double())
        expected = (exact if run is layer else exact.adjoint)(given.double())
        beyond = torch.full((1 << 16,), 1e30)
        del beyond
        torch.testing.assert_close(run(given.clone(memory_format=torch.channels_last)), expected.float())


@pytest.mark.parametrize("part", ["", "0"])
@pytest.mark.parametrize("in_place", [False, True])
def test_observe_runs_no_compiled_code(part, in_place):
    """Which reads the memory that fake tensors do not have."""

    def backend(graph, inputs):
        raise AssertionError("compiled")

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    if in_place:
        model.get_submodule(part).compile(backend=backend)
    elif part:
        model[0] = torch.compile(model[0], backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    assert [use.in_shape for use in observe(model, [1, 3, 8, 8])] == [(8, 8), ()]


SHAPES = [[1, 3, 8.0, 8], [1, 3, -8, 8], {"x": [1, 3, 8, 8]}, 5, "abc", [None, 3, 8, 8]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", [convnorm.report, convnorm.lipschitz, observe])
def test_shapes_that_are_none_are_named(function, shape):
    with pytest.raises(GeometryError, match=r"convnorm: input .* in whole numbers"):
        function(nn.Conv2d(3, 4, 3), shape)


def test_sizes_that_are_no_whole_numbers_are_named():
    weight = torch.randn(4, 3, 3, 3)
    for function in (convnorm.l2, convnorm.norms, convnorm.witness, convnorm.singular_values):
        with pytest.raises(GeometryError, match=r"in_shape \[5.0, 5\] must be whole numbers"):
            function(weight, [5.0, 5])
    assert convnorm.l2(weight, np.array([5, 5])).upper == convnorm.l2(weight, [5, 5]).upper
    assert convnorm.report(nn.Conv2d(3, 4, 3), [1, 3, np.int64(8), 8], l2=False).inputs == ((1, 3, 8, 8),)
