"""What is trained: the cells of Table 2 and Figure 2, and the protocol that all cells of a run share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .attacks import RELEASED, STANDARD
from .models import PAPER

STRENGTHS: dict[str, dict[str, tuple[float | None, ...]]] = {  # of each method of an experiment, the strongest first
    "table2": {
        "plain": (None,),
        "weight-decay": (1e-2, 1e-3, 1e-4, 1e-5),
        "clip": (0.5, 1.0, 1.5, 2.0),  # what singular values are clipped to
        "l1-decay": (1e-2, 1e-3, 1e-4, 1e-5),
        "linf-decay": (1e-2, 1e-3, 1e-4, 1e-5),
    },
    "figure2": {"plain": (None,), "pgd-at": (None,), "alp": (1.0,), "trades": (1.0,)},
}
METHODS = tuple(dict.fromkeys(method for methods in STRENGTHS.values() for method in methods))
Setting = tuple[str, float | None]  # method, strength


def settings(experiment: str) -> list[Setting]:
    """Of each model: plain first, and then the strongest of each method first."""
    return [(method, strength) for method, strengths in STRENGTHS[experiment].items() for strength in strengths]


def strongest(experiment: str) -> list[Setting]:
    """Of each method but plain."""
    return [(method, strengths[0]) for method, strengths in STRENGTHS[experiment].items() if method != "plain"]


@dataclass(frozen=True)
class Cell:
    """One network to train."""

    model: str
    method: str
    strength: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model not in PAPER:
            raise ValueError(f"model {self.model!r} must be one of {', '.join(PAPER)}")
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} must be one of {', '.join(METHODS)}")
        if (self.strength is None) != (self.method in ("plain", "pgd-at")):
            has = "has no" if self.strength is not None else "needs a"
            raise ValueError(f"method {self.method!r} {has} strength (--beta)")
        if self.strength is not None and not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength {self.strength} must be a number of at least 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} must be from 0 to 2^32 - 1")

    @property
    def name(self) -> str:
        """
        >>> Cell("resnet18", "l1-decay", 1e-3).name
        'resnet18-l1-decay-0.001-seed0'
        """
        short = () if self.strength is None else (f"{self.strength:g}",)
        strength = tuple(text if float(text) == self.strength else str(self.strength) for text in short)
        return "-".join((self.model, self.method, *strength, f"seed{self.seed}"))


@dataclass(frozen=True)
class Protocol:
    """How cells are trained and attacked; the defaults are the paper's.

    Rows of one protocol can be compared, and only these: a run's folder holds no others.
    """

    experiment: str
    preset: str
    learning_rate: float
    eps: float  # of the attack on the test images
    variant: str = "released"  # of norm decay and clipping; the printed numbers come from it
    dataset: str = "cifar10"
    seeds: int = 1
    width: float = 1.0  # a factor of all networks' channels
    epochs: int = 120
    training_images: int = 50_000
    batch: int = 128
    momentum: float = 0.9
    clip_every: int = 100  # steps
    train_eps: float = 0.031  # of the attack in adversarial training
    train_step: float = 0.007
    train_steps: int = 10
    train_noise: float = 0.001  # deviation of its start
    test_images: int = 10_000
    attacked_images: int = 1_024
    attacks: tuple[str, ...] = RELEASED
    attack_iterations: int = 100
    l2_rtol: float = 1e-2  # of the l2 brackets
    precision: str = "float32"  # or "bfloat16": autocast in training
    compiled: bool = False  # training steps by torch.compile

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {', '.join(allowed)}")
        for name in ("seeds", "epochs", "training_images", "batch", "clip_every", "test_images", "attacked_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.batch > self.training_images:
            raise ValueError(f"batch {self.batch} must be at most training_images {self.training_images}")
        if unknown := [name for name in self.attacks if name not in STANDARD]:
            raise ValueError(f"attacks {', '.join(unknown)!r} must be of {', '.join(STANDARD)}")
        for name in ("width", "learning_rate", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)} must be a number more than 0")

    def cells(self) -> list[Cell]:
        """All that its table or figure shows: 68 for Table 2, 16 for Figure 2, times the seeds."""
        return [
            Cell(model, method, strength, seed)
            for seed in range(self.seeds)
            for model in PAPER
            for method, strength in settings(self.experiment)
        ]


ALLOWED = {
    "experiment": tuple(STRENGTHS),
    "variant": ("paper", "released"),
    "precision": ("float32", "bfloat16"),
}


def protocol(experiment: str, preset: str) -> Protocol:
    """``paper``: as published. ``full``: what the paper left open. ``smoke``: all cells within minutes on two cores.

    >>> protocol("table2", "full").attacks
    ('apgd-ce', 'apgd-t', 'fab-t', 'square')
    >>> len(protocol("table2", "full").cells())
    204
    """
    if experiment not in PUBLISHED:
        raise ValueError(f"experiment {experiment!r} must be one of {', '.join(PUBLISHED)}")
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} must be one of {', '.join(PRESETS)}")
    published = PUBLISHED[experiment]
    if preset == "paper":
        return published
    if preset == "full":  # all layers, averages and 1/N as in Algorithm 1
        return replace(published, preset=preset, variant="paper", seeds=3, attacked_images=10_000, attacks=STANDARD)
    return replace(published, preset=preset, **SMOKE, **SMOKE_OF[experiment])


PRESETS = ("smoke", "paper", "full")
PUBLISHED = {
    "table2": Protocol("table2", "paper", learning_rate=0.01, eps=1 / 255),
    "figure2": Protocol("figure2", "paper", learning_rate=0.1, eps=8 / 255),
}
SMOKE = {
    "width": 1 / 8,
    "batch": 64,
    "learning_rate": 0.1,
    "clip_every": 20,
    "test_images": 1_000,
    "attacked_images": 500,
    "attacks": ("apgd-ce",),
    "attack_iterations": 10,
    "l2_rtol": 0.1,
}
SMOKE_OF = {
    "table2": {"epochs": 4, "training_images": 2_560},
    "figure2": {"epochs": 4, "training_images": 5_120, "train_steps": 3, "train_step": 0.014},
}
