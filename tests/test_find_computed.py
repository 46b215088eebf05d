"""The promise: a report has a row for every weight that a model computes from what it holds, and the row is that of the
map which truly runs; a weight that depends on more makes no row, and is named.
"""

import pytest
import torch
import torch.nn.functional as F
from as_matrix import is_map_of, matrix_of, norm_of
from torch import nn
from torch.nn.utils import parametrize

from convnorm import report

SHAPE = [1, 3, 6, 6]


class Computing(nn.Conv2d):
    """A convolution whose weight is ``compute(self, x)``."""

    def __init__(self, compute, *args, **options):
        super().__init__(*args, **options)
        self.compute = compute
        self.register_buffer("mask", (torch.arange(3) != 1).float())
        self.register_buffer("mean", torch.zeros(self.out_channels))
        self.register_buffer("var", torch.ones(self.out_channels))
        self.gain = nn.Parameter(torch.linspace(0.5, 2, self.out_channels))

    def forward(self, x):
        return self._conv_forward(x, self.compute(self, x), self.bias)


def rows_of(weight):
    """[channels, everything else]"""
    return weight.flatten(1)


def standardised(conv, x):
    """As in BiT's ResNetV2."""
    rows = F.batch_norm(conv.weight.reshape(1, len(conv.weight), -1), None, None, training=True, momentum=0.0)
    return rows.reshape_as(conv.weight)


def scaled(conv, x):
    """As in NFNets."""
    rows = conv.weight.reshape(1, len(conv.weight), -1)
    return F.batch_norm(rows, None, None, conv.gain * 0.3, training=True, momentum=0.0).reshape_as(conv.weight)


def by_hand(conv, x):
    variance, mean = torch.var_mean(conv.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
    return (conv.weight - mean) / torch.sqrt(variance + 1e-5)


def counting(conv, x):
    """Would move the model's statistics, if it ran on them."""
    rows = conv.weight.reshape(1, len(conv.weight), -1)
    return F.batch_norm(rows, conv.mean, conv.var, training=True).reshape_as(conv.weight)


def divided(conv, x):
    """By a power iteration, whose vectors are used twice in each step."""
    matrix = rows_of(conv.weight)
    v = F.normalize(torch.ones(matrix.shape[1], dtype=matrix.dtype), dim=0)
    for _ in range(40):
        u = F.linear(v, matrix)
        v = F.normalize(F.linear(u / u.norm(), matrix.T) + 0 * v, dim=0)
    return conv.weight / F.linear(v, matrix).norm()


def constrained(conv, x):
    """As layers with a constraint do that they keep, too."""
    conv.weight.data = torch.renorm(conv.weight.data, p=2, dim=0, maxnorm=0.1)
    return conv.weight


def orthogonal(conv, x):
    """As it is the second result that is used."""
    _, _, v = torch.linalg.svd(rows_of(conv.weight), full_matrices=False)
    return v.reshape_as(conv.weight)


COMPUTED = {
    "standardised": standardised,
    "scaled": scaled,
    "by_hand": by_hand,
    "counting": counting,
    "divided": divided,
    "orthogonal": orthogonal,
    "constrained": constrained,
    "masked": lambda conv, x: conv.weight * conv.mask,
    "as_the_input": lambda conv, x: (conv.weight + 1).to(x.dtype),
    "data": lambda conv, x: conv.weight.data * 3,
    "a_part": lambda conv, x: torch.cat([conv.weight[:2], conv.weight[1:3]]),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_computed_from_parameters_is_that_of_the_true_map(name):
    torch.manual_seed(0)
    model = nn.Sequential(Computing(COMPUTED[name], 3, 4, 3, stride=2, padding=1)).double().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = report(model, SHAPE, l2=False)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    (row,) = found.rows
    assert (row.name, row.kind, row.in_shape, row.calls) == ("0", "Computing", (6, 6), 1)
    assert found.unmeasured == ()
    assert is_map_of(row, model, SHAPE[1:])  # last: it runs the model


def test_a_batch_norm_after_it_is_folded():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(Computing(standardised, 3, 4, 3), norm).double()
    (row,) = report(model, SHAPE, l2=False).rows
    assert row.batch_norm == "1"
    assert row.folded.l1 == pytest.approx(norm_of(matrix_of(model, SHAPE[1:]), 1), rel=1e-9)


def test_its_l2_norm_is_bracketed():
    model = nn.Sequential(Computing(scaled, 3, 4, 3, padding=1)).double()
    (row,) = report(model, SHAPE).rows
    true = norm_of(matrix_of(model, SHAPE[1:]), 2)
    assert row.norms.l2_lower <= true * (1 + 1e-12)
    assert true <= row.norms.l2_upper * (1 + 1e-12)


def test_parametrized_weights_are_computed_once_more():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = nn.Sequential(Computing(standardised, 3, 4, 3)).double()
    parametrize.register_parametrization(model[0], "weight", Doubled())
    (row,) = report(model, SHAPE, l2=False).rows
    assert is_map_of(row, model, SHAPE[1:])


# --- what is random, what depends on the input, and what was written -----------------------------------------------


def conditional(conv, x):
    """A mixture of experts' kernels, weighed by the input."""
    share = torch.sigmoid(x.mean((2, 3))) @ torch.ones(3, 1, dtype=x.dtype)
    return conv.weight * share.reshape(-1, 1, 1, 1)


def subtracted(conv, x):
    weight = conv.weight + 0
    weight -= weight.mean()
    return weight


def assigned_and_written(conv, x):
    conv.weight.data = conv.weight.data * 2
    conv.weight.mul_(3)
    return conv.weight


def assigned_by_the_input(conv, x):
    conv.weight.data = conv.weight.data * x.mean()
    return conv.weight


def computed_and_assigned(conv, x):
    weight = conv.weight + 0
    weight.data = weight * 2
    return weight


def set_to_zero(conv, x):
    weight = conv.weight + 0
    weight[:, 0] = 0
    return weight


def by_a_view(conv, x):
    weight = conv.weight + 0
    weight.flatten()[:7].mul_(2)
    return weight


def by_data(conv, x):
    """Which PyTorch does not count as written."""
    weight = conv.weight + 0
    weight.data.mul_(2)
    return weight


def before_it_was_written(conv, x):
    weight = conv.weight + 0
    twice = weight * 2
    weight.add_(1)
    return weight + twice


def into(conv, x):
    weight = torch.empty_like(conv.weight)
    torch.mul(conv.weight, 2, out=weight)
    return weight


def without_versions(conv, x):
    with torch.inference_mode():
        return (conv.weight + 0).mul_(2)


def by_a_buffer(conv, x):
    conv.mean.copy_(x.mean((0, 2, 3))[:1])
    return conv.weight * conv.mean.reshape(-1, 1, 1, 1)


def passed_by(conv, x):
    """Through what PyTorch does not show."""
    return Hidden.apply(conv.weight, x)


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, x):
        return weight * x.mean()


UNMEASURED = {
    "conditional": conditional,
    "normalised": lambda conv, x: conv.weight / x.norm(),
    "passed_by": passed_by,
    "by_a_buffer": by_a_buffer,
    "random": lambda conv, x: conv.weight + torch.randn_like(conv.weight),
    "dropped": lambda conv, x: F.dropout(conv.weight, 0.5),
    "subtracted": subtracted,
    "assigned_and_written": assigned_and_written,
    "assigned_by_the_input": assigned_by_the_input,
    "computed_and_assigned": computed_and_assigned,
    "set_to_zero": set_to_zero,
    "by_a_view": by_a_view,
    "by_data": by_data,
    "before_it_was_written": before_it_was_written,
    "into": into,
    "without_versions": without_versions,
}


@pytest.mark.parametrize("name", UNMEASURED)
def test_a_weight_that_is_not_a_function_of_parameters_is_named(name):
    model = nn.Sequential(Computing(UNMEASURED[name], 3, 4, 3), nn.Conv2d(4, 4, 1))
    found = report(model, SHAPE, l2=False)
    assert [row.name for row in found.rows] == ["1"]
    assert found.unmeasured == ("0.weight",)
