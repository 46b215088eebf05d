"""Weights that a model computes from what it holds, and not from its input: standardised, masked, of low rank.

Calls on parameters and buffers alone, and on what comes of them, are noted while the model runs on fake tensors. Where
a value is asked for, they are made again on true ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves, tree_map

READ_DATA = Tensor.data.__get__  # an alias, by which a tensor may be written without a trace
PLAIN = (bool, int, float, str, slice, torch.dtype, torch.device, torch.layout, torch.memory_format)


class Drawn(Exception):
    """The value is random."""


@dataclass(frozen=True, eq=False)
class Computed:
    """Tensor number ``index`` of what ``function(*args, **kwargs)`` returns, which has others of its kind in it."""

    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    index: int

    @property
    def made_of(self) -> list[Computed | Tensor]:
        return [x for x in tree_iter((self.args, self.kwargs)) if isinstance(x, (Computed, Tensor))]

    def held(self) -> list[Tensor]:
        """The parameters and buffers that it comes from."""
        found: dict[Computed | Tensor, None] = {self: None}
        for one in (pending := [self]):
            new = [x for x in one.made_of if x not in found]
            found |= dict.fromkeys(new)
            pending += [x for x in new if isinstance(x, Computed)]
        return [x for x in found if isinstance(x, Tensor)]

    @torch.no_grad()
    def value(self) -> Tensor:
        """Of copies of them, as calls may write.

        >>> weight = torch.tensor([1.0, 2.0])
        >>> Computed(torch.mul, (Computed(torch.neg, (weight,), {}, 0), 3), {}, 0).value()
        tensor([-3., -6.])
        """
        values = {x: x.detach().clone() for x in self.held()}
        pending = [self]
        with Deterministic():
            while pending:
                one = pending[-1]
                if missing := [x for x in one.made_of if x not in values]:
                    pending += missing
                    continue
                args, kwargs = tree_map(lambda x: values[x] if _is_source(x) else x, (one.args, one.kwargs))
                values[pending.pop()] = tree_leaves(one.function(*args, **kwargs))[one.index]
        return values[self]


class Computations:
    """Those of a run on fake tensors, of a model that holds these ones."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        self._held: dict[int, tuple[Tensor | Computed | None, int | None]]
        self._held = {id(x): (x, _writes(x)) for x in held if not is_lazy(x)}
        self._made: dict[int, tuple[Computed, Tensor, int]] = {}  # by id, which the tensor keeps its own
        self._same: dict[tuple, Computed] = {}  # the first of each, so that a layer that runs again is the same one

    def of(self, x: Tensor) -> Tensor | Computed | None:
        """What a tensor is: itself if the model holds it; None where it depends on more, or was written since."""
        if id(x) in self._held:
            source, writes = self._held[id(x)]
            return source if writes == _writes(x) else None
        made = self._made.get(id(x))
        return made[0] if made and made[2] == x._version else None

    def note(self, function: Callable, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """To be called after each call of PyTorch that returns tensors."""
        sources = {id(x): self.of(x) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        if any(source is None for source in sources.values()):
            return
        args, kwargs = tree_map(lambda x: sources[id(x)] if isinstance(x, Tensor) else x, (args, kwargs))
        if function == READ_DATA and isinstance(args[0], Computed):
            return self.forget()
        what = repr(tree_map(_written_out, (args, kwargs)))
        for index, x in enumerate(tree_leaves(result)):
            if isinstance(x, FakeTensor) and not x.is_inference():
                computed = self._same.setdefault((function, what, index), Computed(function, args, kwargs, index))
                self._made[id(x)] = computed, x, x._version

    def assign(self, x: Tensor, data: Tensor) -> None:
        """Before ``x.data = data``."""
        if id(x) in self._held:
            self._held[id(x)] = self.of(data), _writes(x)
        else:
            self.forget()

    def forget(self) -> None:
        self._made.clear()


class Deterministic(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Drawn
        return func(*args, **(kwargs or {}))


def _writes(x: Tensor) -> int | None:
    """How many there were, into it or a view of it; not counted in inference mode."""
    return None if x.is_inference() else x._version


def _is_source(x: Any) -> bool:
    return isinstance(x, (Computed, Tensor))


def _written_out(x: Any) -> Any:
    return x if x is None or isinstance(x, PLAIN) else f"@{id(x)}"
