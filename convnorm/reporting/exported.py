"""The layers of an exported program (``torch.export``), which has no modules any more: those of its graph.

Its sizes are those that it was exported with. A padding that is no convolution's own (circular, reflecting, repeating)
is a node of its own there: the convolution after it is measured on the padded input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..geometry import GeometryError
from ..layers import Layer
from ..uses import naming
from .calls import BatchNorm, Found, called_layer, is_vector, multiplier

aten = torch.ops.aten
CONVOLUTIONS = {aten.conv1d: "Conv1d", aten.conv2d: "Conv2d", aten.conv3d: "Conv3d"}
TRANSPOSED = {
    aten.conv_transpose1d: "ConvTranspose1d",
    aten.conv_transpose2d: "ConvTranspose2d",
    aten.conv_transpose3d: "ConvTranspose3d",
}
KINDS = {aten.linear: "Linear", **CONVOLUTIONS, **TRANSPOSED}
BATCH_NORMS = (aten.batch_norm, aten._native_batch_norm_legit_no_training)


def find_exported(program: ExportedProgram) -> tuple[list[Found], list[str]]:
    """The layers, and the names of the other parameters that are no mere vectors.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)).eval()
    >>> program = torch.export.export(model, (torch.ones(1, 2, 8),))
    >>> [(one.name, one.kind, one.batch_norm.name) for one in find_exported(program)[0]]
    [('0', 'Conv1d', '1')]
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"convnorm: model of type {type(program).__name__} must be an nn.Module or an ExportedProgram")
    tensors = _tensors(program)
    uses: dict[tuple, list[tuple[Node, Layer]]] = {}
    for node in program.graph.nodes:
        weight = _arguments(node).get("weight") if _packet(node) in (*KINDS, aten.convolution) else None
        if weight is not None and weight.name in tensors:
            name, value = tensors[weight.name]
            with naming(name):
                layer = _layer(node, value)
            uses.setdefault((name, *layer.sizes, *layer.options.values()), []).append((node, layer))
    found = []
    for (name, *_), own in uses.items():
        with naming(name), torch.no_grad():
            found.append(_found(name, own[0][1], [node for node, _ in own], tensors))
    measured = {_memory(one.layer.weight) for one in found}
    named = _parameters(program).items()
    return found, [name for name, x in named if not is_vector(x) and _memory(x) not in measured]


def parameters_of(program: ExportedProgram) -> int:
    """How many numbers."""
    return sum(parameter.numel() for parameter in _parameters(program).values())


def _parameters(program: ExportedProgram) -> dict[str, Tensor]:
    """By name; each once, where a model holds it under several."""
    named = {name: program.state_dict[name] for name in program.graph_signature.parameters}
    first = {_memory(x): name for name, x in reversed(named.items())}
    return {name: x for name, x in named.items() if first[_memory(x)] == name}


def _memory(x: Tensor) -> tuple:
    """The same of one parameter under several names, which are tensors of their own once a program was loaded."""
    return x.data_ptr(), tuple(x.shape), x.stride()


def _layer(node: Node, weight: Tensor) -> Layer:
    arguments, n_axes = _arguments(node), weight.dim() - 2
    x_shape = _shape(arguments["input"])
    for size in x_shape[len(x_shape) - n_axes :]:
        if not isinstance(size, int):
            raise GeometryError(f"convnorm: input size {size} is not fixed: export the model with fixed sizes")
    transposed = arguments.get("transposed", _packet(node) in TRANSPOSED)
    return called_layer(weight, x_shape, arguments, transposed)


def _found(name: str, layer: Layer, nodes: list[Node], tensors: dict[str, tuple[str, Tensor]]) -> Found:
    first, n_axes = nodes[0], len(layer.in_shape)
    kind = KINDS.get(_packet(first)) or f"{'ConvTranspose' if layer.transposed else 'Conv'}{n_axes}d"
    _ = layer.geometry  # refuses what is no layer
    channels_second = all(len(_shape(node)) == n_axes + 2 for node in nodes)
    return Found(
        name.removesuffix(".weight"), kind, layer, len(nodes), _batch_norm(nodes, tensors) if channels_second else None
    )


def _tensors(program: ExportedProgram) -> dict[str, tuple[str, Tensor]]:
    """Name and value of the parameters and buffers, by the node that stands for them."""
    signature, found = program.graph_signature, {}
    values = {**program.state_dict, **program.constants}
    for names in (signature.inputs_to_parameters, signature.inputs_to_buffers):
        found |= {node: (name, values[name]) for node, name in names.items()}
    return found


def _packet(node: Node) -> Callable | None:
    return getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None


def _arguments(node: Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _batch_norm(nodes: list[Node], tensors: dict[str, tuple[str, Tensor]]) -> BatchNorm | None:
    """The one that takes everything that the layer returns, and takes it alone."""
    found = {}
    for node in nodes:
        users = list(node.users)
        if len(users) != 1 or _packet(users[0]) not in BATCH_NORMS:
            return None
        given = _arguments(users[0])
        variance, weight = given["running_var"], given["weight"]
        if given.get("training") or variance is None or variance.name not in tensors:
            return None
        if weight is not None and weight.name not in tensors:  # it is computed
            return None
        found[variance.name] = given
    if len(found) != 1:
        return None
    (given,) = found.values()
    name, variance = tensors[given["running_var"].name]
    weight = None if given["weight"] is None else tensors[given["weight"].name][1]
    return BatchNorm(name.rpartition(".")[0], multiplier(variance, weight, given["eps"]))
