"""Tables that stay on a GPU between calls are no memory of a CUDA graph that happens to be made at the first call."""

import threading

import pytest
import torch
from cases import Case

import convnorm
from convnorm import kept, winners
from convnorm.kernels import triton_decay_schedule, triton_measure, triton_schedule

CASE = Case((4, 3, 3), (2,), (1,), (9,))  # at stride 2 a window does not see every tap
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_what_is_kept_on_a_gpu_is_made_in_another_thread():
    assert kept.kept(CPU, threading.get_ident) == threading.get_ident()
    assert kept.kept(CUDA, threading.get_ident) != threading.get_ident()
    with pytest.raises(ArithmeticError):
        kept.kept(CUDA, lambda: 1 // 0)


def test_all_that_is_cached_on_a_device_is_kept(monkeypatch):
    devices = []
    for module in (winners, triton_measure, triton_schedule, triton_decay_schedule):
        monkeypatch.setattr(module, "kept", lambda device, make: devices.append(device) or make())
    plan, strides = CASE.plan, (9, 3, 1)
    winners._window_table.__wrapped__(plan, True, CPU)
    triton_measure._addresses.__wrapped__(CPU, (16,))
    layout = triton_schedule.Layout(torch.float32, CASE.weight_shape, strides, True)
    triton_schedule.schedules.__wrapped__(CPU, plan, (layout,))
    pair = triton_decay_schedule.Pair((torch.float32,) * 2, 0, CASE.weight_shape, strides, strides)
    triton_decay_schedule.decay_schedules.__wrapped__(CPU, plan, (pair,), False)
    assert devices == [CPU] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_gradients_are_compiled_into_cuda_graphs(backend):
    if convnorm.backends.__globals__["why_not"](backend, "cuda"):
        pytest.skip(f"{backend} does not serve")
    weight = torch.randn(CASE.weight_shape, device="cuda", requires_grad=True)
    winners._window_table.cache_clear()
    for cache in (triton_measure._addresses, triton_schedule.schedules):
        cache.cache_clear()
    with convnorm.use_backend(backend):
        norm = torch.compile(lambda w: torch.ops.convnorm.l1(w, *CASE.args) * 2, mode="reduce-overhead")
        for _ in range(4):
            (grad,) = torch.autograd.grad(norm(weight), weight)
    (expected,) = torch.autograd.grad(torch.ops.convnorm.l1(weight, *CASE.args) * 2, weight)
    assert torch.equal(grad, expected)
