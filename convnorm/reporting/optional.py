"""Packages that only some ways of showing a report need."""

from __future__ import annotations

import importlib
from types import ModuleType

INSTALL = {
    "rich": 'pip install "convnorm[report]"',
    "matplotlib": 'pip install "convnorm[report]"',
    "tensorboard": "pip install tensorboard",
    "torchvision": "pip install torchvision",
    "timm": "pip install timm",
}


def optional(package: str, module: str = "") -> ModuleType:
    """``module`` of a package that may be missing.

    >>> optional("json", "json.decoder").__name__
    'json.decoder'
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(f"convnorm: package {package} is not installed: {INSTALL[package]}") from error
    return importlib.import_module(module or package)
