"""Exact operator norms of convolutional layers. ``import convnorm`` registers ``torch.ops.convnorm``."""

from . import library as library
from .backends import backends as backends
from .backends import use_backend as use_backend
