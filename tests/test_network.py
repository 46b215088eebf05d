"""The promise: what has no constant is an error that names the node, a given one is taken as it is, and a bound is that
of the model as it is.
"""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from as_matrix import ORDS, Of, batch_normed, matrix_of, norm_of, normal
from torch import nn

from convnorm.geometry import GeometryError
from convnorm.network import lipschitz, trace
from convnorm.network.trace import exported

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


# Models


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
