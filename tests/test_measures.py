"""The promise: stability, local Lipschitz constants, margins and spectra are what their definitions say."""

import itertools

import pytest
import torch
from torch import nn

from convnorm.uses import observe

measures = pytest.importorskip("train.measures", reason="away from the source tree")


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(weight):
    """The classifier ``weight @ x.flatten()``."""
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return nn.Sequential(nn.Flatten(), layer).eval()


def test_robust_is_right_and_stable():
    weight = torch.randn(4, 12, generator=drawn())
    model, x = linear(weight), torch.rand(200, 3, 2, 2, generator=drawn(1))
    y = torch.randint(4, (200,), generator=drawn(2))
    seen = []

    def withstands(x, labels, eps=0.01):
        """Exactly, for pixels that may leave [0, 1]."""
        seen.append(len(x))
        logits = model(x)
        far = (weight[labels, None] - weight).abs().sum(2)  # how much a difference of logits can fall by eps
        fall = logits.gather(1, labels[:, None]) - logits - eps * far
        return (fall.scatter(1, labels[:, None], 1) > 0).all(1)

    predicted = model(x).argmax(1)
    robust, stable = measures.robust_and_stable(withstands, x, y, predicted)
    right = predicted == y
    assert torch.equal(stable, withstands(x, predicted))
    assert torch.equal(robust, right & stable)
    assert robust.float().mean() >= right.float().mean() + stable.float().mean() - 1 - 1e-6
    assert 0 < robust.sum() < right.sum()
    assert 0 < (stable & ~right).sum() < (~right).sum()
    assert seen == [200, 200 - right.sum(), 200]  # no image is attacked twice

    robust, stable = measures.robust_and_stable(withstands, x[right], y[right], predicted[right])
    assert torch.equal(robust, stable)


@pytest.mark.parametrize("eps", [1 / 255, 0.1, 0.9])
def test_the_local_lipschitz_constant_of_a_linear_map_is_its_norm(eps):
    """From linf to l1, max over signs s of |weight s|_1; of rank one, u v^T, it is |u|_1 |v|_1."""
    x = 0.3 + 0.4 * torch.rand(50, 3, 2, 2, generator=drawn())
    if eps > 0.5:  # all pixels can go as far as 0 or 1, and not as far as eps
        x.fill_(0.5)
    u, v = torch.randn(4, generator=drawn(1)), torch.randn(12, generator=drawn(2))
    found = measures.local_lipschitz(linear(torch.outer(u, v)), x, eps=eps, generator=drawn())
    torch.testing.assert_close(found, (u.abs().sum() * v.abs().sum()).expand(50), rtol=1e-4, atol=0)


def test_the_local_lipschitz_constant_is_a_lower_bound():
    """Of linear maps, whose ascent may end in a corner that is not the best."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8))).T
    x, ratios = 0.4 + 0.2 * torch.rand(20, 2, 2, 2, generator=drawn()), []
    for seed in range(10):
        weight = torch.randn(4, 8, generator=drawn(seed))
        norm = (weight @ signs).abs().sum(0).max()
        ratios += (measures.local_lipschitz(linear(weight), x, eps=0.03, generator=drawn(seed)) / norm).tolist()
    assert max(ratios) <= 1 + 1e-4
    assert sum(ratio > 1 - 1e-4 for ratio in ratios) > len(ratios) / 2


def test_the_local_lipschitz_constant_of_a_constant_is_zero():
    class Constant(nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1) + torch.arange(12.0)

    x = torch.rand(3, 3, 2, 2, generator=drawn())
    assert measures.local_lipschitz(Constant(), x, eps=0.1, generator=drawn()).tolist() == [0, 0, 0]
    black = torch.zeros(1, 1, 1, 1)  # from where the start may not move at all
    for seed in range(8):
        assert measures.local_lipschitz(linear(torch.zeros(2, 1)), black, eps=0.1, generator=drawn(seed)) == 0


def test_margins_and_confidences_worked_by_hand():
    logits = torch.tensor([[2.0, 2.0, 0.0], [1.0, 4.0, 3.5], [0.0, 0.0, 0.0]]).log()
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [2 / 17, 8 / 17, 7 / 17], [1 / 3, 1 / 3, 1 / 3]])
    logits[2] = 5
    y = torch.tensor([0, 2, 1])
    torch.testing.assert_close(measures.margins(probabilities, y), torch.tensor([0, -1 / 17, 0]))
    torch.testing.assert_close(measures.margins(logits, y)[:2], torch.tensor([2 / 2, 3.5 / 4]).log())
    torch.testing.assert_close(measures.margins(-probabilities, y)[1], torch.tensor(-5 / 17))
    torch.testing.assert_close(measures.confidences(logits), torch.tensor([0.5, 8 / 17, 1 / 3]))


def matrix_of(layer, shape):
    inputs = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
    return layer.double()(inputs).flatten(1).T.detach()


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2}, {"stride": 2, "groups": 2}])
@pytest.mark.parametrize("largest", [10**6, 1])
def test_spectra_are_those_of_the_matrix(options, largest):
    torch.manual_seed(0)
    own = nn.Conv2d(4, 6, 3, padding=1, bias=False, **options)
    [use] = observe(own, [1, 4, 6, 6])
    found = measures.spectrum(use, largest)
    assert found.circular == (largest == 1)
    mode = "circular" if found.circular else "zeros"
    as_found = nn.Conv2d(4, 6, 3, padding=1, bias=False, padding_mode=mode, **options)
    as_found.weight = own.weight
    expected = torch.linalg.svdvals(matrix_of(as_found, (4, 6, 6)))
    torch.testing.assert_close(found.values.double(), expected, rtol=1e-9, atol=1e-9)


def test_spectra_of_groups_are_found_group_by_group():
    [use] = observe(nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), [1, 4, 6, 6])
    assert 103**3 < 2 * (72 * 108 * 72) < 104**3
    assert measures.spectrum(use, largest=103).circular
    assert not measures.spectrum(use, largest=104).circular


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.Linear(6, 5, bias=False)])
def test_spectra_of_one_tap_are_always_exact(layer):
    shape = (4, 6, 6) if isinstance(layer, nn.Conv2d) else (6,)
    [use] = observe(layer, [1, *shape])
    found = measures.spectrum(use, largest=1)
    assert not found.circular
    expected = torch.linalg.svdvals(matrix_of(layer, shape))
    torch.testing.assert_close(found.values.double(), expected, rtol=1e-9, atol=1e-9)


def test_a_layer_without_a_circle_of_its_size_has_no_spectrum():
    [use] = observe(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), [1, 4, 5, 5])
    assert len(measures.spectrum(use, largest=1).values) == 0
    assert len(measures.spectrum(use).values) == 6 * 3 * 3
