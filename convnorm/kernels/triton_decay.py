"""A step of norm decay in Triton: the two launches of the measurement, then one that updates all layers.

    add_terms    finds the newest terms from the weights, writes them into the ring, and adds rate h to the gradients

Where gradients have other dtypes than weights, or layers share a gradient, each kind takes a launch of its own.

The addresses of the gradients, new at every step that follows ``zero_grad()``, are parameters of the launch: nothing is
copied, the host waits for nothing, and a CUDA graph keeps them as it keeps all parameters.

The clock is also the ticket: in its upper half it counts the programs that are done, and the last one advances it. So
it needs no memory beside the state, and a graph can be replayed; in between, on the device, its value is no number of
steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import GeometryError
from ..momentum import check_apart
from .triton_decay_schedule import AGES, BLOCK, CHUNK, NO_GRADIENT, Pair, decay_schedules
from .triton_measure import addresses_of, keep_while_captured, measure_triton


def decay_triton(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    norms: Tensor,
    winners: Tensor,
    signs: Tensor,
    channels: Tensor,
    clock: Tensor,
    rates: Tensor,
    momentum: float,
    plan: str,
    linf: bool,
    measured: bool,
) -> None:
    """See ``library.DECAY`` for the contract of every backend."""
    check_apart(grads)
    _check_devices([norms, winners, signs, channels, clock, rates, *weights, *(g for g in grads if g.numel())])
    values, found = norms, winners
    if not measured:
        *both, found = measure_triton(weights, plan)
        values, found = both[linf], found[:, int(linf)]

    from triton import language  # late: convnorm works without Triton

    from . import triton_decay_kernels as kernels

    device, (terms, length) = weights[0].device, signs.shape
    hidden = [hidden_address(grad) for grad in grads]
    schedules = decay_schedules(device, plan, _pairs(weights, grads, hidden), linf)
    addresses = addresses_of(weights)
    keep_while_captured(schedules, addresses)
    for schedule in schedules:
        weight_dtype, grad_dtype = (getattr(language, str(d).removeprefix("torch.")) for d in schedule.dtypes)
        sum_dtype = language.float64 if grad_dtype == language.float64 else language.float32
        with torch.cuda.device_of(weights[0]):
            kernels.add_terms_kernel[(len(schedule.owners), -(-terms // AGES))](
                addresses, tuple(hidden[layer] for layer in schedule.layers), schedule.records, schedule.owners,
                values, found, norms, winners, signs, channels, clock, rates, float(momentum),
                found.stride(0), terms, length, len(weights),
                WEIGHT=weight_dtype, GRAD=grad_dtype, SUM=sum_dtype,
                COPIES=not measured, ADVANCES=schedule is schedules[-1], BLOCK=BLOCK, AGES=AGES,
                CHUNK=CHUNK, BITS=(terms - 1).bit_length(), num_warps=4,
            )  # fmt: skip


def _check_devices(tensors: Sequence[Tensor]) -> None:
    """The kernels are given addresses, of which those on another device are none of theirs."""
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise GeometryError(
                f"convnorm: weights, and what belongs to them, on {device} and {tensor.device} must be on one device"
            )


def hidden_address(grad: Tensor) -> int:
    """The address plus 1: an odd number, since Triton compiles anew where a parameter is a multiple of 16."""
    return grad.data_ptr() + 1 if grad.numel() else NO_GRADIENT


def _pairs(weights: Sequence[Tensor], grads: Sequence[Tensor], hidden: Sequence[int]) -> tuple[Pair, ...]:
    pairs, turns = [], {}
    for weight, grad, address in zip(weights, grads, hidden, strict=True):
        shown = weight if address == NO_GRADIENT else grad
        turn = turns.get(address, 0)
        if address != NO_GRADIENT:
            turns[address] = turn + 1
        pairs.append(Pair((weight.dtype, shown.dtype), turn, weight.shape, weight.stride(), shown.stride()))
    return tuple(pairs)
