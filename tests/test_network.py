"""The promise: what has no constant is an error that names the node, and a given one is taken as it is."""

import math

import pytest
import torch
import torch.nn.functional as F
from as_matrix import ORDS, Of, batch_normed, matrix_of, norm_of, normal
from torch import nn

from convnorm.geometry import GeometryError
from convnorm.network import lipschitz, trace

# What is refused


class Gated(nn.Module):
    """A squeeze-excitation product."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(x)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Overwriting(nn.Module):
    def forward(self, x):
        x = 2 * x
        flat = x.view(len(x), -1)
        flat.mul_(3)
        return x


REFUSED = {
    "gate": (Gated(), [2, 3, 4, 4], r"node 'mul' \(mul\) multiplies what depends .* not globally Lipschitz"),
    "square": (Of(lambda x: x * x), [2, 3], "not globally Lipschitz"),
    "attention": (Of(lambda x: x @ x.transpose(1, 2)), [2, 3, 3], "not globally Lipschitz"),
    "quotient": (Of(lambda x: 1 / x), [2, 3], r"node 'reciprocal'|divides by"),
    "exponential": (Of(torch.exp), [2, 3], r"node 'exp' \(exp\) has no known Lipschitz constant"),
    "in_module": (nn.Sequential(nn.ReLU(), nn.Hardshrink()), [2, 3], r"'hardshrink' \(hardshrink in module '1'\)"),
    "control_flow": (Branching(), [2, 3], "model Branching cannot be exported .* data-dependent"),
    "shape": (
        nn.Sequential(nn.Conv2d(3, 4, 3)),
        [2, 1, 8, 8],
        r"cannot be exported for an input of \[2, 1, 8, 8\].* '0'",
    ),
    "arguments": (nn.Bilinear(3, 3, 3), [2, 3], "cannot be exported"),
    "batch_statistics": (nn.BatchNorm2d(3, track_running_stats=False), [2, 3, 4, 4], "statistics of the batch"),
    "batch_sum": (Of(lambda x: x.sum(0, keepdim=True).expand(len(x), -1)), [2, 3], "batch axis"),
    "batch_mean": (Of(lambda x: x - x.mean()), [2, 3], "batch"),
    "batch_transposed": (Of(lambda x: x.T), [2, 3], "batch axis"),
    "batch_permuted": (Of(lambda x: x.permute(1, 0, 2)), [2, 2, 3], "batch axis"),
    "batch_flattened": (Of(lambda x: x.reshape(-1)), [2, 3], "batch"),
    "batch_broadcast": (Of(lambda x: x + x.unsqueeze(1)), [3, 3], "batch axis"),
    "batch_rolled": (Of(lambda x: x.roll(1)), [2, 3], "batch"),
    "batch_flipped": (Of(lambda x: x.flip(0)), [2, 3], "batch axis"),
    "batch_joined": (Of(lambda x: torch.cat([x, x])), [2, 3], "batch axis"),
    "batch_tiled": (Of(lambda x: x.repeat(2, 1)), [2, 3], "batch axis"),
    "batch_product": (Of(lambda x, w: w @ x, w=normal(2, 2).float()), [2, 3], "within each sample"),
    "batch_product_of_a_vector": (Of(lambda x, w: x @ w, w=normal(3).float()), [3], "within each sample"),
    "batch_expanded": (Of(lambda x: x.expand(2, *x.shape)), [2, 3], "in front of the batch"),
    "circular_overlap": (Of(lambda x: F.pad(x, (-3, 2), mode="circular")), [2, 2, 4], "repeats 2 of 1"),
    "batch_softmax": (nn.Softmax(0), [2, 3], "batch axis"),
    "batch_normalised": (nn.LayerNorm((2, 3)), [2, 3], "normalises over the batch"),
    "batch_scaled": (Of(lambda x, w: x * w, w=normal(2, 3)), [2, 3], "each sample"),
    "unbatched": (nn.Conv2d(3, 4, 3), [3, 8, 8], "without a batch axis"),
    "unbatched_linear": (nn.Linear(3, 4), [3], "without a batch axis"),
    "unbatched_pool": (nn.MaxPool2d(2), [3, 8, 8], "without a batch axis"),
    "unbatched_adaptive_pool": (nn.AdaptiveMaxPool2d(2), [3, 8, 8], "without a batch axis"),
    "random": (Of(lambda x: x + torch.rand(3)), [2, 3], "draws random numbers"),
    "dropping": (Of(lambda x: F.dropout(x, training=True)), [2, 3], "drops at random"),
    "no_eps": (nn.LayerNorm(3, eps=0), [2, 3], "no eps"),
    "no_slope": (nn.LeakyReLU(math.nan), [2, 3], "an argument of nan"),
    "no_alpha": (nn.ELU(math.nan), [2, 3], "an argument of nan"),
    "no_alpha_of_a_sum": (Of(lambda x: torch.add(x, x, alpha=math.nan)), [2, 3], "alpha that is no finite number"),
    "complex": (Of(lambda x: (x * 2j).real), [2, 3], "factor that is no real number"),
    "softplus_jump": (nn.Softplus(1, 1), [2, 3], "jumps"),
    "celu_negative": (nn.CELU(-1.0), [2, 3], "exponentially"),
    "rounding": (Of(lambda x: torch.div(x, 2, rounding_mode="floor")), [2, 3], "not continuous"),
    "integers": (Of(lambda x: x.to(torch.int64)), [2, 3], "rounds to"),
    "limits": (Of(lambda x: torch.clamp(torch.zeros(2, 3), x, x + 1)), [2, 3], "limits|depend"),
    "limits_spread": (Of(lambda x, w: torch.clamp_min(x, w), w=normal(4).float()), [2, 3, 1], "broadcasts its input"),
    "data": (Of(lambda x: x + 3 * x.data), [2, 3], "has no values: .* .data reads"),
    "data_of_a_weight": (Of(lambda x, w: x * w.data, w=normal(3).float()), [2, 3], "has no values"),
    "data_overwritten": (Of(lambda x: torch.relu(x).data.mul_(3) + x), [2, 3], "has no values"),
    "overwritten": (Overwriting(), [2, 3], "overwritten in place"),
    "no_number": (nn.Linear(3, 2), [2, 3], "node 'linear' .*NaN or inf"),
    "scalar_input": (nn.Identity(), [], "no batch axis"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_constant_is_refused_by_name(name):
    model, shape, message = REFUSED[name]
    if name == "no_number":
        with torch.no_grad():
            model.weight[0, 0] = math.nan
    with pytest.raises(GeometryError, match=rf"(?s)^convnorm: .*({message})") as error:
        lipschitz(model, shape, ord=1)
    assert "\n" not in str(error.value)


def test_arguments_that_ask_for_nothing_are_refused():
    model = nn.Linear(3, 2)
    for ord in (0, 3, "fro"):
        with pytest.raises(GeometryError, match=r"convnorm: ord .* must be 1, 2 or inf"):
            lipschitz(model, [2, 3], ord=ord)
    with pytest.raises(GeometryError, match="convnorm: assume 'nobody' names no node"):
        lipschitz(model, [2, 3], assume={"nobody": 1.0})
    for value in (-1.0, math.nan):
        with pytest.raises(GeometryError, match=r"convnorm: assume 'linear' .* at least 0"):
            lipschitz(model, [2, 3], assume={"linear": value})
    with pytest.raises(GeometryError, match="is traced"):
        lipschitz(trace(model, [2, 3]), [2, 3])


@pytest.mark.parametrize(
    "use",
    [
        lambda x, values, index: x + index,
        lambda x, values, index: torch.maximum(x, index),
        lambda x, values, index: torch.cat([x, index], 1),
        lambda x, values, index: values * index,
        lambda x, values, index: (values, index),
    ],
)
def test_places_of_largest_elements_are_refused(use):
    with pytest.raises(GeometryError, match="of 'max_1', has no known Lipschitz constant"):
        lipschitz(Of(lambda x: use(x, *x.max(1, keepdim=True))), [2, 4])


# What is assumed


def test_a_node_takes_the_constant_that_is_assumed():
    found = lipschitz(Gated(), [2, 3, 4, 4], ord=1, assume={"mul": 7.0})
    assert found.assumed == ("mul",)
    assert found.nodes[-1].how == "assumed"
    gate = lipschitz(Gated().gate, [2, 3, 4, 4], ord=1)
    model = Gated()
    gate = lipschitz(model.gate, [2, 3, 4, 4], ord=1).upper
    assert lipschitz(model, [2, 3, 4, 4], ord=1, assume={"mul": 7.0}).upper == pytest.approx(7 * (1 + gate))


def test_a_module_takes_the_constant_that_is_assumed():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Gated(), nn.ReLU(), Gated())
    conv = lipschitz(model[0], [2, 3, 4, 4], ord=2).upper
    with pytest.raises(GeometryError, match="module '3'"):
        lipschitz(model, [2, 3, 4, 4], assume={"1": 2.0})
    found = lipschitz(model, [2, 3, 4, 4], assume={"1": 2.0, "3": 3.0})
    assert found.upper == pytest.approx(6 * conv)
    assert [node.operation for node in found.nodes] == ["input", "conv2d", "assumed", "relu", "assumed"]


@pytest.mark.parametrize("ord", ORDS)
def test_what_is_assumed_is_a_function_of_the_tensors_that_are_read_each_once(ord):
    square, product = Of(lambda x: x * x), Of(lambda x: x * torch.sigmoid(x))
    assert lipschitz(square, [2, 3], ord=ord, assume={"mul": 2.0}).upper == 2
    both = {1: 1.25, 2: 1.0625**0.5, math.inf: 1.0}[ord]
    assert lipschitz(product, [2, 3], ord=ord, assume={"mul": 2.0}).upper == pytest.approx(2 * both)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = Gated()

    def forward(self, x):
        return self.gate(torch.relu(self.gate(x)))


def test_a_module_used_twice_is_assumed_twice():
    assert lipschitz(Twice(), [2, 3, 4, 4], assume={"gate": 2.0}).upper == 4


class Reusing(nn.Module):
    """A module that overwrites what is read again."""

    def __init__(self):
        super().__init__()
        self.twice = Of(lambda x: x.view(-1, 3).mul_(2))

    def forward(self, x):
        x = torch.relu(x)
        return self.twice(x) + x


def test_a_module_that_is_assumed_may_not_overwrite_what_is_read_again():
    with pytest.raises(GeometryError, match="overwritten in place"):
        lipschitz(Reusing(), [2, 3], assume={"twice": 2.0})


# Results


def test_operations_in_place_are_those_of_their_results():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Hardtanh(inplace=True))
    plain = nn.Sequential(model[0], nn.ReLU(), nn.Hardtanh())
    assert lipschitz(model, [2, 3], ord=1).upper == lipschitz(plain, [2, 3], ord=1).upper

    def residual(x):
        y = torch.tanh(2 * x)
        y += 3 * x
        return y

    assert lipschitz(Of(residual), [2, 3], ord=1).upper == 5
    assert lipschitz(nn.Sequential(nn.ReLU6(inplace=True), nn.ELU(inplace=True)), [2, 3], ord=1).upper == 1


def test_half_precision_weights_are_measured_as_stored():
    model = nn.Linear(8, 4, dtype=torch.bfloat16)
    exact = norm_of(model.weight.detach().double(), math.inf)
    assert lipschitz(model, [2, 8], ord=math.inf).upper == pytest.approx(exact, rel=1e-14)


def test_a_bound_prints_as_a_table():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batch_normed(4), nn.ReLU())
    found = lipschitz(model.float(), [2, 3, 8, 8], ord=1)
    lines = str(found).splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [
        ["node", "operation"], ["input", "input"], ["0", "conv2d"], ["1", "batch_norm"], ["2", "relu"]]  # fmt: skip
    assert "composed" in lines[3]
    assert lines[-1] == repr(found)
    assert float(found) == found.upper == found.nodes[-1].upper


def test_a_bound_is_never_below_zero_or_lost():
    dead = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        dead[0].weight.zero_()
    assert lipschitz(dead, [2, 3]).upper == 0
    assert lipschitz(Of(lambda x: torch.ones(2, 1) + torch.zeros_like(x)), [2, 1]).upper == 0
    assert lipschitz(dead, [2, 3]).log10_upper == -math.inf


@pytest.mark.parametrize("ord", ORDS)
def test_layers_whose_product_is_beyond_float64_are_not_composed(ord):
    large = nn.Sequential(nn.Linear(1, 1, bias=False), *[Of(lambda x: x * 1e200) for _ in range(2)])
    with torch.no_grad():
        large[0].weight.fill_(1)
    assert 0 <= lipschitz(large, [2, 1], ord=ord).log10_upper - 400 < 1e-9


@pytest.mark.parametrize("ord", ORDS)
def test_a_bound_beyond_float64_has_a_logarithm(ord):
    """Of 10^600, twice joined, then of a part of it that is within."""
    parts = [Of(lambda x: torch.relu(x * 1e200)) for _ in range(3)]
    parts.append(Of(lambda x: torch.cat([torch.relu(x), x], 1)))
    large = lipschitz(nn.Sequential(*parts), [2, 3], ord=ord)
    joint = {1: math.log10(2), 2: math.log10(2) / 2, math.inf: 0}[ord]
    assert (large.upper, large.product) == (math.inf, math.inf)
    assert 0 <= large.log10_upper - (600 + joint) < 1e-9
    assert large.log10_upper <= large.log10_product
    assert f"10^{600 + joint:.2f}" in repr(large)
    assert f"10^{600 + joint:.2f}" in str(large).splitlines()[-2]
    assert f"{large.nodes[2].upper:.4g}" in str(large).splitlines()[3]
    parts += [Of(lambda x: torch.relu(x * 1e-200)) for _ in range(3)]
    within = lipschitz(nn.Sequential(*parts), [2, 3], ord=ord)
    assert within.upper == pytest.approx(10**joint, rel=1e-9)
    assert within.log10_upper == pytest.approx(joint, abs=1e-9)


class Turned(nn.Module):
    """An axis swap in place, whose step reads the same input as the layer beside it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(3, 3).double())

    def forward(self, x):
        y = (x * 1.0).clone()
        beside = y @ self.weight
        y.transpose_(1, 2)
        return y + beside


@pytest.mark.parametrize("ord", ORDS)
def test_axes_that_are_swapped_in_place_are_swapped_for_this_branch_alone(ord):
    model = Turned()
    exact = norm_of(matrix_of(model, (3, 3)), ord)
    assert lipschitz(model, [1, 3, 3], ord=ord, rtol=1e-6).upper >= exact * (1 - 1e-12)
