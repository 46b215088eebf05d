"""Exact operator norms of convolutional layers. ``import convnorm`` registers ``torch.ops.convnorm``."""

from . import optim as optim
from .backends import backends as backends
from .backends import use_backend as use_backend
from .decay import NormDecay as NormDecay
from .geometry import GeometryError as GeometryError
from .norms import Norms as Norms
from .norms import norms as norms
from .norms import subgradient as subgradient
from .norms import witness as witness
