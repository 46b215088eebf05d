"""What MODEL means on the command line.

package.module:factory          called without arguments
resnet50, torchvision:resnet50  of torchvision, new weights
timm:resnet50                   of timm, new weights
program.pt2                     what torch.export.save wrote
weights.pt=MODEL                a state dict, for one of the first three
"""

from __future__ import annotations

import difflib
import importlib
import pickle
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from .reporting.optional import optional

if TYPE_CHECKING:
    from torch.export import ExportedProgram

NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts keep it in a checkpoint
UNREADABLE = (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError)
PREFIXES = ("module.", "_orig_mod.")  # of models in DistributedDataParallel, AveragedModel and torch.compile
COUNT = "n_averaged"  # which AveragedModel has beside it


def load_model(name: str) -> nn.Module | ExportedProgram:
    """A model by its name on the command line; ValueError or ImportError, in one line, where there is none.

    >>> load_model("torch.nn:Identity")
    Identity()
    """
    if name.endswith(".pt2"):
        return load_program(name)
    path, equals, factory = name.rpartition("=")  # the last: paths have some, as in "epoch=3.ckpt"
    if Path(name).is_file():
        raise ValueError(f"convnorm: MODEL {name!r} is a file: a state dict goes with a model, {name}=MODEL")
    if equals:
        return with_weights(factory_of(factory), path, factory)
    return made(factory_of(name), name)


def factory_of(name: str) -> Callable[[], Any]:
    """What makes the model."""
    module, colon, factory = name.partition(":")
    if not colon and name.isidentifier():
        module, factory = "torchvision", name
    if module in ("torchvision", "timm"):
        return zoo_factory(module, factory, name)
    try:
        return getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"convnorm: MODEL {name!r} is no package.module:factory: {error}") from error


def made(factory: Callable[[], Any], name: str) -> nn.Module:
    """What a factory makes; it is the user's own code, which may raise anything."""
    try:
        model = factory()
    except Exception as error:
        raise ValueError(f"convnorm: MODEL {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"convnorm: MODEL {name!r} makes a {type(model).__name__}, not an nn.Module")
    return model


def zoo_factory(package: str, model: str, name: str) -> Callable[[], nn.Module]:
    """A model with new weights, by torchvision's or timm's name."""
    try:
        zoo = import_torchvision_models()  # timm imports it too
        zoo = optional("timm") if package == "timm" else zoo
    except ImportError as error:
        missing = str(error).removeprefix("convnorm: ")
        raise ImportError(f"convnorm: MODEL {name!r} is one of {package}'s: {missing}") from error
    names = zoo.list_models()
    if model not in names:
        near = difflib.get_close_matches(model, names, 3)
        hint = f"; there is {', '.join(near)}" if near else ""
        raise ValueError(f"convnorm: MODEL {name!r} is no model of {package}{hint}")
    return partial(zoo.create_model, model) if package == "timm" else partial(zoo.get_model, model, weights=None)


def import_torchvision_models() -> ModuleType:
    try:
        return optional("torchvision", "torchvision.models")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        # Its compiled part is for another build of PyTorch. These models need none of it, but it wants these to exist.
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        return optional("torchvision", "torchvision.models")


def load_program(path: str) -> ExportedProgram:
    readable(path)
    try:
        return torch.export.load(path)
    except Exception as error:  # of a file that is something else, whatever comes to mind
        raise ValueError(f"convnorm: file {path!r} holds no exported program: {error}") from error


def with_weights(factory: Callable[[], Any], path: str, name: str) -> nn.Module:
    """The model with the weights of a checkpoint, which stay in the file until they are read.

    It is made on the meta device, so that no weights are drawn that would be overwritten; where it cannot be, a buffer
    or another tensor that it holds is not in the checkpoint, or parameters are shared, it is made as always.
    """
    state = state_dict(path)
    try:
        with torch.device("meta"):
            model = made(factory, name)
        own = model.state_dict(keep_vars=True).values()
        tied = len(set(map(id, own))) < len(own)  # would be torn apart
        filled(model, state, path, name, assign=True)
        kept = tree_iter([dict(vars(module)) for module in model.modules()])  # parameters, buffers, plain tensors
        if not tied and not any(isinstance(x, Tensor) and x.is_meta for x in kept):
            return model
    except Exception:  # said again below, if it was not the meta device's fault
        pass
    model = made(factory, name)
    filled(model, state, path, name, assign=False)
    return model


def filled(model: nn.Module, state: Mapping[str, Tensor], path: str, name: str, assign: bool) -> None:
    own = model.state_dict()
    state = unprefixed(state, own)
    wrong = [
        f"{key} of {list(state[key].shape)}, not {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    # its modules know what older ones saved under other names, or not at all
    missing, unknown = ([], []) if wrong else model.load_state_dict(state, strict=False, assign=assign)
    for what, keys in (("has no", missing), ("has a surplus", unknown), ("has", wrong)):
        if keys:
            first, *others = sorted(keys)
            more = f" and {len(others)} more" if others else ""
            raise ValueError(f"convnorm: checkpoint {path!r} does not fit {name!r}: it {what} {first}{more}")


def state_dict(path: str) -> dict[str, Tensor]:
    readable(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE:  # files of before PyTorch 1.6 cannot be mapped
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            first = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
            raise ValueError(f"convnorm: checkpoint {path!r} cannot be read: {first}") from error
    for key in NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"convnorm: checkpoint {path!r} holds no state dict of tensors")
    return dict(state)


def unprefixed(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Without what wrappers, also several of them, put before all names, unless the model has it there itself.

    >>> unprefixed({"_orig_mod.module.weight": 1}, ["weight"]), unprefixed({"module.weight": 1}, ["module.weight"])
    ({'weight': 1}, {'module.weight': 1})
    """
    state = dict(state)
    while not state.keys() & set(own) and any(key.startswith(PREFIXES) for key in state):
        prefix = next(prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in state))
        state = {key.removeprefix(prefix): value for key, value in state.items() if key != COUNT}
    return state


def readable(path: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"convnorm: file {path!r} is not there")
