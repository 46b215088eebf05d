"""One run over several processes, as ``torchrun`` starts them; otherwise rank 0 of 1."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def check_usable(device: str) -> None:
    try:
        torch.empty(0, device=device).cpu()  # which is more than meta can
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


@contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """This process's device; within, collectives are there if ``torchrun`` started it."""
    check_usable(device)
    if "LOCAL_RANK" not in os.environ:
        yield torch.device(device)
        return
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield place
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # DDP has to go before its process group, else both may hang
        raise
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(count: int) -> slice:
    """Of so many rows, this rank's."""
    return slice(rank(), count, world())


def together(flags: Tensor, count: int) -> Tensor:
    """The flags of all ``count`` rows, from every rank's flags of its share."""
    if world() == 1:
        return flags
    parts: list[Tensor] = [torch.empty(0)] * world()
    dist.all_gather_object(parts, flags.cpu())
    result = torch.empty(count, dtype=flags.dtype)
    for number, part in enumerate(parts):
        result[number :: world()] = part
    return result


def summed(values: Tensor) -> Tensor:
    if world() > 1:
        dist.all_reduce(values)
    return values


def least(value: Tensor) -> Tensor:
    if world() > 1:
        dist.all_reduce(value, dist.ReduceOp.MIN)
    return value


def average(tensors: Sequence[Tensor]) -> None:
    """In place, over the ranks."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, mean in zip(tensors, (flat / world()).split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
