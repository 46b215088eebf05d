"""Where tables are made that stay on a device between calls."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Made = TypeVar("Made")


def kept(device: torch.device, make: Callable[[], Made]) -> Made:
    """What ``make`` makes; for a GPU in a thread of its own.

    While ``torch.compile(mode="reduce-overhead")`` runs a function that will become a CUDA graph, all memory that its
    thread asks for comes from the graph's pool, and nothing may stay there but what the function returns.
    """
    if device.type != "cuda":
        return make()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
