"""Operations that move numbers: every output is an input. And those that join tensors."""

from __future__ import annotations

from .calls import Call, Refused, rule
from .linear import linear, reshaped
from .operators import Rearranged, Scalar
from .steps import Concatenation, Joint, Linear, Step

AXES = ("dim", "dims", "dim0", "dim1", "source", "destination")  # arguments that name axes


@rule("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "to", "_to_copy", "type_as",
      "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")  # fmt: skip
def identity(call: Call) -> Linear:
    if call.arguments.get("train"):
        raise Refused("drops at random, in training mode")
    source = call.arguments[next(iter(call.arguments))]
    return linear(source, Scalar(call.shape))


@rule("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
def reshaping(call: Call) -> Linear:
    """The batch axis stays in front, with its size: so every sample keeps its own numbers."""
    source = call.source()
    if call.operation == "view" and "dtype" in call.arguments:
        raise Refused("reads bits as another type")
    if call.operation == "unsqueeze":
        call.axis(call.arguments["dim"], len(source.shape) + 2)
    return linear(source, reshaped(source.shape, call.shape))


@rule("permute", "transpose", "movedim", "t", "numpy_T", "flip", "roll", "pixel_shuffle", "pixel_unshuffle",
      "channel_shuffle", "select", "slice", "narrow")  # fmt: skip
def moving(call: Call) -> Linear:
    source, (first, *_) = call.source(), call.arguments
    _refuse_batch(call)
    rest = {name: value for name, value in call.arguments.items() if name != first}
    # of a view, which transpose_ turns
    return linear(source, Rearranged(source.shape, call.shape, lambda x: call.target(x.view_as(x), **rest)))


def _refuse_batch(call: Call) -> None:
    rank = len(call.source().shape) + 1
    if call.operation in ("t", "numpy_T"):
        raise Refused("moves the batch axis")
    if call.operation == "permute":
        if call.arguments["dims"][0] % rank:
            raise Refused("moves the batch axis")
        return
    for name in AXES:
        if call.arguments.get(name) is not None:
            call.axes(call.arguments[name])
    if call.operation == "roll" and not call.arguments["dims"]:
        raise Refused("rolls through the batch")


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unbind")
def splitting(call: Call) -> tuple[Linear, ...]:
    source, (first, *_) = call.source(), call.arguments
    _refuse_batch(call)
    rest = {name: value for name, value in call.arguments.items() if name != first}
    return tuple(
        linear(source, Rearranged(source.shape, tuple(one.shape[1:]), lambda x, i=i: call.target(x, **rest)[i]))
        for i, one in enumerate(call.meta)
    )


@rule("cat", "concat", "concatenate", "stack")
def concatenation(call: Call) -> Step:
    parts = call.arguments["tensors"]
    rank = len(call.shape) + 1
    axis = call.axis(call.arguments["dim"], rank)
    steps = [part for part in parts if isinstance(part, Step)]
    if call.operation == "stack":
        shape = (*call.shape[: axis - 1], 1, *call.shape[axis:])
        steps = [linear(part, reshaped(part.shape, shape)) for part in steps]
    if len(steps) != len(parts):  # what is constant beside them changes nothing
        return Joint(call.shape, tuple(steps))
    return Concatenation(call.shape, tuple(steps), axis=axis)
