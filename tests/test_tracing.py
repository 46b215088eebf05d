"""The promise: a bound is that of the model as it is, whatever it writes and computes, and tracing leaves it so."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from as_matrix import ORDS, Of, batch_normed, matrix_of, norm_of
from torch import nn

from convnorm.geometry import GeometryError
from convnorm.network import lipschitz
from convnorm.network.trace import exported


def test_tracing_leaves_a_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lipschitz(model, [2, 3, 8, 8])
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Merging(nn.Linear):
    """Adds a product to its weight in evaluation mode, and takes it away in training, as LoRA layers do."""

    def __init__(self):
        super().__init__(3, 3)
        self.update, self.merged = nn.Parameter(torch.full((3, 3), 5.0)), False

    def train(self, mode=True):
        if self.merged == mode:
            self.weight.data += -self.update if mode else self.update
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.update.T)


def test_tracing_leaves_weights_that_evaluation_mode_changes():
    model = nn.Sequential(Merging(), nn.ReLU()).train()
    before = model[0].weight.clone()
    found = lipschitz(model, [2, 3], ord=1).upper
    assert torch.equal(model[0].weight, before)
    assert (model[0].training, model[0].merged) == (True, False)
    assert found == lipschitz(model.eval(), [2, 3], ord=1).upper


def test_what_cannot_be_copied_is_to_be_set_to_evaluation_mode_first():
    model = nn.Sequential(Merging())
    model.lock = threading.Lock()
    with pytest.raises(GeometryError, match="Sequential cannot be copied: call its eval"):
        lipschitz(model, [2, 3])
    assert lipschitz(model.eval(), [2, 3]).upper > 0


def test_tracing_leaves_no_fake_tensor_in_a_buffer_that_is_made_when_needed():
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("mask", None, persistent=False)

        def forward(self, x):
            if self.mask is None:
                self.mask = torch.ones(3, 3).tril()
            return x @ (self.weight * self.mask)

    model = Masked()
    exported(model, [2, 3])
    assert model.mask is None
    assert model(torch.ones(2, 3)).isfinite().all()


class Standardised(nn.Conv2d):
    """By a batch norm in training, which writes the statistics that it is given."""

    def __init__(self):
        super().__init__(3, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        rows = self.weight.reshape(1, 4, -1)
        rows = torch.batch_norm(rows, None, None, self.mean, self.var, True, 0.5, 1e-5, False)
        return self._conv_forward(x, rows.reshape_as(self.weight), self.bias)


@pytest.mark.parametrize("ord", ORDS)
def test_a_weight_that_is_computed_leaves_its_model_as_it_was(ord):
    model = Standardised().double().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = lipschitz(model, [2, 3, 5, 5], ord=ord).upper
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    exact = norm_of(matrix_of(model, (3, 5, 5)), ord)
    assert exact * (1 - 1e-12) <= found <= exact * 1.01


def test_an_exported_model_and_one_in_inference_operations_have_the_same_bound():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), batch_normed(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.Softmax(1)
    )
    program = torch.export.export(model.float().eval(), (torch.zeros(2, 3, 8, 8),))
    for ord in (1, math.inf):
        expected = lipschitz(model, [2, 3, 8, 8], ord=ord).upper
        assert lipschitz(program, ord=ord).upper == expected
        assert lipschitz(program.run_decompositions(), ord=ord).upper == pytest.approx(expected, rel=1e-12)


def test_parametrized_weights_are_those_that_the_layer_uses():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)).eval()
    exact = norm_of(model.weight.detach().double(), 1)
    assert lipschitz(model, [2, 5], ord=1).upper == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("drop", [nn.Dropout(), nn.Dropout1d(), nn.AlphaDropout(), nn.RReLU(1, 1)], ids=str)
def test_a_weight_that_is_dropped_in_training_alone_is_constant(drop):
    class Dropping(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.drop = drop

        def forward(self, x):
            return F.linear(x, self.drop(self.weight))

    model = Dropping()
    exact = norm_of(model.weight.detach().double(), 1)
    assert lipschitz(model, [2, 3], ord=1).upper == pytest.approx(exact, rel=1e-12)


class Buffered(nn.Module):
    """A factor that is written before it is used."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("factor", torch.ones(3))
        self.register_buffer("source", torch.full((3,), 4.0))

    def forward(self, x):
        written = self.write(self.factor, self.source)
        return x * (written if isinstance(written, torch.Tensor) else self.factor)


def test_what_is_written_elsewhere_than_in_the_first_argument_is_seen():
    model = Buffered(lambda factor, source: torch.add(source, 1, out=factor))
    assert lipschitz(model, [2, 3], ord=1).upper == 5
    assert torch.equal(model.factor, torch.ones(3))
    for write in (
        lambda factor, source: torch._foreach_copy_([factor], [source]),
        lambda factor, source: torch._foreach_mul_([source, factor], 2.0),
        lambda factor, source: [F.batch_norm(source.diag(), source, factor, training=True)],
    ):
        with pytest.raises(GeometryError, match="'b_factor' was overwritten in place"):
            lipschitz(Buffered(write), [2, 3])
    with pytest.raises(GeometryError, match=r"\(mul\) writes into what is not its first argument"):
        lipschitz(Of(lambda x: torch.mul(x, 9, out=torch.zeros(2, 3))), [2, 3])


class Stepping(nn.Module):
    """Assigns a buffer what it has written into it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.ones(3))

    def forward(self, x):
        self.count += 1
        return x * self.count


def test_what_is_made_like_the_input_has_all_its_samples():
    counted = Of(lambda x, w: x * torch.ones_like(x).sum(0) * w.expand(len(x), -1), w=torch.ones(3))
    assert lipschitz(counted, [4, 3], ord=1).upper == 4


def test_a_buffer_that_is_added_to_has_its_new_value():
    model = Stepping()
    assert lipschitz(model, [2, 3], ord=1).upper == 2
    assert torch.equal(model.count, torch.ones(3))


class Counting(nn.Module):
    """Writes a buffer without gradients, and reads it."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("count", torch.ones(3))

    def forward(self, x):
        with torch.no_grad():
            y = 2 * x
            self.write(self.count)
        return y * self.count


def test_what_is_written_without_gradients_is_seen():
    model = Counting(lambda count: count.add_(1))
    assert [lipschitz(model, [2, 3], ord=1).upper for _ in range(2)] == [4, 4]
    assert torch.equal(model.count, torch.ones(3))
    for write in (lambda count: count[:1].mul_(9), torch.enable_grad()(lambda count: count[:1].mul_(9))):
        with pytest.raises(GeometryError, match="'b_count' was overwritten in place"):
            lipschitz(Counting(write), [2, 3])


class Autocasting(Counting):
    def __init__(self, enabled):
        super().__init__(None)
        self.enabled = enabled

    def forward(self, x):
        with torch.autocast("cpu", enabled=self.enabled, dtype=torch.bfloat16):
            self.count.mul_(3)
        return x * self.count


@pytest.mark.parametrize("enabled", [False, True])
def test_what_is_written_under_autocast_is_seen(enabled):
    model = Autocasting(enabled)
    assert [lipschitz(model, [2, 3], ord=1).upper for _ in range(2)] == [3, 3]
    assert torch.equal(model.count, torch.ones(3))


class Excepted(nn.Linear):
    """Kept out of autocast, as numerically delicate parts are."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return 2 * super().forward(x)


def test_parts_that_are_kept_out_of_autocast_are_bounded():
    model = Excepted(3, 3)
    expected = 2 * torch.linalg.matrix_norm(model.weight.detach().double(), ord=1)
    assert lipschitz(model, [2, 3], ord=1).upper == pytest.approx(expected.item(), rel=1e-6)


class Observing(nn.Module):
    """Writes down what it sees, and does not read it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(3))

    def forward(self, x):
        with torch.no_grad():
            self.largest.copy_(torch.maximum(self.largest, x.amax(0)))
        self.largest.mul_(0.9)
        return 2 * x


def test_what_is_written_and_not_read_is_no_part_of_a_network():
    assert lipschitz(Observing(), [2, 3], ord=1).upper == 2
