"""The promise: attacks stay within their bounds, find what there is to find, and change nothing but the image."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

attacks = pytest.importorskip("train.attacks", reason="away from the source tree")

ROUNDING = 1e-7


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(weight, bias=None):
    """The classifier ``weight @ x.flatten() + bias``."""
    layer = nn.Linear(*reversed(weight.shape))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return nn.Sequential(nn.Flatten(), layer).eval()


def network(classes=5, channels=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, classes)
    ).eval()


def images(count, seed=0):
    """Of 3x4x4; a third of the pixels are 0 or 1."""
    return (3 * torch.rand(count, 3, 4, 4, generator=drawn(seed)) - 1).clamp(0, 1)


def labelled(model, x):
    """The model's own labels, but for every fifth image."""
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    y[::5] = (y[::5] + 1) % logits.shape[1]
    return y


def test_pgd_takes_the_steps_worked_by_hand():
    model = linear(torch.tensor([[1.0, -1.0, 0.0, 2.0]]))
    x = torch.tensor([[0.5, 0.12, 0.3, 0.9], [0.95, 0.5, 1.0, 0.0]])
    size = {"eps": 0.15, "step": 0.1, "noise": 0.0, "generator": None}
    once = torch.tensor([[0.6, 0.02, 0.3, 1.0], [1.0, 0.4, 1.0, 0.1]])
    twice = torch.tensor([[0.65, 0.0, 0.3, 1.0], [1.0, 0.35, 1.0, 0.15]])
    for steps, expected in ((0, x), (1, once), (2, twice), (9, twice)):
        torch.testing.assert_close(attacks.pgd(model, x, torch.sum, steps=steps, **size), expected)


def test_pgd_equals_a_step_by_step_computation():
    """Of softmax regression, whose gradient of the cross entropy is weight^T (probabilities - one-hot)."""
    rng = np.random.default_rng(0)
    weight, y = rng.normal(size=(5, 48)), rng.integers(5, size=7)
    x = images(7).double()
    model = linear(torch.from_numpy(weight)).double()
    size = {"eps": 0.05, "step": 0.013, "steps": 6, "noise": 0.02}
    found = attacks.pgd(model, x, lambda z: F.cross_entropy(z, torch.from_numpy(y)), **size, generator=drawn(3))

    noise = torch.randn(x.shape, generator=drawn(3), dtype=torch.float64).numpy().reshape(7, 48)
    start = x.numpy().reshape(7, 48)
    point = start + 0.02 * noise
    for _ in range(6):
        powers = np.exp(point @ weight.T)
        gradient = (powers / powers.sum(1, keepdims=True) - np.eye(5)[y]) @ weight
        point = point + 0.013 * np.sign(gradient)
        point = np.clip(np.minimum(np.maximum(point, start - 0.05), start + 0.05), 0, 1)
    np.testing.assert_allclose(found.numpy().reshape(7, 48), point, atol=1e-12)


def test_pgd_stays_in_the_ball_and_among_the_colours():
    model, rng = network(), np.random.default_rng(0)
    for trial in range(40):
        x = images(3, trial)
        y = torch.from_numpy(rng.integers(5, size=3))
        eps = float(rng.choice([0, 1 / 255, 0.031, 0.3, 1.0]) * rng.uniform(0.5, 1))
        size = {"eps": eps, "step": float(rng.uniform(0, 2 * eps + 0.01)), "noise": float(rng.choice([0, 0.001, 0.5]))}
        steps = int(rng.integers(4))
        found = attacks.pgd(model, x, lambda z, y=y: F.cross_entropy(z, y), steps=steps, **size, generator=drawn(trial))
        assert (found - x).abs().max() <= eps + ROUNDING
        assert found.min() >= 0
        assert found.max() <= 1
        assert found.isfinite().all()


def test_pgd_makes_the_loss_larger():
    model, x = network(), images(50)
    y = labelled(model, x)

    def losses(x):
        return F.cross_entropy(model(x), y, reduction="none")

    size = {"eps": 0.03, "step": 0.007, "noise": 0.001}
    found = [
        attacks.pgd(model, x, lambda z: F.cross_entropy(z, y), steps=n, **size, generator=drawn()) for n in (1, 10)
    ]
    assert (losses(found[0]) > losses(x)).all()
    assert (losses(found[1]) > losses(found[0])).all()


@pytest.mark.parametrize("training", [False, True])
def test_pgd_changes_nothing_but_the_image(training):
    model, x = network().train(training), images(4)
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    before, kept = x.clone(), [parameter.detach().clone() for parameter in model.parameters()]
    state = torch.get_rng_state()

    def loss(logits):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        return logits.square().sum()

    found = attacks.pgd(model, x, loss, eps=0.1, step=0.05, steps=2, noise=0.01, generator=drawn())
    assert torch.equal(x, before)
    assert not found.requires_grad
    assert not torch.equal(found, x)
    assert all(torch.equal(*pair) for pair in zip(kept, model.parameters(), strict=True))
    assert [module.training for module in model.modules()] == [training] * 6
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert trained == {name: name != "0.weight" for name in trained}
    assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))
    assert model[1].weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_fails_leaves_the_parameters_trainable():
    model = network()
    with pytest.raises(ZeroDivisionError):
        attacks.pgd(model, images(1), lambda z: 1 / 0, eps=0.1, step=0.1, steps=1, noise=0, generator=None)
    assert all(parameter.requires_grad for parameter in model.parameters())


# AutoAttack


@pytest.fixture
def pyautoattack():
    return pytest.importorskip("pyautoattack", reason='pip install "convnorm[train]"')


SIZE = {"attacks": attacks.STANDARD, "iterations": 10, "batch": 7, "seed": 0}


@pytest.fixture(scope="module")
def known():
    """A linear classifier, images with labels, and of each image the least eps at which it is not robust (0: wrong).

    (w_y - w_j) x + b_y - b_j falls by up to eps |w_y - w_j|_1 where no pixel is near 0 or 1, which these are not.
    """
    rng = drawn(5)
    weight, bias = torch.randn(6, 48, generator=rng), torch.randn(6, generator=rng) / 4
    x = 0.4 + 0.2 * torch.rand(60, 3, 4, 4, generator=rng)
    model = linear(weight, bias)
    y = labelled(model, x)
    with torch.no_grad():
        logits = model(x)
    radii = []
    for image, label in zip(logits, y.tolist(), strict=True):
        others = [j for j in range(6) if j != label]
        radii.append(min(float((image[label] - image[j]) / (weight[label] - weight[j]).abs().sum()) for j in others))
    return model, x, y, torch.tensor(radii).clamp(min=0)


@pytest.mark.parametrize("eps", [0.001, 0.005, 0.01])
def test_autoattack_finds_the_robust_images_of_a_linear_classifier(pyautoattack, known, eps):
    model, x, y, radii = known
    away = (radii / eps - 1).abs() > 0.05
    x, y, radii = x[away], y[away], radii[away]
    expected = radii > eps
    assert 5 < expected.sum() < len(x) - 5
    assert torch.equal(attacks.autoattack(model, x, y, eps=eps, **SIZE), expected)
    for name in attacks.STANDARD:  # by itself it may find fewer, and never more
        alone = attacks.autoattack(model, x, y, eps=eps, **SIZE | {"attacks": (name,)})
        assert (alone >= expected).all(), name
        assert (alone & ~expected).sum() <= 6, name
        assert not alone[radii == 0].any(), name


def test_autoattack_is_the_librarys_standard_evaluation(pyautoattack):
    from pyautoattack.autoattack import AutoAttack

    model, x = network(4), images(9)
    y = labelled(model, x)
    theirs = AutoAttack(model, eps=0.1, seed=0)
    assert theirs.attacks_to_run == list(attacks.STANDARD)
    objects = (theirs.apgd, theirs.apgd_targeted, theirs.fab, theirs.square)
    for name, their in zip(attacks.STANDARD, objects, strict=True):
        mine = attacks._attack(name, model, 0.1, 100, 10, 0)
        settings = set(vars(mine)) - {"logger", "device"} - ({"targeted"} if name == "fab-t" else set())  # set later
        assert {key: vars(mine)[key] for key in settings} == {key: vars(their)[key] for key in settings}, name

    theirs.attacks_to_run = list(attacks.STANDARD[:3])  # Square would take most of the time
    theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 3  # as many as there are
    attacked, _ = theirs.run_standard_evaluation(x, y, batch_size=4)
    found = attacks.autoattack(model, x, y, eps=0.1, attacks=attacks.STANDARD[:3], batch=4, seed=0)
    assert torch.equal(found, model(attacked).argmax(1) == y)
    assert 1 < found.sum() < 7


def test_autoattack_takes_images_of_any_layout(pyautoattack):
    model, x = network(10).to(memory_format=torch.channels_last), images(20)
    y = labelled(model, x)
    expected = attacks.autoattack(model, x, y, eps=0.02, **SIZE | {"iterations": 2})
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(attacks.autoattack(model, last, y, eps=0.02, **SIZE | {"iterations": 2}), expected)


def test_autoattack_of_few_images(pyautoattack):
    model, x = network(), images(10)
    y, right = labelled(model, x), torch.arange(10) % 5 > 0
    none = attacks.autoattack(model, x, (y + right) % 5, eps=0.01, **SIZE)  # all are wrong
    assert not none.any()
    assert not attacks.autoattack(model, x, y, eps=0.9, **SIZE).any()  # none is left after an attack
    assert torch.equal(attacks.autoattack(model, x, y, eps=0.0, **SIZE), right)
    for single in (0, 1):
        one = attacks.autoattack(model, x[single : single + 1], y[single : single + 1], eps=1e-6, **SIZE)
        assert one.tolist() == [bool(right[single])]


def test_autoattack_of_two_classes_and_grey_images_of_one_row(pyautoattack):
    model, x = linear(torch.tensor([[1.0, 0.0], [0.0, 1.0]])), torch.tensor([[0.7, 0.3], [0.45, 0.55]])
    found = attacks.autoattack(
        model, x.view(2, 1, 1, 2), torch.tensor([0, 1]), eps=0.1, **SIZE | {"attacks": ("apgd-ce", "fab-t", "square")}
    )
    assert found.tolist() == [True, False]


def test_autoattack_depends_on_nothing_but_its_arguments(pyautoattack):
    model, x = network(10), images(30)
    y = labelled(model, x)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(attacks.autoattack(model, x, y, eps=0.02, **SIZE | {"iterations": 2}))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*found)
    assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))  # FAB calls backward()
    assert model[0].weight.grad is None
    assert all(parameter.requires_grad for parameter in model.parameters())


class Counting(nn.Module):
    """Counts its calls, and dies in the last that it is allowed."""

    def __init__(self, model, allowed=None):
        super().__init__()
        self.model, self.calls, self.allowed = model, 0, allowed

    def forward(self, x):
        self.calls += 1
        if self.calls == self.allowed:
            raise KeyboardInterrupt
        return self.model(x)


@pytest.mark.parametrize(("names", "eps"), [(("square",), 0.1), (("apgd-ce", "apgd-t"), 0.02)])
def test_a_killed_autoattack_goes_on_to_the_same_result(pyautoattack, tmp_path, names, eps):
    model, x = network(10), images(30)
    y, size = labelled(model, x), {"eps": eps, **SIZE, "attacks": names, "iterations": 1, "batch": 3}
    whole = Counting(model)
    expected = attacks.autoattack(whole, x, y, **size)
    assert 3 < expected.sum() < 20
    for number, allowed in enumerate(np.linspace(12, whole.calls - 1, 8).astype(int)):
        state = tmp_path / f"{number}.attack"
        with pytest.raises(KeyboardInterrupt):
            attacks.autoattack(Counting(model, allowed), x, y, **size, state=state)
        assert not list(tmp_path.glob("*partial"))
        again = Counting(model)
        assert torch.equal(attacks.autoattack(again, x, y, **size, state=state), expected)
        assert again.calls < whole.calls - allowed / 2 + 20  # it did not begin anew
        done = Counting(model)
        assert torch.equal(attacks.autoattack(done, x, y, **size, state=state), expected)
        assert done.calls == 10  # the clean images, in batches
        state.with_name("kept").write_bytes(state.read_bytes())

    kept = tmp_path / "kept"
    for other in ({"eps": 0.01}, {"seed": 1}, {"iterations": 1}, {"batch": 6}, {"attacks": ("fab-t",)}):
        state.write_bytes(kept.read_bytes())
        fresh = attacks.autoattack(model, x, y, **size | other)
        assert torch.equal(attacks.autoattack(model, x, y, **size | other, state=state), fresh)
    state.write_bytes(kept.read_bytes())
    with torch.no_grad():
        model[4].bias[0] += 10
    assert not torch.equal(attacks.autoattack(model, x, y, **size, state=state), expected)


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '{"of": 1}', "\x00" * 100, None])
def test_a_damaged_state_is_replaced(pyautoattack, tmp_path, content):
    model, x, state = network(10), images(8), tmp_path / "attack"
    y, size = labelled(model, x), {"eps": 0.02, **SIZE, "attacks": ("apgd-ce",)}
    expected = attacks.autoattack(model, x, y, **size, state=state)
    good = state.read_text()
    state.write_text(good[: len(good) // 2] if content is None else content)
    assert torch.equal(attacks.autoattack(model, x, y, **size, state=state), expected)
    assert json.loads(state.read_text()) == json.loads(good)


class Fixed:
    """An attack that returns what it is told."""

    def __init__(self, change):
        self.change = change

    def perturb(self, x, y):
        return self.change(x)


def test_what_an_attack_returns_is_checked(monkeypatch):
    model = linear(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x, y = torch.tensor([[0.98, 0.9], [0.95, 0.5]]), torch.tensor([0, 0])

    def attacked(change):
        monkeypatch.setattr(attacks, "_attack", lambda *args: Fixed(change))
        return attacks.autoattack(model, x, y, eps=0.1, attacks=("apgd-ce",), batch=2, seed=0).tolist()

    assert attacked(lambda x: x) == [True, True]
    assert attacked(lambda x: x + torch.tensor([-0.1, 0.1])) == [False, True]
    assert attacked(lambda x: x * float("nan")) == [True, True]
    with pytest.raises(RuntimeError, match=r"apgd-ce went 0.11 far, where eps is 0.1"):
        attacked(lambda x: x - 0.11)
    with pytest.raises(RuntimeError, match=r"with values from 0.55 to 1.03"):
        attacked(lambda x: x + 0.05)


def test_logits_that_are_no_numbers_are_wrong():
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1) * float("nan")

    flags = attacks.autoattack(Broken(), images(3), torch.zeros(3).long(), eps=0.1, attacks=(), batch=2, seed=0)
    assert flags.tolist() == [False] * 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attacks": ("apgd-ce", "fgsm")}, r"attacks 'fgsm' must be of apgd-ce, apgd-t, fab-t, square"),
        ({"iterations": 0}, r"iterations 0 must be at least 1"),
        ({"x": images(2) * 255}, r"x has values from 0 to 255, and must be from 0 to 1"),
        ({"x": images(2) * float("nan")}, r"x has values from nan to nan"),
    ],
)
def test_what_is_no_attack_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        attacks.autoattack(
            **{"model": network(), "x": images(2), "y": torch.tensor([0, 1]), "eps": 0.1, **SIZE} | changed
        )


def test_too_few_classes_are_named(pyautoattack):
    model, x = network(3), images(2)
    with pytest.raises(ValueError, match=r"attack 'apgd-t' needs at least 4 classes, and the model has 3"):
        attacks.autoattack(model, x, model(x).argmax(1), eps=0.1, **SIZE)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack.autopgd_base", None)
    with pytest.raises(ImportError, match=r'pip install "convnorm\[train\]"'):
        attacks.autoattack(network(), images(2), torch.tensor([0, 1]), eps=0.1, **SIZE)


@pytest.mark.parametrize("count", [0, 1])
def test_a_share_of_one_image_or_none_is_attacked(pyautoattack, tmp_path, count):
    """As ``torchrun`` deals them: every second image, of fewer than two for each process."""
    model, x, y = network(), images(2), torch.tensor([3, 4])
    mine = slice(1, 2 * count, 2)
    how = {"eps": 0.1, "attacks": ("apgd-ce",), "iterations": 2, "batch": 5, "seed": 0}
    found = attacks.autoattack(model, x[mine], y[mine], state=tmp_path / "state", **how)
    assert found.tolist() == attacks.autoattack(model, x[mine], y[mine], **how).tolist()
    assert (found.dtype, len(found)) == (torch.bool, count)
