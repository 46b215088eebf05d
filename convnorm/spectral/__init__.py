"""The l2 norm of layers: certified brackets, and the methods that people use, each in a file of its own."""

from .bracket import Bracket as Bracket
from .bracket import l2 as l2
from .explicit import singular_values as singular_values
from .krylov import lanczos as lanczos
from .rayleigh import Singular as Singular
