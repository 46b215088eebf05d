"""Exact operator norms of convolutional layers. ``import convnorm`` registers ``torch.ops.convnorm``."""

from . import optim as optim
from . import spectral as spectral
from .backends import backends as backends
from .backends import use_backend as use_backend
from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .constrain import Projection as Projection
from .constrain import constrain as constrain
from .constrain import project_ as project_
from .constrain import project_batch_norms_ as project_batch_norms_
from .decay import NormDecay as NormDecay
from .geometry import GeometryError as GeometryError
from .norms import Norms as Norms
from .norms import norms as norms
from .norms import subgradient as subgradient
from .norms import witness as witness
from .project import project as project
from .recorder import Recorder as Recorder
from .report import Report as Report
from .report import report as report
from .spectral import Bracket as Bracket
from .spectral import l2 as l2
from .spectral import singular_values as singular_values
