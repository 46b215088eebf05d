"""The l2 norm of layers: certified brackets, and the methods that people use, each in a file of its own."""

from .bounds import frobenius as frobenius
from .bounds import sqrt_l1_linf as sqrt_l1_linf
from .bracket import Bracket as Bracket
from .bracket import l2 as l2
from .clip import clip_singular_values as clip_singular_values
from .explicit import singular_values as singular_values
from .fft import circle_norm as circle_norm
from .fft import fft_singular_values as fft_singular_values
from .gram import gram_iteration as gram_iteration
from .lanczos import lanczos as lanczos
from .power_iteration import PowerIteration as PowerIteration
from .power_iteration import power_iteration as power_iteration
from .rayleigh import Singular as Singular
from .reshaped import four_reshapings as four_reshapings
from .reshaped import reshaped_estimate as reshaped_estimate
from .tensor_norm import tensor_norm_estimate as tensor_norm_estimate
