"""A model as steps: its graph by ``torch.export``, and each node by the rule of its operation.

Nothing is computed but what does not depend on the input, such as a parametrized weight.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, dropwhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter, tree_map

from ..geometry import GeometryError
from ..layers import as_stored
from ..unwritten import restored, unlogged
from ..uses import Watch, plain_name, shape_of, unwrapped
from . import activations, linear, moves, nonlinear  # noqa: F401  their rules
from .calls import RULES, Call, Refused, arguments_of, is_random
from .steps import Input, Joint, Step

CREATING = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")  # by their input's shape alone
LIKE = ("type_as", "to", "expand_as")  # likewise, where what is made so is a constant
NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled  # calls another graph,
AUTOCAST = torch.ops.higher_order.wrap_with_autocast  # and so does this

Region = tuple[str, str]  # what a constant is given for: a module's name and one call of it, or a node's and ""


@dataclass(frozen=True)
class Traced:
    """The steps of a model in the order of their use, and those that are its outputs. ``assumed`` are the names of
    nodes and modules whose constants were given.
    """

    steps: list[Step]
    outputs: list[Step]
    assumed: tuple[str, ...] = ()


def trace(
    model: nn.Module | torch.export.ExportedProgram,
    *inputs: Tensor | Sequence[int],
    assume: Mapping[str, float] | None = None,
) -> Traced:
    """The steps of a model in evaluation mode, for inputs or their shapes, batch axis included.

    ``assume`` gives Lipschitz constants for nodes, or for modules whole, by name. A model that is already exported
    takes no inputs.

    >>> traced = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), [1, 3, 8, 8])
    >>> [(step.operation, step.shape) for step in traced.steps]
    [('input', (3, 8, 8)), ('conv2d', (4, 6, 6)), ('relu', (4, 6, 6))]
    """
    program = model if isinstance(model, torch.export.ExportedProgram) else exported(model, *inputs)
    with torch.no_grad():
        return Walk(program, dict(assume or {})).traced()


def exported(model: nn.Module, *inputs: Tensor | Sequence[int]) -> torch.export.ExportedProgram:
    """The model's graph in evaluation mode; the model itself is as before."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # late: it takes a third of a second

    model = unwrapped(model)
    own = ((module.training, type(module).train, type(module).eval) for module in model.modules())
    if any(training and found != [nn.Module.train, nn.Module.eval] for training, *found in own):
        try:
            model = as_stored(model)  # they may write weights, as LoRA merges its own
        except Exception as error:  # whatever its parts do when they are copied
            raise GeometryError(
                f"convnorm: model {type(model).__name__} cannot be copied: call its eval() first: {error}"
            ) from error
    inputs = tuple(x if isinstance(x, Tensor) else shape_of(x) for x in inputs)
    held = chain(model.parameters(), model.buffers())
    like = next((tensor for tensor in held if tensor.is_floating_point()), torch.empty(0))
    with FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True):  # of any size, and writable
        shaped = [x if isinstance(x, Tensor) else torch.empty(x, dtype=like.dtype, device=like.device) for x in inputs]
    watch = Watch(model)
    try:
        with restored(model), unlogged():
            model.eval()
            return torch.export.export(model, tuple(shaped), strict=False)
    except Exception as error:  # of what torch.export refuses there are many kinds
        shapes = ", ".join(str(list(x.shape)) for x in shaped)
        where = f", in or after layer {watch.running!r}" if watch.running else ""
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), "") or type(error).__name__
        raise GeometryError(
            f"convnorm: model {type(model).__name__} cannot be exported for an input of {shapes}{where}: {why}"
        ) from error
    finally:
        watch.close()


def inlined(module: fx.GraphModule) -> fx.Graph:
    """The graph with what it does without gradients, or without autocast, in the place of its call, which conceals what
    that writes.
    """
    if not any(map(_is_part, module.graph.nodes)):
        return module.graph
    graph = fx.Graph()
    graph.output(_copied(module, graph, {}))
    return graph


def _is_part(node: fx.Node) -> bool:
    return node.target is NO_GRAD or (node.target is AUTOCAST and not node.args[2])  # whether autocast is enabled


def _copied(module: fx.GraphModule, graph: fx.Graph, copies: dict[fx.Node, Any]) -> Any:
    """A module's nodes at the end of a graph, those of the parts that it calls in place; returns its outputs there."""
    for node in module.graph.nodes:
        if _is_part(node):
            part, *given = dropwhile(lambda option: not isinstance(option, fx.Node), node.args)
            part = getattr(module, part.target)
            copies.update(zip(part.graph.find_nodes(op="placeholder"), [copies[x] for x in given], strict=True))
            copies[node] = _copied(part, graph, copies)
        elif node.target is operator.getitem and isinstance(copies[node.args[0]], tuple):
            copies[node] = copies[node.args[0]][node.args[1]]
        elif node.op == "output":
            return fx.map_arg(node.args[0], copies.__getitem__)
        elif node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":
                copies[node].meta["held"] = getattr(module, node.target)


@dataclass
class Storage:
    """What a tensor and its views share; ``version`` counts what is written into it."""

    version: int = 0


@dataclass
class Value:
    """What a node has made: a step, or a constant, or a tuple of them, and of which version of its storage it is."""

    content: Any
    storage: Storage = field(default_factory=Storage)

    def __post_init__(self) -> None:
        self.version = self.storage.version


class Walk:
    """Through the nodes of a graph."""

    def __init__(self, program: torch.export.ExportedProgram, assume: dict[str, float]) -> None:
        self.graph = inlined(program.graph_module)
        self.program = program
        self.assume = assume
        self.values: dict[fx.Node, Value] = {}
        self.steps: list[Step] = []
        self.used: set[str] = set()
        self.batch: int | None = None
        for name, constant in assume.items():
            if not constant >= 0:
                raise GeometryError(f"convnorm: assume {name!r} {constant} must be a number of at least 0")
        self.regions = {node: region for node in self.graph.nodes if (region := self.region_of(node))}
        # what each reads from outside, before it overwrites that
        self.entered: dict[Region, dict[fx.Node, Any]] = {region: {} for region in self.regions.values()}

    def region_of(self, node: fx.Node) -> Region | None:
        """The outermost call of a module, or the node itself, that a constant was given for."""
        regions = (*_calls(node), (node.name, "")) if node.op == "call_function" else ()
        return next((region for region in regions if region[0] in self.assume), None)

    def traced(self) -> Traced:
        inputs = iter(self.inputs())
        needed = self.needed()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                content = next(inputs)
                if isinstance(content, FakeTensor) and node in needed:
                    raise GeometryError(
                        f"convnorm: {node.name!r} of {list(content.shape)} has no values: torch.export makes a constant"
                        " of what .data reads; .detach() reads the same"
                    )
                self.values[node] = Value(content)
                if isinstance(content, Step):
                    self.add(node, content, "input")
            elif node.op == "get_attr":
                held = node.meta.get("held")
                self.values[node] = Value(getattr(self.program.graph_module, node.target) if held is None else held)
            elif node.op == "call_function" and node in needed:
                self.call(node)
        if unused := [name for name in self.assume if name not in self.used]:
            raise GeometryError(
                f"convnorm: assume {unused[0]!r} names no node and no module that the output depends on"
            )
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        contents = [self.read(node) for node in tree_iter(output.args) if isinstance(node, fx.Node)]
        return Traced(self.steps, [c for c in contents if isinstance(c, Step)], tuple(self.assume))

    def inputs(self) -> Iterator[Any]:
        """What each placeholder stands for: a parameter, a buffer, a constant, or one of the network's inputs."""
        stored = {**self.program.state_dict, **self.program.constants}
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, self.program.graph_signature.input_specs, strict=True):
            if spec.target is not None:
                yield stored[spec.target]
                continue
            meta = node.meta.get("val")
            if not isinstance(meta, Tensor):
                yield meta
                continue
            self.batch = meta.shape[0] if self.batch is None and meta.dim() else self.batch
            if not meta.dim() or meta.shape[0] != self.batch:
                raise GeometryError(
                    f"convnorm: input {node.name!r} of {list(meta.shape)} has no batch axis as others do"
                )
            if not all(isinstance(n, int) for n in meta.shape):
                raise GeometryError(
                    f"convnorm: input {node.name!r} of {list(meta.shape)} was exported with dynamic sizes"
                )
            yield Input(tuple(meta.shape[1:]))

    def needed(self) -> set[fx.Node]:
        """The nodes that the output depends on, also by what they write into a tensor that is read later."""
        owners: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            owners[node] = owners.get(_viewed(node), node)
        needed: set[fx.Node] = set()
        read: set[fx.Node] = set()  # their owners
        for node in reversed(self.graph.nodes):
            if node.op == "output" or node in needed or any(owners[x] in read for x in _overwritten(node)):
                needed.update(node.all_input_nodes, [node])
                read.update(owners[x] for x in node.all_input_nodes)
        return needed

    def read(self, node: fx.Node) -> Any:
        value = self.values[node]
        if value.version != value.storage.version:
            raise GeometryError(f"convnorm: node {node.name!r} was overwritten in place before it is used")
        if value.content is None and node.target is operator.getitem and node not in self.regions:
            made = node.args[0].name
            raise GeometryError(f"convnorm: {_described(node)}, of {made!r}, has no known Lipschitz constant")
        return value.content

    def call(self, node: fx.Node) -> None:
        try:
            self.values[node] = self.value_of(node)
        except Refused as refused:
            raise GeometryError(
                f"convnorm: {_described(node)} {refused}; assume={{{node.name!r}: ...}} gives it a constant"
            ) from None
        except GeometryError as error:
            raise GeometryError(f"convnorm: {_described(node)}: {str(error).removeprefix('convnorm: ')}") from error

    def value_of(self, node: fx.Node) -> Value:
        if node in self.regions:
            return self.stored(node, self.assumed(node, self.regions[node]))
        replaced = node.args[0] if _operation(node) == "copy" else None  # which is not read
        contents = tree_map(
            lambda x: x if not isinstance(x, fx.Node) else self.values[x].content if x is replaced else self.read(x),
            (node.args, node.kwargs),
        )
        if node.target is operator.getitem:
            (many, index), _ = contents
            return self.stored(node, many[index])
        if not any(isinstance(one, Step) for one in tree_iter(contents)):
            return self.constant(node, *contents)
        if _operation(node) in CREATING or (_operation(node) in LIKE and not isinstance(contents[0][0], Step)):
            return self.constant(node, *tree_map(self.blank, (node.args, node.kwargs)))
        content = self.by_rule(node, *contents)
        for step in content if isinstance(content, tuple) else [content]:
            if step is not None and not step.name:
                self.add(node, step, _operation(node))
        return self.stored(node, content)

    def blank(self, x: Any) -> Any:
        """A constant, or zeros of the shape and precision of what depends on the network's input."""
        content = self.read(x) if isinstance(x, fx.Node) else x
        if not isinstance(content, Step):
            return content
        meta = x.meta["val"]
        return torch.zeros((), dtype=meta.dtype, device=meta.device).expand(meta.shape)

    def by_rule(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Step | tuple[Step | None, ...]:
        target = node.target
        operation = _operation(node)
        if not isinstance(target, torch._ops.OpOverload) or operation not in RULES:
            raise Refused("has no known Lipschitz constant")
        if target._schema.is_mutable and any(name != target._schema.arguments[0].name for name in _written(node)):
            raise Refused("writes into what is not its first argument")
        call = Call(operation, target, arguments_of(target, args, kwargs), node.meta["val"])
        made = RULES[operation](call)
        for meta, step in zip(call.meta, made, strict=True) if isinstance(made, tuple) else [(call.meta, made)]:
            if step is not None:
                self.refuse(meta)
        return made

    def refuse(self, meta: Any) -> None:
        """Outputs that are no batch of real numbers."""
        if not isinstance(meta, Tensor) or not meta.dim() or meta.shape[0] != self.batch:
            raise Refused(f"mixes the batch axis: {list(meta.shape)} for a batch of {self.batch}")
        if not meta.dtype.is_floating_point:
            raise Refused(f"rounds to {meta.dtype}")

    def stored(self, node: fx.Node, content: Any) -> Value:
        """What the node has made, in the storage of what it is a view of."""
        for x in _overwritten(node):
            self.values[x].storage.version += 1
        viewed = _viewed(node)
        return Value(content) if viewed is node else Value(content, self.values[viewed].storage)

    def constant(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Value:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and is_random(target, args, kwargs):
            raise GeometryError("convnorm: draws random numbers")
        if _written(node) or target is AUTOCAST:
            args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        return self.stored(node, target(*args, **kwargs))

    def assumed(self, node: fx.Node, region: Region) -> Step | tuple[Step, ...] | None:
        """A node's output as that of its whole region, from all that enters there; none for what does not leave it."""
        inside = [other for other, own in self.regions.items() if own == region]
        entered = self.entered[region]
        for source in (source for other in inside for source in other.all_input_nodes):
            if self.regions.get(source) != region and source in self.values and source not in entered:
                entered[source] = self.read(source)
        entering = tuple(content for content in entered.values() if isinstance(content, Step))
        if not entering or all(self.regions.get(user) == region for user in node.users):
            return None
        name, _ = region
        self.used.add(name)
        made = node.meta["val"]
        joint = []
        for one in tree_iter(made):
            self.refuse(one)
            joint.append(Joint(tuple(one.shape[1:]), entering, factor=float(self.assume[name]), how="assumed"))
            self.add(node, joint[-1], "assumed")
        return joint[0] if isinstance(made, Tensor) else tuple(joint)

    def add(self, node: fx.Node, step: Step, operation: str) -> None:
        """Joins a step, and those that the rule made for its inputs, to the others."""
        for source in step.inputs:
            if not source.name:
                self.add(node, source, operation)
        step.name, step.module, step.operation = node.name, _module(node), operation
        self.steps.append(step)


def _operation(node: fx.Node) -> str:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    name = target._schema.name.removeprefix("aten::")
    return name.rstrip("_") if target._schema.is_mutable else name


def _written(node: fx.Node) -> dict[str, Any]:
    """The arguments that it writes into: most often the first, ``out``, or a list of them."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    given = arguments_of(node.target, node.args, node.kwargs)
    schema = node.target._schema.arguments
    names = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write]
    if given.get("training") or given.get("use_input_stats"):
        names += ["running_mean", "running_var"]  # which the schemas of norms conceal
    return {name: given[name] for name in names if given.get(name) is not None}


def _overwritten(node: fx.Node) -> list[fx.Node]:
    return [x for x in tree_iter(_written(node)) if isinstance(x, fx.Node)]


def _viewed(node: fx.Node) -> fx.Node:
    """What the node writes, or its first input, where its output may be a view of that; itself where that is new."""
    views = node.target is operator.getitem or "dropout" in _operation(node)
    if isinstance(node.target, torch._ops.OpOverload):
        views = views or any(r.alias_info is not None for r in node.target._schema.returns)
    shared = (_overwritten(node) or node.args)[0] if views else node
    return shared if isinstance(shared, fx.Node) else node


def _calls(node: fx.Node) -> list[Region]:
    """The calls of modules that the node belongs to, from the outermost: the module's name, and the call's own."""
    return [(plain_name(path), call) for call, (path, _) in (node.meta.get("nn_module_stack") or {}).items()]


def _module(node: fx.Node) -> str:
    """The innermost module that the node belongs to."""
    return next((name for name, _ in reversed(_calls(node))), "")


def _described(node: fx.Node) -> str:
    module = _module(node)
    return f"node {node.name!r} ({_operation(node)}{f' in module {module!r}' if module else ''})"
