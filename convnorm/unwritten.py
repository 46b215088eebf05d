"""A model's own tensors stay what they are while it runs on fake ones, where it writes them: counters, constraints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

ASSIGN = Tensor.data.__set__
WRITING = frozenset(  # add_, __iadd__, __setitem__
    getattr(Tensor, name)
    for name in dir(Tensor)
    if (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))
)


class Unwritten(TorchFunctionMode):
    """Within a ``FakeTensorMode``: these true tensors hold at the end what they held before.

    PyTorch runs ``x.add_(1)`` and the like of true tensors truly even there, and ``x.data = fake`` would leave ``x``
    without values for good: it is not done.

    >>> from torch._subclasses.fake_tensor import FakeTensorMode
    >>> count = torch.zeros(())
    >>> with FakeTensorMode(allow_non_fake_inputs=True), Unwritten([count]):
    ...     _ = count.add_(1)
    >>> count
    tensor(0.)
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self._held = {id(x) for x in held}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == ASSIGN and id(args[0]) in self._held and isinstance(args[1], FakeTensor):
            return None
        if func in WRITING or "out" in kwargs:
            for x in tree_iter((args, kwargs)):
                if id(x) in self._held and id(x) not in self._before:
                    with unset_fake_temporarily():
                        self._before[id(x)] = x, x.clone()
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with unset_fake_temporarily(), torch.inference_mode():  # which may write all
            for x, before in self._before.values():
                x.copy_(before)
