"""NormDecay is Algorithm 1: compared with dense tensors, whole matrices and PyTorch's own differentiation."""

import math
import warnings

import pytest
import torch
from every_layer import SHAPE, DenseDecay, network, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import convnorm
from convnorm.backends import why_not
from convnorm.uses import observe


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("ord", [1, math.inf])
def test_200_steps_are_those_of_the_dense_algorithm(ord, momentum, server):
    if server != ("native", "cpu") and (server != ("reference", "cpu") or momentum != 0.5):
        pytest.skip("tests/test_momentum.py compares all backends step by step")
    model, other = network(), network()
    mine = train(model, convnorm.NormDecay(model, SHAPE, ord=ord, beta=0.3, momentum=momentum).step, 200)
    dense = train(other, DenseDecay(other, ord, 0.3, momentum).step, 200)
    for a, b in zip(mine, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_it_decays_norms():
    sums = []
    for beta in (0.0, 0.5):
        model = network(torch.float32)
        decay = convnorm.NormDecay(model, SHAPE, beta=beta)
        train(model, decay.step, 60)
        sums.append(sum(decay.norms.values()).item())
    assert sums[1] < 0.8 * sums[0]


def test_norms_are_those_of_the_last_step():
    model = network(torch.float32)
    for ord in (1, math.inf):
        decay = convnorm.NormDecay(model, SHAPE, ord=ord, beta=0.1)
        assert decay.norms == {}
        train(model, lambda: None, 1)
        decay.step()
        assert list(decay.norms) == [use.name for use in decay.uses] == [name for name, _ in model.named_children()]
        for use in observe(model, SHAPE):
            expected = convnorm.norms(use.layer)
            assert decay.norms[use.name] == (expected.l1 if ord == 1 else expected.linf)


def test_penalty_is_the_sum_of_the_norms_and_its_gradient_that_of_a_step():
    model = network()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    decay = convnorm.NormDecay(model, SHAPE, beta=0.7, momentum=0)
    decay.step()
    penalty = decay.penalty()
    torch.testing.assert_close(penalty, 0.7 / 8 * sum(decay.norms.values()))
    weights = [use.module.weight for use in decay.uses]
    for weight, gradient in zip(weights, torch.autograd.grad(penalty, weights), strict=True):
        torch.testing.assert_close(weight.grad, gradient)


class NothingWaits(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: numbers in a tensor of the host that another operator takes, but
    for a copy that says it need not wait.
    """

    def __init__(self):
        super().__init__()
        self._on_host = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        free = operator is torch.ops.aten.copy_.default and True in args[2:]  # non_blocking
        assert free or not any(given is made for given in args for made in self._on_host), operator
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten.lift_fresh.default:
            self._on_host.append(result)
        return result


def test_a_penalty_waits_for_nothing():
    model = network()
    decay = convnorm.NormDecay(model, SHAPE, beta={"linear": 0.5, "*": 1.0})
    decay.penalty()  # brings tables to a device
    with NothingWaits():
        decay.penalty().backward()


def test_a_step_waits_for_nothing():
    model = network()
    decay = convnorm.NormDecay(model, SHAPE, beta=lambda step: 0.1 / (1 + step))
    train(model, lambda: None, 1)
    with NothingWaits():
        decay.step()
        decay.step(maximized={model.grouped.weight, model.linear.weight})


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_a_penalty_is_as_precise_as_its_norms(default):
    model = network()
    decay = convnorm.NormDecay(model, SHAPE, beta=0.7)
    decay.step()
    try:
        torch.set_default_dtype(default)
        penalty = decay.penalty()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(penalty, 0.7 / 8 * sum(decay.norms.values()), rtol=1e-14, atol=0)


def test_beta_by_pattern_by_schedule_and_set():
    model = network()
    every = [use.name for use in observe(model, SHAPE)]
    decay = convnorm.NormDecay(model, SHAPE, beta={"linear": 0.0, "*d": 2.0, "*": 1.0}, momentum=0)
    betas = [0.0 if name == "linear" else 2.0 if name.endswith("d") else 1.0 for name in every]
    assert decay._rates(decay.beta) == [beta / 8 for beta in betas]
    seen = []
    for beta in (0.5, {"*": 0.25}, lambda step: 1.0 + step):
        decay.beta = beta
        for _ in range(2):
            model.linear.weight.grad = torch.zeros_like(model.linear.weight)
            decay.step()
            seen.append(8 * model.linear.weight.grad.abs().max().item())
    assert seen == pytest.approx([0.5, 0.5, 0.25, 0.25, 1.0, 2.0])


def test_beta_by_pattern_is_that_of_the_steps_and_changed_as_a_whole():
    given = {"*": 1.0}
    decay = convnorm.NormDecay(two(), [1, 4], beta=given)
    given["*"] = 0.0
    with pytest.raises(TypeError, match="item assignment"):
        decay.beta["*"] = 0.0
    assert decay.beta == decay.state_dict()["beta"] == {"*": 1.0}
    assert decay.penalty().item() == pytest.approx(sum(convnorm.norms(use.layer).l1.item() for use in decay.uses) / 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_a_scale_reaches_layers_on_other_devices():
    """As GradScaler leaves it to a fused optimizer: on one of the devices of the model."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).cuda())
    decay = convnorm.NormDecay(model, {"0": (), "1": ()}, beta=0.5, momentum=0)
    for layer in model:
        layer.weight.grad = torch.zeros_like(layer.weight)
    decay.step(torch.tensor(2.0, device="cuda"))
    assert [layer.weight.grad.abs().max().item() for layer in model] == [0.5, 0.5]


@pytest.mark.parametrize("refused", [math.nan, {"nobody": 1.0}, lambda step: math.inf])
def test_a_beta_that_is_refused_changes_nothing(refused):
    decay = convnorm.NormDecay(two(), [1, 4], beta=0.5)
    before = decay.penalty().item()
    with pytest.raises(ValueError, match="convnorm: beta"):
        decay.beta = refused
    assert decay.beta == decay.state_dict()["beta"] == 0.5
    assert decay.penalty().item() == before


@pytest.mark.parametrize("include", ["linear", ["lin*", "dil*"], "*d"])
def test_include_and_exclude(include):
    model = network()
    decay = convnorm.NormDecay(model, SHAPE, beta=1.0, include=include, exclude="solid")
    expected = {"linear": ["linear"], "*d": ["grouped", "transposed", "dilated"]}
    assert [use.name for use in decay.uses] == expected.get(str(include), ["dilated", "linear"])
    train(model, lambda: None, 1)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    decay.step()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p.grad, before[name])]
    assert changed == [f"{use.name}.weight" for use in decay.uses]


@pytest.mark.parametrize("ord", [1, math.inf])
def test_released_variant(ord):
    """h *= γ; h[slice] = sign(weight[slice]); g += β h, for square plain Conv2d and Linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 3))
    decay = convnorm.NormDecay(model, [1, 3, 8, 8], ord=ord, beta=0.1, momentum=0.5, variant="released")
    averages = [torch.zeros_like(model[i].weight) for i in (0, 1, 3)]
    for _ in range(12):
        for h, i in zip(averages, (0, 1, 3), strict=True):
            weight = model[i].weight
            weight.data *= 1 + 0.1 * torch.randn(weight.shape[:2] + (1,) * (weight.dim() - 2))
            weight.grad = torch.zeros_like(weight)
            h *= 0.5
            sums = weight.detach().abs()
            if ord == math.inf:
                row = sums.flatten(1).sum(1).argmax()
                h[row] = weight.detach()[row].sign()
            elif i == 0:  # stride 2: taps 0, 2 of an axis, or tap 1 alone
                classes = [([0, 2], [0, 2]), ([0, 2], [1]), ([1], [0, 2]), ([1], [1])]
                best = [sums[:, :, a][:, :, :, b].sum((0, 2, 3)).max(0) for a, b in classes]
                a, b = classes[max(range(4), key=lambda c: best[c].values)]
                column = max(best, key=lambda one: one.values).indices
                for row in a:
                    h[:, column, row, b] = weight.detach()[:, column, row, b].sign()
            else:
                column = sums.flatten(2).sum((0, 2)).argmax() if i == 1 else sums.sum(0).argmax()
                h[:, column] = weight.detach()[:, column].sign()
        decay.step()
        for h, i in zip(averages, (0, 1, 3), strict=True):
            torch.testing.assert_close(model[i].weight.grad, 0.1 * h)


def test_released_variant_says_what_it_skips():
    with pytest.warns(
        UserWarning, match=r"'reflect', 'grouped', 'transposed', 'depthwise', 'dilated', 'solid', 'small'"
    ):
        decay = convnorm.NormDecay(network(), SHAPE, beta=1.0, variant="released")
    assert [use.name for use in decay.uses] == ["linear"]
    small = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, stride=2, padding=1))
    with pytest.raises(ValueError, match="leave no layer"), pytest.warns(UserWarning, match="'0', '1'"):
        convnorm.NormDecay(small, {"0": (2, 2), "1": (3, 3)}, beta=1.0, variant="released")
    assert len(convnorm.NormDecay(small, {"0": (3, 3), "1": (4, 4)}, beta=1.0, variant="released").uses) == 2
    spread = nn.Sequential(nn.Conv2d(1, 1, 3, dilation=2), nn.Conv2d(1, 1, 3, padding="same"))
    with pytest.raises(ValueError, match="leave no layer"), pytest.warns(UserWarning, match="'0', '1'"):
        convnorm.NormDecay(spread, [1, 1, 9, 9], beta=1.0, variant="released")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ord": 2}, "ord 2 must be 1 or inf"),
        ({"momentum": 1.0}, "momentum 1.0 must be"),
        ({"momentum": -0.1}, "momentum -0.1 must be"),
        ({"momentum": 0.991}, "momentum 0.991 must be at least 0 and at most 0.99"),
        ({"momentum": math.nan}, "momentum nan must be"),
        ({"variant": "dense"}, "variant 'dense' must be"),
        ({"beta": math.nan}, "beta nan of layer 'reflect' must be finite"),
        ({"beta": {"linear": 1.0}}, "no pattern for layer 'reflect'"),
        ({"include": "nothing"}, "leave no layer"),
        ({"example": {"dropout": ()}}, "example names 'dropout'"),
        ({"example": [2, 4, 8, 8]}, r"input of \[2, 4, 8, 8\], in or after layer 'reflect'"),
        ({"example": {"reflect": (1, 1)}, "include": "reflect"}, "layer 'reflect': padding"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, RuntimeError), match=message):
            convnorm.NormDecay(network(), **({"example": SHAPE, "beta": 1.0} | arguments))


def test_steps_that_cannot_be_are_refused_by_name():
    with pytest.raises(RuntimeError, match="no layer has run yet"):
        convnorm.NormDecay(network(), beta=1.0).step()
    model = network()
    decay = convnorm.NormDecay(model, SHAPE, beta=1.0)
    for poison in (math.nan, math.inf):
        model.linear.weight.data[0, 0] = poison
        with pytest.raises(RuntimeError, match=rf"layer 'linear' \({poison}\) is not finite"):
            decay.step()
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    decay = convnorm.NormDecay(nn.Sequential(parametrized), [1, 3], beta=1.0)
    decay.penalty().backward()
    assert parametrized.parametrizations.weight.original1.grad.any()
    with pytest.raises(RuntimeError, match="layer '0' is computed from other parameters"):
        decay.step()


def test_layers_that_never_run_are_named():
    model = network()
    model.spare = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="layer 'spare' did not run"):
        convnorm.NormDecay(model, SHAPE, beta=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convnorm.NormDecay(model, SHAPE, beta=1.0, exclude="spare")


def test_a_replaced_parameter_is_followed_and_named():
    model = network()
    decay = convnorm.NormDecay(model, SHAPE, beta=1.0, momentum=0)
    train(model, decay.step, 2)
    model.linear.weight = nn.Parameter(10 * model.linear.weight.detach())
    model.linear.weight.grad = torch.zeros_like(model.linear.weight)
    with pytest.warns(UserWarning, match="weight of layer 'linear' was replaced"):
        decay.step()
    torch.testing.assert_close(decay.norms["linear"], convnorm.norms(model.linear).l1)
    assert model.linear.weight.grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decay.step()


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("ord", [1, math.inf])
def test_a_gradient_whose_elements_share_memory_is_refused_by_name(ord, backend):
    if why_not(backend, "cpu"):
        pytest.skip("the extension was not built")
    model = two()
    decay = convnorm.NormDecay(model, [1, 4], ord=ord, beta=1.0)
    (model[1].weight.grad,) = torch.autograd.grad(model[1].weight.sum(), model[1].weight)
    refused = pytest.raises(RuntimeError, match=r"gradient of layer '1' .*share memory")
    with convnorm.use_backend(backend), refused:
        decay.step()


def test_a_penalty_counts_no_steps_for_a_schedule():
    with pytest.raises(RuntimeError, match="counts no steps for a schedule of beta: set beta in the loop"):
        convnorm.NormDecay(two(), [1, 4], beta=lambda step: 0.1 * step).penalty()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_layers_of_numbers_that_have_no_norm_are_named(dtype):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    decay = convnorm.NormDecay(model, [1, 3], beta=1.0)
    model[0].weight, model[1].weight = (nn.Parameter(layer.weight.detach().to(dtype)) for layer in model)
    for act in (decay.step, lambda: convnorm.NormDecay(model, {"0": ()}, beta=1.0, include="0")):
        with pytest.raises(convnorm.GeometryError, match=f"layer '0': weight of {dtype}"):
            act()
