"""The promise: the networks are what Propositions 1, 2 and Theorem 2 claim, and one that is not is found out."""

import math

import pytest
import torch
from oracle import matrix
from torch import nn

import convnorm
from convnorm.uses import observe

pytest.importorskip("train.theory", reason="away from the source tree")

from train.theory import checks, figure, proposition1, proposition2, search, separation, smooth, theorem2


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


def data(generator, count=30, dimensions=2, classes=4, apart=0.1):
    """Points, labels, and an eps that they are 2-eps separable for."""
    points, labels = separation.scattered(count, dimensions, classes, apart=apart, inset=apart / 2, generator=generator)
    return points, labels, 0.4 * separation.closest_pair(points, labels).distance


def in_balls(points, eps, generator):
    """[100, N, n]: on the border of each ball, half of them at corners."""
    signs = torch.rand(100, *points.shape, generator=generator, dtype=torch.float64) * 2 - 1
    signs[:50] = signs[:50].sign()
    return points + eps * signs / signs.abs().amax(-1, keepdim=True)


SETTINGS = [(2, 1, 2), (9, 1, 3), (30, 2, 2), (30, 2, 4), (25, 3, 3), (40, 7, 10), (16, 32, 5)]  # count, n, classes


@pytest.fixture(params=SETTINGS, ids="{0[0]} points in {0[1]}D of {0[2]} classes".format)
def cloud(request, generator):
    count, dimensions, classes = request.param
    if count == 2:
        return torch.tensor([[0.25], [0.75]]), torch.tensor([2, 1]), 0.2
    return data(generator, count, dimensions, classes, apart=0.1 if dimensions > 1 else 0.03)


# Theorem 2


def test_the_robust_classifier_is_the_formula_everywhere(cloud, generator):
    points, labels, eps = cloud
    network = theorem2.robust_classifier(points, labels, eps)
    x = torch.rand(500, points.shape[1], generator=generator, dtype=torch.float64) * 2 - 0.5
    apart = (x[:, None] - points).abs().amax(2)
    expected = torch.ones(500, dtype=torch.float64)
    for c in range(1, int(labels.max())):
        t = apart[:, labels <= c].amin(1) - apart[:, labels > c].amin(1)
        expected += (t / (2 * network.margin) + 0.5).clamp(0, 1)
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-11)


def test_the_robust_classifier_is_the_label_on_every_ball(cloud, generator):
    points, labels, eps = cloud
    network = theorem2.robust_classifier(points, labels, eps)
    moved = in_balls(points, eps, generator)
    torch.testing.assert_close(network(moved.flatten(0, 1)), labels.double().repeat(100), rtol=0, atol=1e-11)
    assert search.worst(network, points, labels, eps, generator=generator) < 1e-11
    for bound in theorem2.certified(network, points, labels, eps):
        torch.testing.assert_close(bound, labels.double(), rtol=0, atol=1e-11)


def test_it_is_a_network_of_layers_that_convnorm_measures(cloud):
    points, labels, eps = cloud
    network = theorem2.robust_classifier(points, labels, eps)
    layers = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten, nn.Unflatten)
    leaves = [module for module in network.modules() if not list(module.children())]
    assert all(isinstance(module, layers) for module in leaves)
    uses = observe(network, [1, points.shape[1]])
    assert len(uses) == sum(isinstance(module, layers[:3]) for module in leaves)
    bound = math.prod(convnorm.norms(use.module, use.in_shape).linf.item() for use in uses)
    assert bound >= 1 / network.margin  # the product of the norms; two classes already have this Lipschitz constant


def test_images_as_large_as_cifar_ones_have_their_robust_classifier(generator):
    points = torch.rand(10, 3, 32, 32, generator=generator)
    labels = torch.arange(10) % 5 + 1
    network = theorem2.robust_classifier(points.flatten(1), labels, 8 / 255)
    moves = torch.rand(points.shape, generator=generator).sub(0.5).sign() * 8 / 255
    with torch.no_grad():
        torch.testing.assert_close(network(points + moves), labels.double())


def test_the_certificate_holds_what_is_found_beyond_the_separation(generator):
    points, labels, eps = data(generator)
    network = theorem2.robust_classifier(points, labels, eps)
    lower, upper = theorem2.certified(network, points, labels, 3 * eps)
    output = network(in_balls(points, 3 * eps, generator).flatten(0, 1)).view(100, -1)
    assert (lower <= output + 1e-9).all()
    assert (output <= upper + 1e-9).all()
    assert ((lower - labels).abs() >= 0.5).any() or ((upper - labels).abs() >= 0.5).any()


def test_points_that_are_not_separable_are_named():
    points = torch.tensor([[0.0, 0.0], [0.9, 0.1], [0.5, 0.75], [0.25, 0.5]])
    labels = torch.tensor([1, 2, 2, 1])
    with pytest.raises(ValueError, match=r"points 2 and 3, of classes 2 and 1, are 0.25 apart.* than 2 eps = 0.25"):
        theorem2.robust_classifier(points, labels, 0.125)
    theorem2.robust_classifier(points, labels, 0.1249)


@pytest.mark.parametrize(
    ("points", "labels", "eps", "message"),
    [
        ([[0.0], [math.nan]], [1, 2], 0.1, r"points of shape \[2, 1\] must be finite"),
        ([0.0, 1.0], [1, 2], 0.1, r"points of shape \[2\]"),
        ([[0.0], [1.0]], [1], 0.1, r"labels of shape \[1\] .* 2 points"),
        ([[0.0], [1.0]], [1.0, 2.0], 0.1, "float32 must be integers"),
        ([[0.0], [1.0]], [1, 3], 0.1, r"labels \[1, 3\] must be 1 to"),
        ([[0.0], [1.0]], [0, 1], 0.1, r"labels \[0, 1\] must be 1 to"),
        ([[0.0], [1.0]], [1, 1], 0.1, r"labels \[1\] must be 1 to .* at least 2"),
        ([[0.0], [1.0]], [1, 2], -0.1, "eps is -0.1"),
        ([[0.0], [1.0]], [1, 2], math.inf, "eps is inf"),
        ([[0.0], [1.0]], [1, 2], math.nan, "eps is nan"),
    ],
)
def test_what_is_no_data_is_refused(points, labels, eps, message):
    with pytest.raises(ValueError, match=message):
        theorem2.robust_classifier(torch.tensor(points), torch.tensor(labels), eps)


def test_scattered_classes_are_apart(generator):
    points, labels = separation.scattered(30, 3, 5, apart=0.2, inset=0.1, generator=generator)
    assert separation.closest_pair(points, labels).distance >= 0.2
    assert points.min() >= 0.1
    assert points.max() <= 0.9
    assert torch.equal(points.float().double(), points)


def test_softplus_comes_as_near_as_is_asked(generator):
    points, labels, eps = data(generator, count=12)
    network = theorem2.robust_classifier(points, labels, eps)
    x = torch.rand(2000, 2, generator=generator, dtype=torch.float64)
    for error in (0.4, 1e-3):
        smoothed = smooth.smoothed(network, [1, 2], error)
        assert not any(isinstance(module, nn.ReLU) for module in smoothed.modules())
        assert 0 < (smoothed(x) - network(x)).abs().max() <= error
        assert search.worst(smoothed, points, labels, eps, generator=generator) <= error
    with pytest.raises(ValueError, match="error is 0"):
        smooth.smoothed(network, [1, 2], 0)


def test_the_bound_on_softplus_is_the_errors_of_all_layers():
    """Of relu(a x) b, worked by hand: log(2) / beta of one ReLU, times |b|; beta is chosen to make that the error."""
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    nn.init.constant_(network[0].weight, 7)
    nn.init.constant_(network[2].weight, -3)
    smoothed = smooth.smoothed(network, [1, 1], 0.1)
    assert smoothed[1].beta == pytest.approx(math.log(2) * 3 / 0.1)
    assert smoothed(torch.zeros(1, 1).double()).item() == pytest.approx(-0.1)  # where softplus is off the most


# Proposition 2


@pytest.mark.parametrize("xi", [1e-3, 10, 1e3, 1e6])
def test_a_robust_classifier_is_as_steep_as_asked(cloud, generator, xi):
    points, labels, eps = cloud
    network = proposition2.steep_classifier(points, labels, eps, xi)
    ends = proposition2.steepest_inputs(network, points, labels)
    climb = network(ends).diff().abs().item()
    for p in (1, 1.5, 2, math.inf):
        assert climb / torch.linalg.vector_norm(ends[1] - ends[0], p).item() >= xi
    moved = in_balls(points, eps, generator)
    torch.testing.assert_close(network(moved.flatten(0, 1)), labels.double().repeat(100), rtol=0, atol=1e-8)
    assert network.margin <= theorem2.robust_classifier(points, labels, eps).margin


@pytest.mark.parametrize(
    ("xi", "message"), [(0, "xi is 0"), (-1, "xi is -1"), (math.nan, "xi is nan"), (1e12, "xi is 1e.12: .* float64")]
)
def test_a_steepness_that_is_none_is_refused(xi, message):
    with pytest.raises(ValueError, match=message):
        proposition2.steep_classifier(torch.tensor([[0.0], [1.0]]), torch.tensor([1, 2]), 0.1, xi)


# Proposition 1

BUILT = {
    "fully connected": (
        lambda norm, depth, generator: proposition1.fully_connected(norm, depth, generator=generator),
        (2,),
    ),
    "convolutional": (
        lambda norm, depth, generator: proposition1.convolutional(norm, depth, image=(2, 5, 4), generator=generator),
        (2, 5, 4),
    ),
}


@pytest.fixture(params=BUILT)
def built(request):
    return BUILT[request.param]


@pytest.mark.parametrize(("norm", "depth"), [(0.5, 2), (1e3, 3), (1e8, 6), (1e3, 20)])
def test_norms_are_large_and_the_output_is_zero(built, generator, norm, depth):
    build, shape = built
    network = build(norm, depth, generator)
    uses = observe(network, [1, *shape])
    assert len(uses) == depth
    for use in uses if depth < 20 else uses[-1:]:
        module = use.module
        explicit = matrix(module.weight, getattr(module, "stride", ()), getattr(module, "padding", ()), use.in_shape)
        for p in (1, 2, math.inf):
            assert torch.linalg.matrix_norm(explicit, p) >= norm
    x = torch.randn(100, *shape, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-9, 9, 100, dtype=torch.float64).view(-1, *[1] * len(shape))
    assert (network(x) == 0).all()
    assert proposition1.annuls(network)
    *hidden, last = proposition1.stretches(network, x, x.flip(0))
    assert last == 0
    assert min(hidden) > 0


def test_layer_norms_are_those_of_the_matrices(built, generator):
    build, shape = built
    network = build(10.0, 3, generator)
    for use, (l1, l2, linf) in zip(
        observe(network, [1, *shape]), proposition1.layer_norms(network, [1, *shape]), strict=True
    ):
        module = use.module
        explicit = matrix(module.weight, getattr(module, "stride", ()), getattr(module, "padding", ()), use.in_shape)
        assert l1 == pytest.approx(torch.linalg.matrix_norm(explicit, 1).item())
        assert l2 == pytest.approx(torch.linalg.matrix_norm(explicit, 2).item(), rel=1e-2)
        assert linf == pytest.approx(torch.linalg.matrix_norm(explicit, math.inf).item())


def test_a_network_that_is_not_constant_is_found_out(built, generator):
    build, shape = built
    network = build(1e3, 4, generator)
    x = torch.randn(50, *shape, generator=generator, dtype=torch.float64)
    assert proposition1.highest(network, x) <= 0
    with torch.no_grad():
        network[-2].weight.flatten()[:20].abs_()
    assert not proposition1.annuls(network)
    assert proposition1.highest(network, x) > 0
    assert proposition1.stretches(network, x, x.flip(0))[-1] > 0


@pytest.mark.parametrize(
    ("norm", "depth", "message"),
    [
        (0, 3, "norm is 0"),
        (math.inf, 3, "norm is inf"),
        (math.nan, 3, "norm is nan"),
        (10, 1, "depth is 1"),
        (1e60, 3, r"norm 1e\+60 in each of 3 layers"),
    ],
)
def test_norms_and_depths_that_are_none_are_refused(built, generator, norm, depth, message):
    with pytest.raises(ValueError, match=message):
        built[0](norm, depth, generator)


# the attacks and the whole


class Quarters(nn.Module):
    """The first coordinate decides, in four equal parts: robust for no point near their borders."""

    def forward(self, x):
        return (4 * x.flatten(1)[:, 0]).clamp(0.1, 3.9) + 0.5


def test_attacks_find_nothing_but_in_classifiers_that_are_not_robust(generator):
    pytest.importorskip("pyautoattack")
    points, labels, eps = data(generator)
    network = theorem2.robust_classifier(points, labels, eps)
    for logits in (search.Logits(network, 4), search.Margins(network)):
        right = logits(points.float()).argmax(1) + 1
        assert torch.equal(right, labels)
        assert search.survivors(logits, points, labels, eps, iterations=5) == len(points)
        assert search.survivors(logits, points, labels, 3 * eps, iterations=5) < len(points)
    x = ((torch.arange(24) + 0.5) / 24).repeat(2, 1).T.contiguous()
    labels = Quarters()(x).round().long()
    assert search.survivors(search.Logits(Quarters(), 4), x, labels, 0.001, iterations=5) == 24
    assert 0 < search.survivors(search.Logits(Quarters(), 4), x, labels, 0.06, iterations=5) < 24
    assert search.worst(Quarters(), x, labels, 0.06, generator=generator) >= 0.5


def test_the_least_margin_is_met_and_not_passed(generator):
    points, labels, eps = data(generator)
    network = theorem2.robust_classifier(points, labels, eps)
    margin = search.least_margin(network, points, labels, eps, generator=generator)
    assert margin == pytest.approx(network.margin, rel=0.05)
    assert margin >= network.margin * (1 - 1e-4)
    assert search.least_margin(network, points, labels, 3 * eps, generator=generator) < 0


def test_all_of_it_is_checked_drawn_and_written(tmp_path, monkeypatch):
    pytest.importorskip("pyautoattack")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figure, "PIXELS", 40)
    found = checks.run(tmp_path / "new" / "folder", eps=0.03, xi=50, norm=20, iterations=3)
    assert all(check.holds for check in found), [check for check in found if not check.holds]
    assert {check.name.partition(",")[0] for check in found} == {"Proposition 1", "Theorem 2", "Proposition 2"}
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    pictures = ("theory", "proposition1", "theorem2", "proposition2", "segment")
    assert names == {"theory.md", *(f"{name}.{kind}" for name in pictures for kind in ("png", "svg"))}
    text = (tmp_path / "new" / "folder" / "theory.md").read_text(encoding="utf-8")
    assert text.count("| yes |") == len(found)


def test_checks_that_fail_say_so(generator):
    points, labels, eps = data(generator)
    network = theorem2.robust_classifier(points, labels, eps)
    beyond = 3 * eps
    assert not checks.certificate("", network, points, labels, beyond).holds
    assert not checks.searched("", network, points, labels, beyond, generator).holds
    failed = checks.Check("name", "claim", "measured", False)
    assert checks.table([failed]).splitlines()[-1] == "| name | claim | measured | **no** |"


@pytest.mark.parametrize(("eps", "message"), [(0, "eps is 0"), (0.7, "eps is 0.7"), (0.3, "eps is 0.3: 4 classes")])
def test_an_eps_without_room_is_refused(tmp_path, eps, message):
    with pytest.raises(ValueError, match=message):
        checks.run(tmp_path / "out", eps=eps)
    assert not (tmp_path / "out").exists()
