"""The promise: Jacobian norms are lower bounds, and no prediction changes within its radius."""

import math

import pytest
import torch
import torch.nn.functional as F
from as_matrix import ORDS, Of, largest_jacobian, normal
from torch import nn
from torch.nn.utils import parametrize

from convnorm.constrain import constrain
from convnorm.geometry import GeometryError
from convnorm.network import bound, certified_radius, jacobian_norm, lipschitz


@pytest.mark.parametrize("ord", ORDS)
def test_jacobian_norms_are_those_of_explicit_jacobians(ord):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)).double()
    x = normal(3, 2, 6, 6)
    found = jacobian_norm(model, x, ord=ord, steps=200)
    for one, norm in zip(x, found, strict=True):
        exact = largest_jacobian(model, (2, 6, 6), ord, one[None])
        assert exact * (1 - 1e-6) <= norm.item() <= exact


@pytest.mark.parametrize("ord", [1, math.inf])
def test_jacobian_norms_that_are_climbed_are_lower_bounds(ord, monkeypatch):
    model, x = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 40)).double(), normal(4, 30)
    exact = jacobian_norm(model, x, ord=ord)
    monkeypatch.setattr("convnorm.network.jacobian.MOST_EXACT", 10)
    found = jacobian_norm(model, x, ord=ord)
    assert (found <= exact).all()
    assert (found >= 0.75 * exact).all()


@pytest.mark.parametrize("ord", ORDS)
def test_within_its_radius_no_prediction_changes(ord):
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    found = lipschitz(model, [2, 6], ord=ord, rtol=1e-9)
    x = normal(50, 6)
    logits = model(x)
    radius = certified_radius(logits, found)
    assert (radius > 0).all()
    for _ in range(50):
        step = torch.randn_like(x)
        moved = x + step * (radius / torch.linalg.vector_norm(step, ord, dim=1))[:, None]
        assert torch.equal(model(moved).argmax(1), logits.argmax(1))


@pytest.mark.parametrize("ord", ORDS)
def test_a_radius_is_attained(ord):
    """The identity with two classes: the nearest input with another prediction lies at the radius."""
    found = lipschitz(nn.Identity(), [2, 2], ord=ord)
    radius = certified_radius(torch.tensor([3.0, 1.0]), found).item()
    step = {1: [-2.0, 0.0], 2: [-1.0, 1.0], math.inf: [-1.0, 1.0]}[ord]
    assert radius == pytest.approx(torch.linalg.vector_norm(torch.tensor(step), ord).item(), rel=1e-6)


def test_logits_without_a_margin_are_refused():
    found = bound.Bound(2, 1.0, 1.0, 0.0, 0.0, (), ())
    for logits in (torch.ones(3, 1), torch.tensor(1.0), torch.tensor([1.0, math.nan])):
        with pytest.raises(GeometryError, match="convnorm: logits"):
            certified_radius(logits, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ord", [1, 2, math.inf])
def test_the_jacobian_of_a_constrained_layer_is_that_of_its_stored_weight(ord, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(constrain(nn.Linear(6, 5, bias=False), ord=ord, bound=0.5)).to(dtype)
    weight = model[0].weight.detach().double()
    found = jacobian_norm(model, torch.randn(2, 6), ord=ord, steps=300)
    torch.testing.assert_close(found, torch.linalg.matrix_norm(weight, ord=ord).expand(2), rtol=1e-8, atol=0)
    assert (found <= lipschitz(model, [1, 6], ord=ord).upper).all()
    assert parametrize.is_parametrized(model[0], "weight")


def test_jacobians_of_one_number_for_each_sample():
    class Critic(nn.Linear):
        def forward(self, x):
            return super().forward(x).squeeze(1)

    model = Critic(3, 1)
    found = jacobian_norm(model, torch.randn(4, 3), ord=2)
    torch.testing.assert_close(found, model.weight.detach().double().norm().expand(4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("ord", ORDS)
def test_jacobians_of_networks_that_write_into_their_input(ord):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).double()
    x = normal(2, 4).double()
    before = x.clone()
    found = jacobian_norm(model, x, ord=ord)
    assert torch.equal(x, before)
    model[0].inplace = False
    torch.testing.assert_close(found, jacobian_norm(model, x, ord=ord))


class Casting(nn.LayerNorm):
    """Normalises in float32, as CLIP does, and returns what passes half precision."""

    def forward(self, x):
        y = super().forward(x.float()).type_as(x)
        return torch.cat([F.softmax(y, 1, dtype=torch.float32), x.half()], 1)


@pytest.mark.parametrize("ord", ORDS)
def test_jacobians_of_networks_that_cast_are_in_double_precision(ord):
    plain = Of(lambda x: torch.cat([F.softmax(F.layer_norm(x, (4,), eps=1.0), 1), x], 1))
    first, last, x = nn.Linear(4, 4), nn.Linear(8, 4).half(), normal(2, 4)
    middles = Casting(4, eps=1.0), plain
    found, expected = (jacobian_norm(nn.Sequential(first, middle, last), x, ord=ord) for middle in middles)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_jacobians_of_networks_that_return_more_than_tensors():
    x = normal(2, 3)
    found = jacobian_norm(Of(lambda x: {"logits": 3 * x, "loss": None, "heads": [x, 4]}), x, ord=1)
    torch.testing.assert_close(found, torch.full((2,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize(
    "model",
    [
        nn.BatchNorm1d(3, track_running_stats=False),
        Of(lambda x: x - x.mean(0)),
        Of(lambda x: x.flip(0)),
        nn.LSTM(3, 4, num_layers=2, batch_first=True),  # its states have the layers in front
    ],
)
@pytest.mark.parametrize("ord", ORDS)
def test_networks_that_mix_the_samples_of_a_batch_have_no_jacobian_norms(model, ord):
    x = normal(2, 5, 3) if isinstance(model, nn.LSTM) else normal(2, 3)
    with pytest.raises(GeometryError, match="mixes the samples"):
        jacobian_norm(model, x, ord=ord)


@pytest.mark.parametrize("f", [torch.sum, torch.flatten, lambda x: (x, x.mean()), lambda x: x.T])
def test_outputs_without_a_batch_axis_are_refused_by_their_shape(f):
    with pytest.raises(GeometryError, match=r"output of \[.*\] has no batch axis in front, of 2 samples"):
        jacobian_norm(Of(f), normal(2, 3))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.5, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        x = self.encoder(x) + self.encoder(x, mask=mask, is_causal=True)
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize("ord", ORDS)
def test_jacobian_norms_of_attention_are_those_of_explicit_jacobians(ord):
    model, x = Attention().double().eval(), normal(2, 3, 4)
    found = jacobian_norm(model, x, ord=ord, steps=300)
    for one, norm in zip(x, found, strict=True):
        exact = largest_jacobian(model, (3, 4), ord, one[None])
        assert exact * (1 - 1e-6) <= norm.item() <= exact


@pytest.mark.parametrize("f", [lambda x: F.dropout(x, 0.5), lambda x: x + torch.randn_like(x)])
def test_networks_that_draw_random_numbers_have_no_jacobian_norms(f):
    with pytest.raises(GeometryError, match="draws random numbers"):
        jacobian_norm(Of(f), normal(2, 3))


@pytest.mark.parametrize("f", [F.rrelu, lambda x: F.alpha_dropout(x, 0.5), lambda x: F.dropout(x, 0.5, False)])
def test_what_is_random_in_training_only_has_jacobian_norms(f):
    assert jacobian_norm(Of(f), -normal(2, 3).abs()).isfinite().all()


def frozen(x):
    with torch.no_grad():
        return 2 * x


@pytest.mark.parametrize(
    ("f", "constant"),
    [
        (frozen, 2.0),
        (torch.no_grad()(frozen), 2.0),
        (lambda x: 2 * x - x.detach(), 1.0),
        (lambda x: torch.detach(x) + x.data, 2.0),
        (lambda x: (3 * x).detach_(), 3.0),
    ],
)
@pytest.mark.parametrize("ord", ORDS)
def test_parts_that_are_not_to_be_trained_are_parts_of_the_jacobian(ord, f, constant):
    x = normal(2, 3)
    expected = torch.full((2,), constant, dtype=torch.float64)
    torch.testing.assert_close(jacobian_norm(Of(f), x, ord=ord), expected)
    with torch.no_grad():
        torch.testing.assert_close(jacobian_norm(Of(f), x, ord=ord), expected)
    assert torch.is_grad_enabled()


def test_weights_that_are_nan_mix_no_samples():
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, math.nan)
    assert jacobian_norm(model, normal(2, 3)).isnan().all()


def test_a_tie_of_a_constant_network_has_no_radius():
    bound = lipschitz(Of(lambda x: x * 0), [1, 3])
    assert certified_radius(torch.tensor([[1.0, 1.0], [2.0, 1.0]]), bound).tolist() == [0, math.inf]
    bound = lipschitz(nn.Flatten(), [1, 2])
    assert certified_radius(torch.tensor([1e308, -1e308], dtype=torch.float64), bound).isfinite()
