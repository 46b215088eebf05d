"""Bounds of whole networks: a certified Lipschitz constant from the exported graph, and what data shows from below."""

from .bound import Bound as Bound
from .bound import Node as Node
from .bound import lipschitz as lipschitz
from .jacobian import jacobian_norm as jacobian_norm
from .radius import certified_radius as certified_radius
from .trace import Traced as Traced
from .trace import trace as trace
