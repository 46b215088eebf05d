"""What the paper printed: Table 2, and the names of its networks and methods.

Clean and robust accuracies in percent, of one seed. Robust against AutoAttack, linf, eps 1/255, on 1,024 test images.
"""

from __future__ import annotations

from .cell import settings

MODELS = {"vgg11": "VGG-11", "resnet18": "ResNet-18", "senet18": "SENet-18", "regnetx200mf": "RegNetX-200MF"}
METHODS = {
    "plain": "plain",
    "weight-decay": "weight decay",
    "clip": "singular value clipping",
    "l1-decay": "l1 norm decay",
    "linf-decay": "linf norm decay",
    "pgd-at": "PGD-AT",
    "alp": "ALP",
    "trades": "TRADES",
}

CLEAN_IMAGES = 10_000  # all of CIFAR-10's test images; the paper does not say
ROBUST_IMAGES = 1_024  # one batch of the released code

Key = tuple[str, str, float | None]  # model, method, strength

_PRINTED = {  # plain | weight decay | singular value clipping | l1 norm decay | linf norm decay, the strongest first
    "vgg11": (
        "90.4 | 91.6 91.7 90.1 90.2 | 87.6 89.1 90.0 89.9 | 88.1 91.1 90.6 90.8 | 91.8 91.1 90.8 90.6",
        "60.2 | 56.3 60.5 60.6 60.3 | 48.8 52.2 54.1 56.7 | 56.5 62.5 61.1 60.1 | 56.9 60.0 60.8 60.1",
    ),
    "resnet18": (
        "93.2 | 94.3 94.1 93.1 92.7 | 93.6 94.0 94.2 93.8 | 92.5 93.4 93.5 93.4 | 93.0 93.8 93.1 93.0",
        "37.0 | 28.2 33.7 33.9 40.9 | 35.2 41.7 43.2 39.8 | 24.5 37.7 38.3 37.5 | 20.0 34.7 38.9 37.6",
    ),
    "senet18": (
        "93.1 | 94.2 93.9 93.0 92.4 | 93.8 94.2 93.8 94.2 | 92.3 93.8 93.3 93.3 | 93.0 93.6 92.8 93.2",
        "35.7 | 23.5 32.8 37.0 34.8 | 30.5 35.6 35.2 37.4 | 33.6 36.0 38.2 36.7 | 28.6 31.0 37.6 37.4",
    ),
    "regnetx200mf": (
        "91.8 | 93.6 94.4 92.3 91.3 | 93.9 93.4 93.0 92.4 | 93.7 92.3 91.6 91.9 | 93.4 92.0 91.8 91.9",
        "-    | 23.7 30.3 30.0 31.0 | 27.7 28.8 29.0 28.8 | 29.2 31.1 28.1 34.3 | 23.2 27.7 27.9 30.6",
    ),
}


def _numbers(line: str) -> list[float | None]:
    return [None if number == "-" else float(number) for number in line.replace("|", " ").split()]


TABLE2: dict[Key, tuple[float, float | None]] = {
    (model, *column): (clean, robust)
    for model, (cleans, robusts) in _PRINTED.items()
    for column, clean, robust in zip(settings("table2"), _numbers(cleans), _numbers(robusts), strict=True)
}
