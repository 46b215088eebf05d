"""The promise: calls that take the short way give what PyTorch's way gives, and refuse what it refuses."""

import numpy as np
import pytest
import torch
from cases import TABLE, columns, fuzz, replay
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import convnorm
from convnorm import direct
from convnorm.backends import why_not

ops = torch.ops.convnorm
pytestmark = pytest.mark.skipif(bool(why_not("native", "cpu")), reason="only the extension has a short way")
LAYER = (1, 1, [8, 8])


@pytest.fixture
def taken(monkeypatch):
    """How often the short way was taken."""
    calls = []
    for name in ("_norms", "_measure"):
        operator = getattr(direct, name)
        monkeypatch.setattr(direct, name, lambda *given, operator=operator: calls.append(given) or operator(*given))
    monkeypatch.setattr(direct, "_plans", {})
    return calls


def weight(*shape):
    return torch.randn(shape or (6, 4, 3, 3))


def test_the_second_call_takes_the_short_way(taken):
    w = weight()
    for name in ("norms", "l1", "linf"):
        operator = getattr(ops, name)
        first = operator(w, *LAYER)
        assert not taken
        second, parameter = operator(w, *LAYER), operator(torch.nn.Parameter(w).requires_grad_(False), *LAYER)
        assert len(taken) == 2
        assert first == second == parameter == operator.default(w, [1], [1], [8, 8])
        taken.clear()
        direct._plans.clear()


def test_random_layers(taken, seed):
    for number in range(300):
        case, w = fuzz(seed, number, "cpu")
        expected = ops.norms.default(w, *case.args, **case.options)
        for _ in range(2):
            torch.testing.assert_close(
                ops.norms(w, *case.args, **case.options), expected, rtol=0, atol=0, equal_nan=True,
                msg=lambda text, number=number, case=case: f"{text} {replay(seed, number, case)}",
            )  # fmt: skip
    assert len(taken) >= 300


def test_networks(taken):
    layers = [TABLE[name] for name in ("conv2d", "stride_2", "linear")]
    weights = [torch.randn(case.weight_shape) for case in layers]
    args, options = columns(layers)
    named = dict(zip(("stride", "padding", "in_shape"), args, strict=True))
    results = [ops.norms_many(weights, *args, **options) for _ in range(2)]
    results += [ops.norms_many(weights, **named, **options) for _ in range(2)]
    assert len(taken) == 2
    expected = ops.norms_many.default(weights, *args, **options)
    taken.clear()
    ensemble = [torch.stack([w, w]) for w in weights]
    results += zip(
        *torch.vmap(lambda *members: ops.norms_many(list(members), *args, **options))(*ensemble), strict=True
    )
    assert not taken
    for result in results:
        torch.testing.assert_close(tuple(result), tuple(expected), rtol=0, atol=0)


WRONG = {
    "real": (1, 1, [8.0, 8.0]),
    "too_many": (1, 1, [8, 8, 8]),
    "no_list": (1, 1, 8),
    "missing": (1, 1),
    "surplus": (*LAYER, 2),
    "a_real_stride": (1.0, 1, [8, 8]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_equals_known_arguments_but_is_wrong_is_refused(taken, name):
    w = weight()
    ops.norms(w, *LAYER)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError)) as refused:
            ops.norms(w, *WRONG[name])
        with pytest.raises((RuntimeError, ValueError)) as by_pytorch:
            ops.norms.default(w, *WRONG[name])
        assert isinstance(refused.value, type(by_pytorch.value))
    assert not taken


@pytest.mark.parametrize("change", [torch.Tensor.int, torch.Tensor.to_sparse, lambda w: w.new_empty(0, 4, 3, 3)])
def test_other_weights_of_known_arguments_are_refused(taken, change):
    w = weight()
    ops.norms(w, *LAYER)
    with pytest.raises(convnorm.GeometryError, match="weight"):
        ops.norms(change(w), *LAYER)
    assert not taken


def test_a_weight_without_values_of_known_arguments_has_norms_without_values(taken):
    w = weight()
    ops.norms(w, *LAYER)
    assert all(norm.is_meta for norm in ops.norms(w.to("meta"), *LAYER))
    assert not taken


def test_arguments_of_every_kind(taken):
    """Each gives what the first call gave."""
    w = weight()
    expected = ops.norms(w, *LAYER)
    for arguments in [(1, 1, torch.Size([8, 8])), ([1], (1,), (8, 8)), (True, 1, [8, 8]), (1, 1, [np.int64(8), 8]),
                      (1, np.array([1, 1]), [8, 8]), (1, 1, [torch.tensor(8), 8])]:  # fmt: skip
        for _ in range(2):
            assert ops.norms(w, *arguments) == expected
    for _ in range(2):
        assert ops.norms(weight=w, stride=1, padding=1, in_shape=[8, 8]) == expected
        assert ops.norms(w, in_shape=[8, 8], padding=[1, 1], stride=1, groups=1, dilation=1) == expected


def test_what_follows_tensors_sees_the_operator(taken):
    w = weight()
    value = ops.l1(w, *LAYER)
    leaf = w.clone().requires_grad_()
    gradient = convnorm.subgradient(w, [8, 8], padding=1, layout="dense")
    ops.l1(leaf, *LAYER).backward()
    assert torch.equal(leaf.grad, gradient)
    assert torch.equal(torch.func.grad(lambda w: ops.l1(w, *LAYER))(w), gradient)
    assert torch.equal(
        torch.func.vmap(lambda w: ops.l1(w, *LAYER))(torch.stack([w, 2 * w])), value * torch.tensor([1, 2])
    )
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ops.l1(forward_ad.make_dual(w, w), *LAYER)).tangent
    torch.testing.assert_close(tangent, value)
    assert not taken
    with torch.no_grad():
        assert ops.l1(leaf, *LAYER) == value
    assert len(taken) == 1


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **kwargs or {})


def test_modes_and_traces_see_the_operator(taken):
    w = weight()
    value = ops.l1(w, *LAYER)
    with Seen() as seen:
        assert ops.l1(w, *LAYER) == value
    assert "convnorm::measure_native" in seen.names
    traced = torch.jit.trace(lambda w: ops.l1(w, *LAYER), w, check_trace=False)
    assert "convnorm::l1" in str(traced.graph)
    assert not taken


def test_another_backend_serves_when_asked_for(taken):
    w = weight()
    ops.l1(w, *LAYER)
    with convnorm.use_backend("reference"):
        for _ in range(2):
            ops.l1(w, *LAYER)
        assert not taken
    ops.l1(w, *LAYER)
    assert len(taken) == 1


def test_plans_do_not_pile_up(taken, monkeypatch):
    monkeypatch.setattr(direct, "MOST_KNOWN", 3)
    for size in range(3, 20):
        ops.l1(weight(), 1, 1, [size, size])
    assert len(direct._plans) <= 3


@pytest.mark.skipif(not torch.cuda.is_available() or bool(why_not("native", "cuda")), reason="needs a GPU")
def test_gpus_have_a_short_way_too(taken):
    w = weight().cuda()
    results = [ops.norms(w, *LAYER) for _ in range(2)]
    assert len(taken) == 1
    for result in results:
        torch.testing.assert_close(tuple(result), tuple(ops.norms.default(w, [1], [1], [8, 8])), rtol=0, atol=0)
        assert [norm.shape for norm in result] == [(), ()]
